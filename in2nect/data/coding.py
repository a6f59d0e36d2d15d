"""What label files hold, and the class codes it stands for: shifted codes (LoveDA) or colours (ISPRS).

One table look-up a pixel in both: 256 entries for codes, 2^24 for colours packed as red << 16 | green << 8 | blue,
so that no pass over the pixels is made a class. A value without a meaning is an error, never a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import RasterioIOError

from in2nect.data.classes import Classes, Color
from in2nect.data.windows import open_raster

Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class CodeLabels:
    """Labels of one band, in which file value v is class v - `first`.

    Args:
        first: the file value of the first class; 1 for LoveDA, 0 for files that hold the codes themselves.
        ignored: file values that become `classes.ignore_index`; None for that code itself.
        unknown: `error`, or `ignore`, which makes every other value an ignored pixel.
    """

    classes: Classes
    first: int = 0
    ignored: tuple[int, ...] | None = None
    unknown: Literal["error", "ignore"] = "error"
    bands = (1,)
    """How many bands a label file may have."""

    def __call__(self, raw: NDArray[Any], path: Path) -> Codes:
        """Class codes (height, width) of what was read from `path`, (1, height, width).

        Raises:
            ValueError: naming the file, the values, on how many pixels they are and one of those.
        """
        codes, known = _code_tables(self.classes.num_classes, self.classes.ignore_index, self.first, self._ignored)
        values = raw[0]
        if self.unknown == "error" and not known[values].all():
            raise ValueError(_describe(path, lambda block: ~known[block[0]], lambda pixel: f"code {pixel[0]}", self))
        return codes[values]

    @property
    def _ignored(self) -> tuple[int, ...]:
        return (self.classes.ignore_index,) if self.ignored is None else self.ignored

    def __str__(self) -> str:
        last = self.first + self.classes.num_classes - 1
        ignored = " or ".join(str(value) for value in self._ignored)
        return f"{self.first}..{last} ({', '.join(self.classes.names)}) or {ignored} for ignored pixels"


@dataclass(frozen=True)
class ColorLabels:
    """Labels of three bands (a fourth, alpha, is not looked at) that hold the classes' colours.

    Args:
        ignored: colours that become `classes.ignore_index`.
        unknown: `error`, or `ignore`, which makes every other colour an ignored pixel.
    """

    classes: Classes
    ignored: tuple[Color, ...] = ((0, 0, 0),)
    unknown: Literal["error", "ignore"] = "error"
    bands = (3, 4)
    """How many bands a label file may have."""

    def __call__(self, raw: NDArray[Any], path: Path) -> Codes:
        """Class codes (height, width) of what was read from `path`, (3 or 4, height, width).

        Raises:
            ValueError: naming the file, the colours, on how many pixels they are and one of those.
        """
        table, none = _color_table(self.classes, self.ignored)
        codes = table[_packed(raw)]
        foreign = codes == none
        if foreign.any():
            if self.unknown == "error":
                raise ValueError(
                    _describe(path, lambda block: table[_packed(block)] == none, lambda pixel: _color(pixel[:3]), self)
                )
            codes[foreign] = self.classes.ignore_index
        return codes

    def __str__(self) -> str:
        named = [f"{_color(color)} {name}" for name, color in zip(self.classes.names, self.classes.colors, strict=True)]
        return "; ".join([*named, *(f"{_color(color)} ignored" for color in self.ignored)])


LabelCoding = CodeLabels | ColorLabels


@lru_cache(maxsize=4)
def _code_tables(num_classes: int, ignore_index: int, first: int, ignored: tuple[int, ...]) -> tuple[Codes, Any]:
    """(code of each of 256 file values, whether it has a meaning)."""
    codes, known = np.full(256, ignore_index, dtype=np.uint8), np.zeros(256, dtype=bool)
    codes[first : first + num_classes] = np.arange(num_classes)
    known[first : first + num_classes] = True
    codes[list(ignored)], known[list(ignored)] = ignore_index, True
    return codes, known


@lru_cache(maxsize=2)
def _color_table(classes: Classes, ignored: tuple[Color, ...]) -> tuple[Codes, int]:
    """(code of every colour, 16 MiB; the code that stands for none)."""
    meaning: dict[Color, str] = {}
    for name, color in [*zip(classes.names, classes.colors, strict=True), *((None, color) for color in ignored)]:
        name = name or "ignored"
        if meaning.setdefault(color, name) != name:
            raise ValueError(
                f"colour {_color(color)} means both {meaning[color]} and {name}; give every class, and what is "
                "ignored, a colour of its own"
            )
    free = [code for code in range(255, classes.num_classes - 1, -1) if code != classes.ignore_index]
    if not free:
        raise ValueError(f"{classes.num_classes} classes as colours; expected at most 254")
    table = np.full(1 << 24, free[0], dtype=np.uint8)
    colors = np.array([*classes.colors, *ignored], dtype=np.uint8).reshape(-1, 3, 1)
    codes = [*range(classes.num_classes), *[classes.ignore_index] * len(ignored)]
    for row, code in zip(colors, codes, strict=True):
        table[_packed(row)] = code
    return table, free[0]


def _packed(raw: NDArray[Any]) -> NDArray[np.uint32]:
    packed = raw[0].astype(np.uint32)
    for band in raw[1:3]:
        packed <<= 8
        packed |= band
    return packed


def _color(values: Any) -> str:
    return f"({', '.join(str(int(value)) for value in values)})"


def _describe(path: Path, foreign: Any, name: Any, expected: LabelCoding) -> str:
    """Reads a whole file to say which values in it have no meaning; of each, how many pixels and the first one."""
    pixels: dict[tuple[int, ...], int] = {}
    first: dict[tuple[int, ...], tuple[int, int]] = {}
    with open_raster(path) as source:
        for _, window in source.block_windows(1):
            try:
                block = source.read(window=window)
            except RasterioIOError as error:  # what was read of it before was made up
                raise OSError(
                    f"{path}: damaged or cut short ({error.__cause__ or error}); fetch it anew, or take it out"
                ) from (error.__cause__ or error)
            rows, cols = np.nonzero(foreign(block))
            if not len(rows):
                continue
            values, at, counts = np.unique(block[:, rows, cols], axis=1, return_index=True, return_counts=True)
            for value, position, count in zip(values.T.tolist(), at, counts, strict=True):
                key = tuple(value)
                pixels[key] = pixels.get(key, 0) + int(count)
                place = int(window.row_off + rows[position]), int(window.col_off + cols[position])
                first[key] = min(first.get(key, place), place)
    most = sorted(pixels, key=lambda key: -pixels[key])
    found = "; ".join(
        f"{name(key)} on {pixels[key]} pixel{'s' if pixels[key] > 1 else ''}, one at row {first[key][0]}, "
        f"column {first[key][1]}"
        for key in most[:5]
    )
    more = f"; and {len(most) - 5} other values" if len(most) > 5 else ""
    return (
        f"{path}: {found}{more}. Expected {expected}. Mend the label, or give the classes it was drawn with; "
        "data.layout.unknown_labels=ignore leaves such pixels out"
    )
