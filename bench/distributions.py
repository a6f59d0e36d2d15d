"""Feature distributions on which bench/estimator_error.py holds the estimators to the exact loss: rows (N, d) and their
classes, long-tailed, drawn from a seed.

Gaussian classes round Gaussian centres of unit variance a dimension: the spread within a class is relative to the one
between classes. At 0.05 a class is a point, at 3 the classes are one cloud.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPREADS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0)
MODES = (2, 4, 16)
DIMENSIONS = (4, 16)
MODE_SPREAD = 0.2  # within a mode: modes stand apart, as several kinds of roof do


@dataclass(frozen=True)
class FeatureSet:
    """Rows (N, d) and classes (N,); ``spread`` where it is the only thing that changes in its family."""

    name: str
    family: str  # "raw", "relu6", "multimodal", "low-dimensional" or "trained"
    features: Tensor
    labels: Tensor
    classes: int
    spread: float | None = None


def synthetic_sets(pixels: int, dim: int, classes: int, seed: int, dtype: torch.dtype) -> list[FeatureSet]:
    """All of them, each from its own generator: none changes when another is added."""
    y = long_tailed(pixels, classes, seed)
    found = []
    for spread in SPREADS:
        rows = gaussian(y, classes, dim, spread, seed)
        found.append(_set(f"spread {spread:g}", "raw", rows, y, classes, dtype, spread))
        found.append(_set(f"spread {spread:g}, ReLU6", "relu6", rows.clamp(0, 6), y, classes, dtype, spread))
    for modes in MODES:
        rows = multimodal(y, classes, dim, modes, seed)
        found.append(_set(f"{modes} modes a class", "multimodal", rows, y, classes, dtype))
        found.append(_set(f"{modes} modes a class, ReLU6", "multimodal", rows.clamp(0, 6), y, classes, dtype))
    for dimensions in DIMENSIONS:
        if dimensions < dim:
            rows = low_dimensional(y, classes, dim, dimensions, seed)
            found.append(_set(f"{dimensions} dimensions", "low-dimensional", rows, y, classes, dtype))
            found.append(
                _set(f"{dimensions} dimensions, ReLU6", "low-dimensional", rows.clamp(0, 6), y, classes, dtype)
            )
    return found


def long_tailed(pixels: int, classes: int, seed: int) -> Tensor:
    """Class k with odds 1 / (k + 1); the first pixels give every class two at least."""
    odds = 1.0 / torch.arange(1, classes + 1, dtype=torch.float64)
    y = torch.multinomial(odds, pixels, replacement=True, generator=_generator(seed, 0))
    y[: 2 * classes] = torch.arange(2 * classes)[:pixels] // 2
    return y


def gaussian(y: Tensor, classes: int, dim: int, spread: float, seed: int) -> Tensor:
    """``centre of the class + spread * noise``; centres and noise are the same for every spread."""
    generator = _generator(seed, 1)
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return centres[y] + spread * torch.randn(len(y), dim, generator=generator, dtype=torch.float64)


def multimodal(y: Tensor, classes: int, dim: int, modes: int, seed: int) -> Tensor:
    """Each class a mixture of ``modes`` equal Gaussians that lie as far from one another as from other classes'."""
    generator = _generator(seed, 2)
    centres = torch.randn(classes, modes, dim, generator=generator, dtype=torch.float64)
    mode = torch.randint(modes, (len(y),), generator=generator)
    return centres[y, mode] + MODE_SPREAD * torch.randn(len(y), dim, generator=generator, dtype=torch.float64)


def low_dimensional(y: Tensor, classes: int, dim: int, dimensions: int, seed: int) -> Tensor:
    """Gaussian classes of spread 1 in ``dimensions`` dimensions, turned into ``dim`` by an orthonormal map: cosines are
    those of few dimensions, spread over all of -1..1."""
    directions = torch.randn(dim, dimensions, generator=_generator(seed, 3), dtype=torch.float64)
    return gaussian(y, classes, dimensions, 1.0, seed) @ torch.linalg.qr(directions).Q.T


def subsample(features: Tensor, labels: Tensor, pixels: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most ``pixels`` of the rows, uniformly."""
    chosen = torch.randperm(len(labels), generator=_generator(seed, 4))[:pixels].sort().values
    return features[chosen], labels[chosen]


def _set(
    name: str, family: str, rows: Tensor, y: Tensor, classes: int, dtype: torch.dtype, spread: float | None = None
) -> FeatureSet:
    return FeatureSet(name, family, rows.to(dtype), y, classes, spread)


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + stream)
