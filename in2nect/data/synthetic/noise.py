"""Random fields for the synthetic scenes: smooth noise, resampling and blur in plain numpy, the same on any number of
threads.

Noise of wavelength w is made on a grid about w / 8 pixels wide and interpolated: O(pixels) however smooth it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]


def smooth_noise(rng: np.random.Generator, size: int, wavelength: float, octaves: int = 1) -> Field:
    """(size, size) noise of mean 0 and standard deviation about 1 whose features are about `wavelength` pixels across.

    Each further octave halves the wavelength and the amplitude.
    """
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        total += _band(rng, size, max(2.0, wavelength / 2**octave)) * np.float32(0.5**octave)
    return total / np.float32(np.sqrt(sum(0.25**octave for octave in range(octaves))))


def blur(field: Field, sigma: float) -> Field:
    """Gaussian blur of the first two axes, edges repeated."""
    radius = max(1, int(np.ceil(2.5 * sigma)))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        border = [(0, 0)] * field.ndim
        border[axis] = (radius, radius)
        padded = np.pad(field, border, mode="edge")
        field = np.zeros_like(field)
        for offset, weight in enumerate(weights):
            field += weight * np.take(padded, range(offset, offset + field.shape[axis]), axis=axis)
    return field


def wide_blur(field: Field, sigma: float) -> Field:
    """Gaussian blur by many pixels, at a quarter of the resolution."""
    height, width = field.shape
    padded = np.pad(field, ((0, -height % 4), (0, -width % 4)), mode="edge")
    coarse = padded.reshape(padded.shape[0] // 4, 4, padded.shape[1] // 4, 4).mean(axis=(1, 3))
    return _enlarge(blur(coarse.astype(np.float32), sigma / 4), height, width, 4.0)


def _band(rng: np.random.Generator, size: int, wavelength: float) -> Field:
    step = max(1.0, wavelength / 8)
    sigma = wavelength / (4 * step)
    count = int(np.ceil(size / step)) + 2
    margin = int(np.ceil(2.5 * sigma))
    white = rng.standard_normal((count + 2 * margin,) * 2, dtype=np.float32)
    coarse = blur(white, sigma)[margin : margin + count, margin : margin + count]
    # A Gaussian filter of this width leaves a variance of 1 / (4 pi sigma^2).
    coarse *= np.float32(2 * np.sqrt(np.pi) * sigma)
    return coarse[:size, :size] if step == 1 else _enlarge(coarse, size, size, step)


def _enlarge(coarse: Field, height: int, width: int, step: float) -> Field:
    """Bilinear interpolation: fine pixel i lies at (i + 0.5) / step - 0.5 on the coarse grid."""
    for axis, length in ((0, height), (1, width)):
        position = np.clip((np.arange(length) + 0.5) / step - 0.5, 0, coarse.shape[axis] - 1)
        below = np.minimum(position.astype(np.int64), coarse.shape[axis] - 2)
        part = (position - below).astype(np.float32)
        part = part[:, None] if axis == 0 else part[None, :]
        coarse = np.take(coarse, below, axis) * (1 - part) + np.take(coarse, below + 1, axis) * part
    return coarse
