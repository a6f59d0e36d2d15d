"""Evaluation: every image of a split read in a grid of windows at its native resolution, every pixel scored exactly
once.

Windows at an edge are shifted back, never padded. Outside the part a window owns its label is `ignore_index`, so a
metric that leaves the ignored code out counts no pixel twice; overlap only gives the pixels near a seam their context.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from in2nect.data.classes import Classes
from in2nect.data.coding import CodeLabels
from in2nect.data.crops import Sample
from in2nect.data.scenes import Pair, read_image, read_label
from in2nect.data.windows import GridWindow, RasterCache, grid_windows


class GridDataset(Dataset[list[Sample]]):
    """The evaluation windows of the images of a split, by the batch: an item is the list of samples with the given
    numbers. Number ~i is window i with every label ignored: it fills up a rank that has nothing left to score.

    Args:
        pairs: images with labels, `folder.split_pairs`.
        window: side of a window, in pixels; an image smaller than it is read as it is.
        overlap: least number of pixels that neighbours share.

    Samples are dict(image=uint8 (C, H, W), label=uint8 (H, W), name=str, window=(row, col, height, width) in the
    image's pixels).
    """

    def __init__(self, pairs: list[Pair], classes: Classes, *, window: int, overlap: int) -> None:
        self.classes = classes
        self.windows: list[tuple[Pair, GridWindow]] = [
            (pair, place) for pair in pairs for place in grid_windows(pair.height, pair.width, window, overlap)
        ]
        self._rasters = RasterCache()
        self._codes = CodeLabels(classes)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, numbers: list[int]) -> list[Sample]:
        return [self._sample(*self.windows[max(number, ~number)], scores=number >= 0) for number in numbers]

    def _sample(self, pair: Pair, place: GridWindow, *, scores: bool) -> Sample:
        rows, cols = place.rows, place.cols
        window = (rows.start, cols.start, rows.size, cols.size)
        label = read_label(self._rasters, pair, window, default=self._codes)
        scored = np.full_like(label, self.classes.ignore_index)
        owned = (
            slice(rows.own_start - rows.start, rows.own_stop - rows.start),
            slice(cols.own_start - cols.start, cols.own_stop - cols.start),
        )
        if scores:
            scored[owned] = label[owned]
        return {
            "image": torch.from_numpy(read_image(self._rasters, pair, window)),
            "label": torch.from_numpy(scored),
            "name": pair.name,
            "window": torch.tensor(window),
        }


class ShapeBatchSampler(DistributedSampler[Any]):
    """Yields lists of window numbers, at most `batch_size` each and all of one shape; give it as `sampler` with
    `batch_size=None`.

    Under DDP the batches, then no larger than an even share, are dealt out to the ranks, and no window is scored
    twice. Ranks must run as many batches as one another, because each forward pass of a training's validation
    synchronises them: one that has fewer ends with window 0 under ignored labels. (A DistributedSampler, which
    Lightning leaves alone; the usual one repeats windows to even the ranks out.)
    """

    def __init__(self, windows: list[tuple[Pair, GridWindow]], batch_size: int, *, rank: int = 0, world_size: int = 1):
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size}; expected at least 1")
        super().__init__(windows, num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        batches = _batches_by_shape(windows, max(1, min(batch_size, len(windows) // world_size)))
        batches += [[~0]] * (-len(batches) % world_size)
        self._batches = batches[rank::world_size]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def _batches_by_shape(windows: list[tuple[Pair, GridWindow]], batch_size: int) -> list[list[int]]:
    """Numbers in reading order, collected by shape; a batch comes out when it is full, the rests at the end."""
    full: list[list[int]] = []
    waiting: dict[tuple[int, int], list[int]] = {}
    for number, (_, place) in enumerate(windows):
        batch = waiting.setdefault(place.shape, [])
        batch.append(number)
        if len(batch) == batch_size:
            full.append(waiting.pop(place.shape))
    return full + list(waiting.values())
