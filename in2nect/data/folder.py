"""The folder data set's layout: images/, labels/ and split.csv, paired by file stem and checked from the files'
headers.

`split.csv` has the columns `image` and `split` (train, val or test); an image is a path below the root, a file name
or a bare stem in `images/`. Its label is the single-band uint8 raster of the same stem in `labels/`. Other columns
are left alone. One header read a file.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from in2nect.data.scenes import Pair, Reading, Scene, examine, problem_error
from in2nect.files import read_text

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".tif", ".tiff", ".jpg", ".jpeg", ".png")
LABEL_SUFFIXES = (".tif", ".tiff", ".png")


def split_images(root: str | os.PathLike[str], split: str, images: str = "images") -> list[Path]:
    """The images `split.csv` assigns to a split, in its order. Labels are neither needed nor looked at.

    Raises:
        FileNotFoundError: no `split.csv`, or an image in it that is not in `images/`.
        ValueError: a split other than train, val, test; an image listed twice; or no image in the split asked for.
    """
    return _assigned(Path(root), split, images, strict=True)


def split_names(root: str | os.PathLike[str]) -> set[str]:
    """The splits that `split.csv` assigns images to.

    Raises:
        FileNotFoundError: no `split.csv`.
        ValueError: a `split.csv` without the columns image and split.
    """
    return {name for _, _, name in _split_rows(Path(root) / "split.csv")}


def split_scenes(
    root: str | os.PathLike[str], split: str, *, images: str = "images", labels: str = "labels"
) -> list[Scene]:
    """The images of a split with the labels they should have; no raster is opened, and an image that `split.csv` names
    and that is not there comes under the name it should have.

    Raises:
        FileNotFoundError, ValueError: as `split_images`, missing images aside.
    """
    root = Path(root)
    folder = root / labels
    found = by_stem(folder, LABEL_SUFFIXES)
    hint = "with one of " + ", ".join(LABEL_SUFFIXES) + ". Add it, or take the image out of split.csv"
    return [
        Scene(
            image.stem,
            image,
            found.get(image.stem, folder / f"{image.stem}{LABEL_SUFFIXES[0]}"),
            label_hint=f"expected {folder / image.stem} {hint}",
        )
        for image in _assigned(root, split, images, strict=False)
    ]


def split_pairs(root: str | os.PathLike[str], split: str) -> list[Pair]:
    """The images of a split with their labels, every header checked; labels hold class codes.

    Raises:
        FileNotFoundError: as `split_images`, or an image without a label.
        ValueError: as `split_images`; a label of another size than its image; a raster that is not uint8, a label
            with more than one band, or images that differ in their number of bands.
    """
    split_images(root, split)
    pairs, problems = examine(split_scenes(root, split), Reading())
    if problems:
        raise problem_error(problems)
    return pairs


def by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder that have one of these suffixes, by stem.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: two files of one stem.
    """
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


def _assigned(root: Path, split: str, folder: str, *, strict: bool) -> list[Path]:
    """As `split_images`; where not `strict`, an image that is missing comes under the name it should have."""
    table = root / "split.csv"
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    images = by_stem(root / folder, IMAGE_SUFFIXES)
    chosen: list[Path] = []
    first_line: dict[Path, int] = {}
    for line, entry, name in _split_rows(table):
        if name not in SPLITS:
            raise ValueError(f"{table}, line {line}: split {name!r}; expected one of {', '.join(SPLITS)}")
        image = _find_image(images, entry)
        if image is None and not strict:
            image = root / folder / Path(entry).name
        if image is None:
            raise FileNotFoundError(
                f"{table}, line {line}: {entry}: no such image in {root / folder} "
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


def _split_rows(table: Path) -> list[tuple[int, str, str]]:
    """(line number, image, split) of every row."""
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: missing; write one with the columns image,split (split: {', '.join(SPLITS)})"
        )
    reader = csv.DictReader(io.StringIO(read_text(table)))
    missing = [column for column in ("image", "split") if column not in (reader.fieldnames or [])]
    if missing:
        raise ValueError(
            f"{table}: no column {' or '.join(missing)}; its first line reads {','.join(reader.fieldnames or [])!r}, "
            "expected at least image,split, with commas"
        )
    return [(reader.line_num, (row["image"] or "").strip(), (row["split"] or "").strip()) for row in reader]


def _find_image(images: dict[str, Path], entry: str) -> Path | None:
    name = Path(entry).name
    by_name = images.get(Path(name).stem)
    return by_name if by_name is not None and by_name.name == name else images.get(name)
