"""One synthetic scene from a seed: planned, painted, and sometimes cut off at a corner where the flight had no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from in2nect.data.classes import LOVEDA
from in2nect.data.synthetic.layout import Mask, plan
from in2nect.data.synthetic.rendering import render

SMALLEST = 128
NO_DATA_SHARE = 0.006


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 (H, W, 3), and its class codes, uint8 (H, W), 255 where there is no data."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]


def synthetic_scene(seed: int | Sequence[int], size: int = 1024) -> Scene:
    """Draw a scene of size x size pixels of 0.3 m.

    The classes are LoveDA's (`in2nect.data.classes.LOVEDA`); of the labelled pixels about 39 % are background, 8
    building, 4.5 road, 6.5 water, 2.6 barren, 12 forest and 27 agriculture. Half of the scenes lack a corner.

    Args:
        seed: a whole number >= 0, or several; the scene depends on nothing else.
        size: side in pixels, 128 or more. Below about 500 the frequencies vary more from scene to scene.

    Raises:
        ValueError: `size` is below 128.
    """
    if size < SMALLEST:
        raise ValueError(f"size: {size} pixels; a scene needs at least {SMALLEST}")
    rng = np.random.default_rng(seed)
    layout = plan(rng, size)
    image, label = render(rng, layout), layout.label
    if rng.random() < 0.5:
        missing = _corner(rng, size)
        image[missing], label[missing] = 0, LOVEDA.ignore_index
    return Scene(image, label)


def _corner(rng: np.random.Generator, size: int) -> Mask:
    """A triangle in one of the four corners."""
    long = np.sqrt(2 * NO_DATA_SHARE * rng.uniform(1.5, 6.0)) * size
    short = 2 * NO_DATA_SHARE * size**2 / long
    row, col = np.mgrid[:size, :size]
    mask = row / long + col / short < 1
    return np.rot90(mask if rng.random() < 0.5 else mask.T, int(rng.integers(4)))
