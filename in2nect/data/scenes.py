"""A scene is the files of one image; a pair is a labelled scene whose headers fit together; a problem says in words
what is wrong with a file.

`examine` opens headers alone, a millisecond a file; what is in the pixels shows when they are read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import RasterioIOError

from in2nect.data.coding import CodeLabels, ColorLabels, LabelCoding
from in2nect.data.windows import RasterCache, open_raster, quiet_without_georeference

Kind = Literal["missing", "empty", "unreadable", "size", "type", "bands", "label"]
_OPENING = 8  # threads: what opening a file costs is waiting for the disk


@dataclass(frozen=True)
class Scene:
    """The files of one image, as a data set names them; they need not be there.

    Args:
        name: of the scene, unique within its split.
        label: None where the data set has no label for it.
        elevation: a raster that becomes the last band; None for none.
        label_hint: what to say of a label that is missing, besides its path.
    """

    name: str
    image: Path
    label: Path | None
    elevation: Path | None = None
    label_hint: str = ""


@dataclass(frozen=True)
class Pair:
    """An image and its label raster, both (height, width) pixels.

    Args:
        coding: what the label file holds; None for the class codes themselves.
        bands: 1-based bands of the image, in the order the network takes them; None for all.
        elevation: a raster of one band that becomes the last channel, mapped to 0..255 from `elevation_range` unless
            it is uint8 already.
    """

    name: str
    image: Path
    label: Path
    height: int
    width: int
    coding: LabelCoding | None = None
    bands: tuple[int, ...] | None = None
    elevation: Path | None = None
    elevation_range: tuple[float, float] = (0.0, 255.0)


@dataclass(frozen=True)
class Reading:
    """How the scenes of a data set are read: see `Pair`."""

    coding: LabelCoding | None = None
    bands: tuple[int, ...] | None = None
    elevation_range: tuple[float, float] = (0.0, 255.0)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file: its message names the file, what was found, what was expected and what to do."""

    path: Path
    kind: Kind
    message: str


def read_image(
    rasters: RasterCache, pair: Pair, window: tuple[int, int, int, int], shape: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """The bands of a pair's window (row, col, height, width) as (C, height, width) uint8; see `RasterCache.read`."""
    image = rasters.read(pair.image, window, shape, nearest=False, bands=pair.bands)
    if pair.elevation is None:
        return image
    elevation = rasters.read(pair.elevation, window, shape, nearest=False, bands=(1,))
    return np.concatenate([image, as_bytes(elevation, pair.elevation_range)])


def read_label(
    rasters: RasterCache,
    pair: Pair,
    window: tuple[int, int, int, int],
    shape: tuple[int, int] | None = None,
    *,
    default: CodeLabels,
) -> NDArray[np.uint8]:
    """The class codes of a pair's window as (height, width) uint8, picked by nearest neighbour.

    Args:
        default: how labels are read of pairs that say nothing about it.

    Raises:
        ValueError: a value that stands for no class, as the coding tells it.
    """
    return (pair.coding or default)(rasters.read(pair.label, window, shape, nearest=True), pair.label)


def as_bytes(elevation: NDArray[np.generic], limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Heights mapped from `limits` to 0..255 and clipped there; uint8 as it is; not-a-number becomes 0."""
    if elevation.dtype == np.uint8:
        return elevation  # type: ignore[return-value]
    low, high = limits
    scaled = (elevation.astype(np.float32) - low) * (255 / (high - low))
    return np.nan_to_num(np.clip(scaled, 0, 255)).round().astype(np.uint8)


def examine(scenes: Sequence[Scene], reading: Reading) -> tuple[list[Pair], list[Problem]]:
    """The scenes whose files are there, can be opened and fit together, as pairs in the same order; and what is wrong
    with the others. Scenes without a label are neither.
    """
    with quiet_without_georeference(), ThreadPoolExecutor(_OPENING) as pool:
        found = list(pool.map(lambda scene: examine_scene(scene, reading), scenes))
    problems = [problem for _, _, problems in found for problem in problems]
    if reading.bands is None:
        problems += mixed_bands((pair.image, count) for pair, count, _ in found if pair is not None)
    odd = {problem.path for problem in problems}
    return [pair for pair, _, _ in found if pair is not None and pair.image not in odd], problems


def examine_scene(scene: Scene, reading: Reading) -> tuple[Pair | None, int, list[Problem]]:
    """(the pair or None, bands of the image, what is wrong), from the headers of one scene."""
    problems: list[Problem] = []
    image = _Header.of(scene.image, problems, "image")
    count = 0
    if image is not None:
        count = image.count
        _check_image(scene.image, image, reading.bands, problems)
    if scene.label is None:
        label = None
    elif not scene.label.exists() and image is not None:
        expected = scene.label_hint or f"expected {scene.label}; add it, or take the image out of the split"
        problems.append(Problem(scene.label, "missing", f"{scene.image}: no label; {expected}"))
        label = None
    else:
        label = _Header.of(scene.label, problems, "label")
    if label is not None and scene.label is not None:
        _check_label(scene.label, label, reading.coding, problems)
        _check_size(scene.label, label, scene.image, image, problems)
    if scene.elevation is not None:
        elevation = _Header.of(scene.elevation, problems, "elevation")
        if elevation is not None:
            _check_size(scene.elevation, elevation, scene.image, image, problems)
    if problems or image is None or scene.label is None:
        return None, count, problems
    pair = Pair(
        scene.name,
        scene.image,
        scene.label,
        image.height,
        image.width,
        reading.coding,
        reading.bands,
        scene.elevation,
        reading.elevation_range,
    )
    return pair, count, []


def mixed_bands(images: Iterable[tuple[Path, int]]) -> list[Problem]:
    """The images, given with their number of bands (0: not known), that have another number than most."""
    known = [(path, count) for path, count in images if count]
    (usual, _), *others = Counter(count for _, count in known).most_common() or [(0, 0)]
    if not others:
        return []
    mend = "give all of them the same bands, or choose those to read with data.bands"
    return [
        Problem(path, "bands", f"{path}: {count} bands, where most images have {usual}; {mend}")
        for path, count in known
        if count != usual
    ]


@contextmanager
def telling(path: Path, problems: list[Problem]) -> Iterator[None]:
    """Turns what a file that is read through raises into a problem that names it."""
    try:
        yield
    except ValueError as error:  # of a coding, which names the file
        problems.append(Problem(path, "label", str(error)))
    except (RasterioIOError, OSError) as error:
        reason = str(error.__cause__ or error).replace(f"{path}: ", "").strip().rstrip(".")
        message = f"{path}: damaged or cut short ({reason}); fetch it anew, or take it out"
        problems.append(Problem(path, "unreadable", message))


def band_count(path: Path) -> int:
    """How many bands a raster has."""
    with open_raster(path) as source:
        return int(source.count)


def problem_error(problems: Sequence[Problem], more: str = "") -> ValueError | FileNotFoundError:
    """One error that lists problems, at most twenty of them; `more` says how to see or get round them."""
    shown = [problem.message for problem in problems[:20]]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    text = shown[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} files are not usable:", *shown])
    kinds = {problem.kind for problem in problems}
    return (FileNotFoundError if kinds == {"missing"} else ValueError)(f"{text}{more}")


@dataclass(frozen=True)
class _Header:
    count: int
    height: int
    width: int
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, problems: list[Problem], what: str) -> _Header | None:
        """The header of a file; None, with a problem added, where it has none."""
        try:
            if os.stat(path).st_size == 0:
                problems.append(Problem(path, "empty", f"{path}: 0 bytes; fetch the {what} anew, or take it out"))
                return None
            with open_raster(path) as source:
                header = cls(source.count, source.height, source.width, source.dtypes)
                if source.driver != "PNG" or _png_ends(path):
                    return header
            message = f"{path}: cut short (a PNG without its end); fetch the {what} anew, or take it out"
            problems.append(Problem(path, "unreadable", message))
        except FileNotFoundError:
            message = f"{path}: no such {what}; add it, or take it out of the split"
            problems.append(Problem(path, "missing", message))
        except (RasterioIOError, OSError) as error:
            problems.append(Problem(path, "unreadable", _unreadable(path, error)))
        return None


def _png_ends(path: Path) -> bool:
    """Whether a PNG has its last chunk. GDAL decodes a whole PNG in one go, and where the file is cut short hands out
    what it has, without an error.
    """
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4096))  # some programs append a little of their own
        return b"IEND\xaeB`\x82" in stream.read()


def _unreadable(path: Path, error: Exception) -> str:
    reason = str(error).replace(f"'{path}' ", "").replace(f"{path}: ", "").replace(str(path), "it").strip().rstrip(".")
    return f"{path}: cannot be opened as a raster ({reason}); fetch the file anew, or take it out"


def _check_image(path: Path, header: _Header, bands: tuple[int, ...] | None, problems: list[Problem]) -> None:
    _check_bytes(path, header, problems, "rescale it to 0..255 first")
    if bands is not None and max(bands) > header.count:
        message = f"{path}: {header.count} bands, and data.bands asks for band {max(bands)}; choose among those it has"
        problems.append(Problem(path, "bands", message))


def _check_label(path: Path, header: _Header, coding: LabelCoding | None, problems: list[Problem]) -> None:
    _check_bytes(path, header, problems, "write the label's codes or colours as bytes")
    if header.count not in (CodeLabels.bands if coding is None else coding.bands):
        expected = (
            "one band of class codes (data.layout.label_values=colors reads colours)"
            if not isinstance(coding, ColorLabels)
            else "three bands of colours (data.layout.label_values=codes reads class codes)"
        )
        message = f"{path}: {header.count} band{'s' if header.count > 1 else ''}; expected {expected}"
        problems.append(Problem(path, "bands", message))


def _check_bytes(path: Path, header: _Header, problems: list[Problem], mend: str) -> None:
    foreign = sorted({dtype for dtype in header.dtypes if dtype != "uint8"})
    if foreign:
        message = f"{path}: {', '.join(foreign)} values; expected uint8: {mend}"
        problems.append(Problem(path, "type", message))


def _check_size(path: Path, header: _Header, image: Path, of: _Header | None, problems: list[Problem]) -> None:
    if of is not None and (header.height, header.width) != (of.height, of.width):
        message = (
            f"{path}: {header.height} x {header.width} pixels (height x width), but its image {image} has "
            f"{of.height} x {of.width}; bring both onto one pixel grid"
        )
        problems.append(Problem(path, "size", message))
