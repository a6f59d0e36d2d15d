"""Loads the compiled operators, `torch.ops.in2nect_cpp` and `torch.ops.in2nect_cuda`, on first use, and says why not.

The libraries lie beside this file, or in the folder that IN2NECT_NATIVE_DIR names (a sanitized build, another torch's).
They speak torch's stable C interface alone and hold no Python code, so they are loaded with `torch.ops.load_library`.
Importing this module loads nothing.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
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
        folder = os.environ.get("IN2NECT_NATIVE_DIR")
        missing = f"{path.name} is not {f'in {folder}, which IN2NECT_NATIVE_DIR names' if folder else 'built'}"
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
    return Path(os.environ.get("IN2NECT_NATIVE_DIR") or Path(__file__).parent, _FILES[backend]).absolute()


# Each with all before it, but for the last, which tests the mathematics of "amx" without its instructions, slowly.
CPU_CAPABILITIES = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")


def cpu_capability() -> str:
    """Which build of the CPU operators runs: the best of CPU_CAPABILITIES that this CPU has, or the one that
    IN2NECT_CPU_CAPABILITY names.

    Raises RuntimeError where the operators are not available, or the variable names what the CPU has not.
    """
    load("cpp")
    found = _capability_functions().in2nect_cpu_capability().decode()
    if found not in CPU_CAPABILITIES:
        raise RuntimeError(found)
    return found


@contextlib.contextmanager
def use_cpu_capability(name: str) -> Iterator[None]:
    """For tests and comparisons: the CPU operators of a lower capability than the CPU has.

    Raises ValueError for one that the CPU has not.
    """
    previous = cpu_capability()
    functions = _capability_functions()
    if name not in CPU_CAPABILITIES:
        raise ValueError(f"CPU capability {name!r}: expected one of {', '.join(CPU_CAPABILITIES)}.")
    refusal = functions.in2nect_set_cpu_capability(name.encode())
    if refusal is not None:
        raise ValueError(f"CPU capability {name!r}: {refusal.decode()}.")
    try:
        yield
    finally:
        functions.in2nect_set_cpu_capability(previous.encode())


def available_cpu_capabilities() -> list[str]:
    """Those of CPU_CAPABILITIES that this CPU has; empty where the operators are not available."""
    found = []
    for name in CPU_CAPABILITIES if available("cpp") else ():
        with contextlib.suppress(ValueError), use_cpu_capability(name):
            found.append(name)
    return found


def cuda_targets() -> list[str]:
    """The chips that the CUDA operators were built for: "sm_86", or "compute_100" for PTX.

    Raises RuntimeError where the operators are not available.
    """
    load("cuda")
    functions = ctypes.CDLL(str(library("cuda")))
    functions.in2nect_cuda_targets.restype = ctypes.c_char_p
    return functions.in2nect_cuda_targets().decode().split()


def busy(what: str, rounds: int, *, float64: bool = False) -> int:
    """For the bench: keep this thread's units busy in registers with "multiply_adds", of two operations each, or
    "exponentials"; returns how many operations that was."""
    load("cpp")
    return getattr(_capability_functions(), f"in2nect_{what}")(int(float64), rounds)


@functools.cache
def _capability_functions() -> ctypes.CDLL:
    """The library again, for those functions of it that are not operators (csrc/cpu/capability.h)."""
    functions = ctypes.CDLL(str(library("cpp")))
    functions.in2nect_cpu_capability.restype = ctypes.c_char_p
    functions.in2nect_set_cpu_capability.restype = ctypes.c_char_p
    functions.in2nect_set_cpu_capability.argtypes = (ctypes.c_char_p,)
    for loop in (functions.in2nect_multiply_adds, functions.in2nect_exponentials):
        loop.restype = ctypes.c_int64
        loop.argtypes = (ctypes.c_int, ctypes.c_int64)
    return functions
