"""Random training crops, each a pure function of (seed, epoch, index): the same for any number of workers and after a
resume.

The augmentations are those of the In2NeCT paper: random scale, flips and rotation. Scale is applied while reading
(the window under the crop is resampled by the raster library), so a crop costs the blocks under its window:
milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from in2nect.data.classes import Classes
from in2nect.data.coding import CodeLabels
from in2nect.data.scenes import Pair, read_image, read_label
from in2nect.data.windows import RasterCache

Sample = dict[str, Any]


@dataclass(frozen=True)
class Augmentations:
    """How a training crop may be changed.

    Args:
        scales: magnifications, one drawn a crop; 0.5 shows twice the ground in each direction.
        horizontal_flip: mirror left and right, one crop in two.
        vertical_flip: mirror up and down, one crop in two.
        quarter_turns: turn by 0, 90, 180 or 270 degrees, equally likely.
        rotation: turn further by up to this many degrees either way, 0..180. A wider window is read so that no corner
            is empty.
    """

    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    horizontal_flip: bool = True
    vertical_flip: bool = True
    quarter_turns: bool = True
    rotation: float = 0.0

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(
                f"scales: {self.scales}; expected at least one, all above 0 ((1.0,) leaves the scale alone)"
            )
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation: {self.rotation}; expected degrees in 0..180")


class CropDataset(Dataset[Sample]):
    """Random crops of the images of a split.

    Item `epoch * length + index` is crop `index` of that epoch; `CropSampler` yields these numbers. An image is drawn
    with probability proportional to its area, the window uniformly inside it, so every pixel is about equally likely
    to be seen. Where an image is smaller than the window, it is read whole and its surroundings are its reflection,
    labelled `ignore_index`.

    Args:
        pairs: images with labels, `folder.split_pairs`.
        crop_size: side of the crops, in pixels.
        length: crops an epoch.
        seed: 0 or more.

    Items are dict(image=uint8 (C, H, W), label=uint8 (H, W), name=str, window=(row, col, height, width) in the
    image's pixels).
    """

    def __init__(
        self,
        pairs: list[Pair],
        classes: Classes,
        *,
        crop_size: int,
        length: int,
        seed: int = 0,
        augmentations: Augmentations | None = None,
    ) -> None:
        for name, value, least in (("crop_size", crop_size, 1), ("length", length, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: {value}; expected at least {least}")
        self.pairs, self.classes = pairs, classes
        self.crop_size, self.length, self.seed = crop_size, length, seed
        self.augmentations = augmentations or Augmentations()
        self._area_below = np.cumsum([pair.height * pair.width for pair in pairs])
        self._rasters = RasterCache()
        self._codes = CodeLabels(classes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> Sample:
        epoch, index = divmod(item, self.length)
        return self._crop(np.random.default_rng((self.seed, epoch, index)))

    def _crop(self, rng: np.random.Generator) -> Sample:
        options = self.augmentations
        pair = self.pairs[int(np.searchsorted(self._area_below, rng.integers(self._area_below[-1]), side="right"))]
        scale = float(rng.choice(options.scales))
        flip_columns, flip_rows = rng.random(2) < 0.5
        turns = int(rng.integers(4))
        angle = float(rng.uniform(-options.rotation, options.rotation))
        # A square turned by `angle` fits into one larger by |cos| + |sin|.
        extent = abs(math.cos(math.radians(angle))) + abs(math.sin(math.radians(angle)))
        side = math.ceil(round(self.crop_size * extent, 6))
        ground = max(1, round(side / scale))
        image, label, window = self._read(pair, rng, ground, side)
        if angle:
            image, label = self._rotate(image, label, angle)
        if options.horizontal_flip and flip_columns:
            image, label = v2.functional.horizontal_flip(image), v2.functional.horizontal_flip(label)
        if options.vertical_flip and flip_rows:
            image, label = v2.functional.vertical_flip(image), v2.functional.vertical_flip(label)
        if options.quarter_turns:
            image, label = torch.rot90(image, turns, (-2, -1)), torch.rot90(label, turns, (-2, -1))
        return {
            "image": image.as_subclass(Tensor).contiguous(),
            "label": label.as_subclass(Tensor)[0].contiguous(),
            "name": pair.name,
            "window": torch.tensor(window),
        }

    def _read(
        self, pair: Pair, rng: np.random.Generator, ground: int, side: int
    ) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
        """A window of `ground` pixels a side, resampled: image (C, side, side), label (1, side, side), window."""
        row, height, above, below, rows = _place(rng, pair.height, ground, side)
        col, width, left, right, cols = _place(rng, pair.width, ground, side)
        window = (row, col, height, width)
        image = read_image(self._rasters, pair, window, (rows, cols))
        label = read_label(self._rasters, pair, window, (rows, cols), default=self._codes)[None]
        if (rows, cols) != (side, side):
            border = ((0, 0), (above, below), (left, right))
            image = np.pad(image, border, mode="reflect" if min(rows, cols) > 1 else "edge")
            label = np.pad(label, border, constant_values=self.classes.ignore_index)
        return tv_tensors.Image(torch.from_numpy(image)), tv_tensors.Mask(torch.from_numpy(label)), window

    def _rotate(self, image: Tensor, label: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        size = [self.crop_size, self.crop_size]
        image = v2.functional.rotate(image, angle, interpolation=v2.InterpolationMode.BILINEAR)
        label = v2.functional.rotate(label, angle, fill=[float(self.classes.ignore_index)])
        return v2.functional.center_crop(image, size), v2.functional.center_crop(label, size)


class CropSampler(DistributedSampler[Any]):
    """Yields epoch * length + i for this rank's i = rank, rank + world_size, ...; every rank gets length //
    world_size of them.

    It is a DistributedSampler so that Lightning keeps it as it is under DDP and calls its `set_epoch`.
    """

    def __init__(self, length: int, *, rank: int = 0, world_size: int = 1) -> None:
        if length < world_size:
            raise ValueError(f"length {length} for {world_size} processes; expected at least one crop a process")
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.length = length

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.length
        return iter(range(start + self.rank, start + len(self) * self.num_replicas, self.num_replicas))

    def __len__(self) -> int:
        return self.length // self.num_replicas


def collate(samples: list[Sample]) -> Sample:
    """Stack samples of one shape: image (B, C, H, W), label (B, H, W), window (B, 4), name a list of B."""
    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "label", "window")}
    return {**stacked, "name": [sample["name"] for sample in samples]}


def _place(rng: np.random.Generator, length: int, ground: int, side: int) -> tuple[int, int, int, int, int]:
    """A window of `ground` pixels on an axis: (start, extent, padding before, padding after, extent once resampled)."""
    if ground <= length:
        return int(rng.integers(length - ground + 1)), ground, 0, 0, side
    inside = max(1, round(length * side / ground))
    before = int(rng.integers(side - inside + 1))
    return 0, length, before, side - inside - before, inside
