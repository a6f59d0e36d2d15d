"""Where training crops are taken: how a data set is told to, and an index of which classes lie where, built once and
kept on the disk.

The index counts the pixels of every class in cells of 128 x 128 pixels: 14 bytes a cell at seven classes, a third of
a megabyte for a raster of 20,000 x 20,000. Building it reads every label once, by the block; an image is never held
whole.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from in2nect.data.classes import Classes
from in2nect.data.coding import CodeLabels
from in2nect.data.scenes import Pair, read_label
from in2nect.data.windows import RasterCache, Window, block_shape
from in2nect.files import cache_folder, replacing

Method = Literal["uniform", "balanced", "dominance"]
CELL = 128
"""Side of a cell, in pixels; the pixels of one are counted in 16 bits, so 255 is the most."""

_FORMAT = 1  # of the file, part of its name
_CHUNK = 8192  # pixels of a label's row that are read at a time: with 1,024 rows, 8 MiB
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Sampling:
    """Where crops are taken.

    Args:
        method: `uniform`: every pixel is about equally likely to be seen. `balanced`: a class is drawn first, each
            that occurs as likely as another, then one of its pixels, then a crop that shows that pixel. `dominance`:
            drawn as `uniform`, and drawn again while one class has too large a share of the labelled pixels.
        limit: for `dominance`, the largest share that one class may have, above 0 and at most 1.
        tries: for `dominance`, how many places are looked at in all; if none will do, the one with the smallest such
            share is taken.
    """

    method: Method = "uniform"
    limit: float = 0.75
    tries: int = 10

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"sampling: {self.method!r}; expected one of {', '.join(get_args(Method))}")
        if not 0 < self.limit <= 1:
            raise ValueError(
                f"dominance_limit: {self.limit}; expected a share above 0 and at most 1 (0.75 lets a class have three "
                "quarters of a crop)"
            )
        if self.tries < 1:
            raise ValueError(f"dominance_tries: {self.tries}; expected at least 1")


@dataclass(frozen=True)
class Cell:
    """A cell of an image in which a class occurs: (row, col, height, width) in pixels, cut off at the image's edge."""

    image: int
    code: int
    window: Window


class LabelIndex:
    """Which classes lie where.

    Args:
        sizes: (height, width) of the images.
        counts: (cells, K) uint16: the images' cells one after the other, each image's in reading order.
    """

    def __init__(self, sizes: list[tuple[int, int]], counts: NDArray[np.uint16]) -> None:
        self.sizes, self.counts = sizes, counts
        self._first = np.cumsum([0, *(_cells(height) * _cells(width) for height, width in sizes)])
        self._occupied = [np.flatnonzero(column) for column in counts.T]
        self._below = [np.cumsum(column[cells], dtype=np.int64) for column, cells in zip(counts.T, self._occupied)]
        self.present = [code for code, cells in enumerate(self._occupied) if cells.size]
        """The classes that occur."""
        if not self.present:
            raise ValueError(
                f"not one labelled pixel in {len(sizes)} labels; there is no class to draw: check the labels, or set "
                "sampling to uniform"
            )

    @property
    def pixels(self) -> list[int]:
        """Pixels of each class."""
        return [int(below[-1]) if below.size else 0 for below in self._below]

    def draw(self, rng: np.random.Generator) -> Cell:
        """One of the classes that occur, and a cell of it with probability proportional to its pixels of the class."""
        code = self.present[int(rng.integers(len(self.present)))]
        below = self._below[code]
        cell = int(self._occupied[code][np.searchsorted(below, rng.integers(below[-1]), side="right")])
        image = int(np.searchsorted(self._first, cell, side="right")) - 1
        height, width = self.sizes[image]
        row, col = divmod(cell - int(self._first[image]), _cells(width))
        row, col = row * CELL, col * CELL
        return Cell(image, code, (row, col, min(CELL, height - row), min(CELL, width - col)))

    @classmethod
    def of(cls, pairs: list[Pair], classes: Classes) -> LabelIndex:
        """The index of these labels: read from the cache, or built and put there.

        The cache is a folder: IN2NECT_CACHE, or in2nect in the user's folder of caches. A file is found by the paths,
        sizes and times of change of all labels and by the number of classes, so a changed label is counted anew.

        Raises:
            ValueError: a label holds a code that is no class; no label holds a labelled pixel.
        """
        sizes = [(pair.height, pair.width) for pair in pairs]
        path = cached_at(pairs, classes)
        counts = _load(path, sum(_cells(height) * _cells(width) for height, width in sizes), classes.num_classes)
        if counts is None:
            counts = count_classes(pairs, classes)
            try:
                with replacing(path) as partial:
                    np.savez_compressed(partial, counts=counts)
            except OSError as error:
                warnings.warn(
                    f"{path}: cannot be written ({error}); the labels will be read through at every start. Set "
                    "IN2NECT_CACHE to a folder that can be written",
                    stacklevel=2,
                )
        return cls(sizes, counts)


def cached_at(pairs: list[Pair], classes: Classes) -> Path:
    """The file that the index of these labels is kept in."""
    parts: list[object] = [_FORMAT, CELL, classes.num_classes, classes.ignore_index]
    for pair in pairs:
        found = pair.label.stat()
        parts.append([str(pair.label.resolve()), found.st_size, found.st_mtime_ns, repr(pair.coding)])
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return cache_folder() / "labels" / f"{digest[:32]}.npz"


def count_classes(pairs: list[Pair], classes: Classes) -> NDArray[np.uint16]:
    """(cells, K): the pixels of each class in the cells of these labels; see `LabelIndex`."""
    rasters, codes = RasterCache(limit=1), CodeLabels(classes)
    found = []
    for pair in pairs:
        counts = np.zeros((_cells(pair.height), _cells(pair.width), classes.num_classes), np.uint16)
        rows = min(_CHUNK_ROWS, CELL * -(-block_shape(pair.label)[0] // CELL))  # each block is decoded once
        for row in range(0, pair.height, rows):
            for col in range(0, pair.width, _CHUNK):
                window = (row, col, min(rows, pair.height - row), min(_CHUNK, pair.width - col))
                label = read_label(rasters, pair, window, default=codes)
                part = _count_cells(label, classes.num_classes)
                down, right = row // CELL, col // CELL
                counts[down : down + part.shape[0], right : right + part.shape[1]] = part
        found.append(counts.reshape(-1, classes.num_classes))
    return np.concatenate(found)


def dominant_share(label: NDArray[np.uint8], ignore_index: int) -> float:
    """Share of the labelled pixels that the commonest class has; 1 where none is labelled."""
    counts = np.bincount(label.ravel(), minlength=256)
    counts[ignore_index] = 0
    total = int(counts.sum())
    return int(counts.max()) / total if total else 1.0


def _count_cells(label: NDArray[np.uint8], num_classes: int) -> NDArray[np.uint16]:
    """(rows of cells, columns of cells, K) of a piece that begins at a cell's corner."""
    height, width = label.shape
    rows, cols = np.arange(0, height, CELL), np.arange(0, width, CELL)
    counts = np.empty((len(rows), len(cols), num_classes), np.uint16)
    for code in range(num_classes):
        across = np.add.reduceat((label == code).view(np.uint8), cols, axis=1, dtype=np.uint16)
        counts[..., code] = np.add.reduceat(across, rows, axis=0, dtype=np.uint16)
    return counts


def _load(path: Path, cells: int, num_classes: int) -> NDArray[np.uint16] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            counts = stored["counts"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return counts if counts.shape == (cells, num_classes) and counts.dtype == np.uint16 else None


def _cells(length: int) -> int:
    return -(-length // CELL)
