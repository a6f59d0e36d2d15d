"""Rasters read by the window: a per-process cache of open files, and the evaluation grid in which every pixel has one
owner.

A read touches the blocks under its window and nothing else; the grid costs O(number of windows).
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterWindow

Window = tuple[int, int, int, int]
"""(row, col, height, width) in pixels."""

BLOCK_CACHE = 128
"""MiB of decoded blocks that GDAL keeps in each process: its own choice, a twentieth of the machine's memory, is too
much where there are many workers, and crops at random places seldom meet a block again."""

_PIXELS = 1_000_000  # of `bands_of_rows`

os.environ.setdefault("GDAL_CACHEMAX", str(BLOCK_CACHE))  # GDAL looks when it first reads; a user's own choice stands


@dataclass(frozen=True)
class Span:
    """A window along one axis, [start, start + size), and the part it scores, [own_start, own_stop), in pixels."""

    start: int
    size: int
    own_start: int
    own_stop: int


@dataclass(frozen=True)
class GridWindow:
    """One window of the evaluation grid: its rows and its columns."""

    rows: Span
    cols: Span

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.rows.size, self.cols.size


def axis_spans(length: int, window: int, overlap: int) -> list[Span]:
    """Cover [0, length) with windows of one size that overlap by at least `overlap`; the last is shifted back.

    Neighbours meet in the middle of what they share, so the owned parts partition the axis. An axis shorter than
    `window` has one span, as long as the axis.

    Raises:
        ValueError: `window` is not positive, or `overlap` is not in 0..window-1.
    """
    if window < 1 or not 0 <= overlap < window:
        raise ValueError(
            f"window {window} with overlap {overlap}; expected a window >= 1 and an overlap in 0..window-1"
        )
    if length <= window:
        return [Span(0, length, 0, length)]
    starts = [*range(0, length - window, window - overlap), length - window]
    meets = [(start + window + following) // 2 for start, following in pairwise(starts)]
    own = [0, *meets, length]
    return [Span(start, window, own[i], own[i + 1]) for i, start in enumerate(starts)]


def grid_windows(height: int, width: int, window: int, overlap: int) -> list[GridWindow]:
    """The evaluation grid of an image of (height, width) pixels, in reading order; see `axis_spans`."""
    columns = axis_spans(width, window, overlap)
    return [GridWindow(rows, cols) for rows in axis_spans(height, window, overlap) for cols in columns]


def open_raster(path: str | os.PathLike[str]) -> DatasetReader:
    """Open a raster at full resolution (no overview stands in for it), quietly where it has no georeference."""
    with quiet_without_georeference():
        return rasterio.open(path, OVERVIEW_LEVEL="NONE")


def transform_of(path: str | os.PathLike[str]) -> rasterio.Affine:
    """A raster's transform, the identity where it has none: a handle of `open_raster` then holds whatever was in
    memory, because GDAL's view of one overview level does not fill it in.
    """
    with quiet_without_georeference(), rasterio.open(path) as source:
        return source.transform


@contextmanager
def quiet_without_georeference() -> Iterator[None]:
    """No warning of rasters without a georeference. Around threads that open rasters it must also stand outside: the
    filters of warnings belong to the process, and each thread puts back those that it found.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def block_shape(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of the blocks that a raster is stored in: its tiles or strips."""
    with open_raster(path) as source:
        height, width = source.block_shapes[0]
        return int(height), int(width)


def bands_of_rows(source: DatasetReader) -> Iterator[RasterWindow]:
    """Windows that cover a raster from top to bottom, each of whole blocks and about a million pixels (counting takes 8
    bytes of each).
    """
    block = max(height for height, _ in source.block_shapes)
    rows = max(block, _PIXELS // source.width // block * block)
    for row in range(0, source.height, rows):
        yield RasterWindow(0, row, source.width, min(rows, source.height - row))


class RasterCache:
    """Open rasters, at most `limit`, least recently used closed first.

    Handles belong to the process that opened them: a copy that was pickled or forked starts empty.
    """

    def __init__(self, limit: int = 128) -> None:
        self.limit = limit
        self._process = os.getpid()
        self._open: OrderedDict[Path, DatasetReader] = OrderedDict()

    def read(
        self,
        path: Path,
        window: Window,
        shape: tuple[int, int] | None = None,
        *,
        nearest: bool,
        bands: Sequence[int] | None = None,
    ) -> NDArray[Any]:
        """Read a window (row, col, height, width) in pixels, resampled to `shape` (height, width) if that differs.

        Args:
            nearest: nearest neighbour (labels) or, where it is false, bilinear with antialiasing (images).
            bands: 1-based bands in the order they are wanted; None for all.

        Returns:
            (bands, height, width) in the raster's own type: uint8, or that of an elevation.

        Raises:
            OSError: the file cannot be read there, naming it.
        """
        row, col, height, width = window
        source = self._get(path)
        indexes = list(bands or source.indexes)
        try:
            return source.read(
                indexes,
                window=RasterWindow(col, row, width, height),
                out_shape=(len(indexes), *(shape or (height, width))),
                resampling=Resampling.nearest if nearest else Resampling.bilinear,
            )
        except RasterioIOError as error:  # rasterio names neither the file nor the place
            raise OSError(
                f"{path}: rows {row} to {row + height}, columns {col} to {col + width} cannot be read "
                f"({error.__cause__ or error}); the file is damaged or cut short: fetch it anew, or take it out"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_process": -1, "_open": OrderedDict()}

    def _get(self, path: Path) -> DatasetReader:
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = open_raster(path)
            if len(self._open) > self.limit:
                self._open.popitem(last=False)[1].close()
        return self._open[path]
