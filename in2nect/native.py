"""Loads the compiled operators, `torch.ops.in2nect_cpp` and `torch.ops.in2nect_cuda`, on first use, and says why not.

The libraries lie beside this file. They speak torch's stable C interface alone and hold no Python code, so they are
loaded with `torch.ops.load_library`. Importing this module loads nothing.
"""

import functools
from pathlib import Path

_BUILD = "run `pip install --no-build-isolation -e .` in the checkout, or install a wheel"
_FILES = {"cpp": "_C.abi3.so", "cuda": "_C_cuda.abi3.so"}


def available(backend: str = "cpp") -> bool:
    """Whether the operators of `backend`, "cpp" or "cuda", can be called; loads their library on the first call.

    Says nothing about a GPU: "cuda" is available where its library loads, also where no device is present.
    """
    return why_not(backend) is None


@functools.cache
def why_not(backend: str = "cpp") -> str | None:
    """Why the operators of `backend` cannot be called and what to do about it; None if they can."""
    import torch

    path = library(backend)
    if backend == "cuda" and torch.version.cuda is None:
        return f"this torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    if not path.is_file():
        missing = f"{path.name} is not built"
        return f"{missing}: with nvcc on the PATH, {_BUILD}" if backend == "cuda" else f"{missing}: {_BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__} ({error}); {_BUILD}"
    return None


def load(backend: str = "cpp") -> None:
    """Registers the operators of `backend` under `torch.ops.in2nect_cpp` or `torch.ops.in2nect_cuda`.

    Raises RuntimeError, with the way to mend it, where that is not possible. A second call does nothing.
    """
    reason = why_not(backend)
    if reason is not None:
        raise RuntimeError(f"the {backend} backend is not available: {reason}")


def library(backend: str) -> Path:
    """Path at which the library of `backend` is looked for; ValueError for an unknown backend."""
    if backend not in _FILES:
        raise ValueError(f"backend is one of {', '.join(_FILES)}; got {backend!r}")
    return Path(__file__).with_name(_FILES[backend])
