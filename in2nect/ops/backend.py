"""Which implementation runs an operator: ``reference`` (torch operators, always there), ``cpp`` (csrc/cpu), ``cuda``
(csrc/cuda) or ``triton`` (kernels/). Chosen by the tensor's device unless ``use_backend`` or IN2NECT_BACKEND says
otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from in2nect import native

BACKENDS = ("reference", "cpp", "cuda", "triton")
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}  # by device, the fastest first
_DEVICE = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}  # where a backend runs; the reference runs anywhere
MINIMUM_CAPABILITY = (8, 0)  # of the Triton kernels: bfloat16 tensor cores

_implementations: dict[tuple[str, str], Callable] = {}
_chosen: str | None = None
_warned: set[str] = set()


class use_backend:  # a function to its users, who may also open it as a context
    """Choose the backend of every operator: ``use_backend("reference")``, or ``with use_backend("cpp"): ...``.

    An operator which the backend does not implement runs on the reference. ``None`` returns to the choice by device.

    Args:
        name: "reference", "cpp", "cuda", "triton" or None.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend is not available here; the message says how to get it.
    """

    def __init__(self, name: str | None) -> None:
        global _chosen
        if name is not None:
            _check_available(name)
        self._previous = _chosen
        _chosen = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


def implementation(operator: str, backend: str) -> Callable[[Callable], Callable]:
    """Decorator: register a function as an operator's implementation on a backend."""

    def register(function: Callable) -> Callable:
        _implementations[operator, backend] = function
        return function

    return register


def select(operator: str, device: torch.device) -> Callable:
    """The implementation of an operator for tensors on a device."""
    backend = _chosen or os.environ.get("IN2NECT_BACKEND") or None
    if backend is not None:
        if _chosen is None:
            _check_available(backend)
        if _DEVICE.get(backend, device.type) != device.type and not (backend == "triton" and interpreted()):
            raise RuntimeError(
                f"The backend {backend!r} runs on {_DEVICE[backend]} and the tensors are on {device.type}. Move them, "
                "or let the device choose: in2nect.use_backend(None), and unset IN2NECT_BACKEND."
            )
        if device.type == "cuda" and (operator, backend) not in _implementations:
            warn_slow(operator)
        return _implementations.get((operator, backend), _implementations[operator, "reference"])
    for candidate in _PREFERENCE.get(device.type, ("reference",)):
        if candidate in ("cuda", "triton") and device_why_not(device, candidate) is not None:
            continue
        if (operator, candidate) in _implementations and why_not(candidate) is None:
            if candidate == "reference" and device.type == "cuda":
                warn_slow(operator)
            return _implementations[operator, candidate]
    raise AssertionError(f"{operator} has no reference implementation")


def why_not(backend: str) -> str | None:
    """None where a backend can run here; else the reason, with how to get it."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_why_not()
    return native.why_not(backend)


def interpreted() -> bool:
    """Whether the Triton kernels run in Triton's interpreter, on tensors of any device: slow, and for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def device_why_not(device: torch.device, backend: str) -> str | None:
    """None where the kernels of "cuda" or "triton" run on a CUDA device; else the reason.

    For "cuda" it is found by running one on a single pixel.
    """
    if backend == "triton":
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            found = ".".join(map(str, capability))
            return f"the Triton kernels need compute capability 8.0 or later and {device} has {found}"
        return None
    if native.why_not("cuda") is not None:
        return native.why_not("cuda")
    features = torch.ones(1, 1, 1, 1, device=device)
    labels = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    try:
        torch.ops.in2nect_cuda.class_sums(features, labels, 2, 255, False, False)
    except RuntimeError as error:  # "no kernel image is available": the library was built for other chips
        return f"the CUDA operators do not run on {device} ({error}); build them with TORCH_CUDA_ARCH_LIST for its chip"
    return None


def implements(operator: str, backend: str) -> bool:
    """Whether an operator has an implementation of its own on a backend."""
    return (operator, backend) in _implementations


def operators() -> list[str]:
    """The names of all operators."""
    return sorted({operator for operator, _ in _implementations})


def kernel(operator: str, name: str | None = None) -> Callable:
    """The host function of an operator's Triton kernels, in kernels/<operator>.py, imported when first called."""

    def call(*arguments: Any) -> Any:
        module = importlib.import_module(f"in2nect.kernels.{operator}")
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, not on the tensors'
            return getattr(module, name or operator)(*arguments)

    return call


def native_operator(backend: str, name: str) -> Callable:
    """A compiled operator of csrc/, by backend ("cpp" or "cuda"), looked up when called."""

    def call(*arguments: Any) -> Any:
        return getattr(getattr(torch.ops, f"in2nect_{backend}"), name)(*arguments)

    return call


def _triton_why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; on Linux, pip install triton"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)"
    return None


def _check_available(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"There is no backend {name!r}; expected one of {', '.join(BACKENDS)}.")
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"The backend {name!r} is not available: {reason}.")


def warn_slow(operator: str) -> None:
    """Say once that an operator meets CUDA tensors with nothing faster than plain torch."""
    if operator not in _warned:
        _warned.add(operator)
        warnings.warn(
            f"in2nect::{operator} runs on CUDA through plain torch operators, slower and larger than a kernel would be "
            "(`in2nect doctor` says which backends work).",
            stacklevel=2,
        )
