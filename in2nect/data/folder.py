"""The folder data set's layout: images/, labels/ and split.csv, paired by file stem and checked from the files'
headers.

`split.csv` has the columns `image` and `split` (train, val or test); an image is a path below the root, a file name
or a bare stem in `images/`. Its label is the single-band uint8 raster of the same stem in `labels/`. Other columns
are left alone. One header read a file.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from in2nect.data.classes import Classes
from in2nect.data.windows import open_raster

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".tif", ".tiff", ".jpg", ".jpeg", ".png")
LABEL_SUFFIXES = (".tif", ".tiff", ".png")


@dataclass(frozen=True)
class Pair:
    """An image and its label raster, both (height, width) pixels."""

    name: str
    image: Path
    label: Path
    height: int
    width: int


def split_images(root: str | os.PathLike[str], split: str) -> list[Path]:
    """The images `split.csv` assigns to a split, in its order. Labels are neither needed nor looked at.

    Raises:
        FileNotFoundError: no `split.csv`, or an image in it that is not in `images/`.
        ValueError: a split other than train, val, test; an image listed twice; or no image in the split asked for.
    """
    root, table = Path(root), Path(root) / "split.csv"
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    images = _by_stem(root / "images", IMAGE_SUFFIXES)
    chosen: list[Path] = []
    first_line: dict[Path, int] = {}
    for line, entry, name in _split_rows(table):
        if name not in SPLITS:
            raise ValueError(f"{table}, line {line}: split {name!r}; expected one of {', '.join(SPLITS)}")
        image = _find_image(images, entry)
        if image is None:
            raise FileNotFoundError(
                f"{table}, line {line}: {entry}: no such image in {root / 'images'} "
                f"(looked for {', '.join(IMAGE_SUFFIXES)}); add the image or take the line out"
            )
        if image in first_line:
            raise ValueError(f"{table}, lines {first_line[image]} and {line}: both list {image.name}; keep one of them")
        first_line[image] = line
        if name == split:
            chosen.append(image)
    if not chosen:
        raise ValueError(f"{table}: no image in split {split!r} among {len(first_line)} lines; assign at least one")
    return chosen


def split_names(root: str | os.PathLike[str]) -> set[str]:
    """The splits that `split.csv` assigns images to.

    Raises:
        FileNotFoundError: no `split.csv`.
        ValueError: a `split.csv` without the columns image and split.
    """
    return {name for _, _, name in _split_rows(Path(root) / "split.csv")}


def split_pairs(root: str | os.PathLike[str], split: str) -> list[Pair]:
    """The images of a split with their labels, every header checked.

    Raises:
        FileNotFoundError: as `split_images`, or an image without a label.
        ValueError: as `split_images`; a label of another size than its image; a raster that is not uint8, a label
            with more than one band, or images that differ in their number of bands.
    """
    labels_folder = Path(root) / "labels"
    labels = _by_stem(labels_folder, LABEL_SUFFIXES)
    pairs: list[Pair] = []
    bands: dict[int, Path] = {}
    for image in split_images(root, split):
        if image.stem not in labels:
            raise FileNotFoundError(
                f"{image}: no label; expected {labels_folder / image.stem} with one of {', '.join(LABEL_SUFFIXES)}. "
                "Add it, or take the image out of split.csv"
            )
        label = labels[image.stem]
        count, height, width = _header(image)
        label_count, *label_size = _header(label)
        if label_size != [height, width]:
            raise ValueError(
                f"{label}: {label_size[0]} x {label_size[1]} pixels (height x width), but its image {image} has "
                f"{height} x {width}; bring both onto one pixel grid"
            )
        if label_count != 1:
            raise ValueError(
                f"{label}: {label_count} bands; expected one band of class codes (convert colours to codes)"
            )
        bands.setdefault(count, image)
        pairs.append(Pair(image.stem, image, label, height, width))
    if len(bands) > 1:
        found = ", ".join(f"{path} has {count}" for count, path in sorted(bands.items()))
        raise ValueError(f"images differ in their number of bands: {found}; give all of them the same bands")
    return pairs


class LabelCheck:
    """Refuses label codes that are neither a class nor the ignored code. One table look-up a pixel."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self._foreign = np.ones(256, dtype=bool)
        self._foreign[: classes.num_classes] = False
        self._foreign[classes.ignore_index] = False

    def __call__(self, label: NDArray[np.uint8], path: Path) -> None:
        """Check a window (height, width) that was read from `path`.

        Raises:
            ValueError: naming the file, the code, how many pixels of the file carry it, and one of them.
        """
        if self._foreign[label].any():
            raise ValueError(self._describe(path))

    def _describe(self, path: Path) -> str:
        counts = np.zeros(256, dtype=np.int64)
        first: dict[int, tuple[int, int]] = {}
        with open_raster(path) as source:
            for _, window in source.block_windows(1):
                block = source.read(1, window=window)
                counts += np.bincount(block.ravel(), minlength=256)
                for code in np.unique(block[self._foreign[block]]).tolist():
                    row, col = np.argwhere(block == code)[0]
                    first.setdefault(code, (int(window.row_off + row), int(window.col_off + col)))
        found = "; ".join(
            f"code {code} on {counts[code]} pixel{'s' if counts[code] > 1 else ''}, one at row {row}, column {col}"
            for code, (row, col) in sorted(first.items())[:5]
        )
        return (
            f"{path}: {found}. Expected 0..{self.classes.num_classes - 1} ({', '.join(self.classes.names)}) or "
            f"{self.classes.ignore_index} for ignored pixels; recode the label, or give the classes it was drawn with"
        )


def _split_rows(table: Path) -> list[tuple[int, str, str]]:
    """(line number, image, split) of every row."""
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: missing; write one with the columns image,split (split: {', '.join(SPLITS)})"
        )
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        missing = [column for column in ("image", "split") if column not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(
                f"{table}: no column {' or '.join(missing)}; its first line reads {reader.fieldnames}, "
                "expected at least image,split"
            )
        return [(reader.line_num, (row["image"] or "").strip(), (row["split"] or "").strip()) for row in reader]


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a folder data set has images/, labels/ and split.csv")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            raise ValueError(f"{found[path.stem]} and {path}: one stem, two files; keep one of them")
        found[path.stem] = path
    return found


def _find_image(images: dict[str, Path], entry: str) -> Path | None:
    name = Path(entry).name
    by_name = images.get(Path(name).stem)
    return by_name if by_name is not None and by_name.name == name else images.get(name)


def _header(path: Path) -> tuple[int, int, int]:
    """(bands, height, width)."""
    with open_raster(path) as source:
        foreign = sorted({dtype for dtype in source.dtypes if dtype != "uint8"})
        if foreign:
            raise ValueError(f"{path}: {', '.join(foreign)} values; expected uint8 (rescale images to 0..255 first)")
        return source.count, source.height, source.width
