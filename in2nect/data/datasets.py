"""Where the scenes of LoveDA, Vaihingen, Potsdam and of a folder of one's own lie, which split they belong to, and what
their labels hold.

Splits are text files, one entry a line, in `splits/`; a folder of the user's takes their place (`layout.splits`).
Nothing is opened here but those lists and folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from in2nect.data.classes import ISPRS, LOVEDA, Classes
from in2nect.data.coding import CodeLabels, ColorLabels, LabelCoding
from in2nect.data.folder import IMAGE_SUFFIXES, LABEL_SUFFIXES, SPLITS, by_stem, split_images, split_names, split_scenes
from in2nect.data.scenes import Reading, Scene
from in2nect.files import read_text

DatasetName = Literal["folder", "loveda", "vaihingen", "potsdam"]
_BELONGS_TO: dict[str, tuple[DatasetName, ...]] = {
    "domain": ("loveda",),
    "image_type": ("potsdam",),
    "eval_labels": ("vaihingen", "potsdam"),
    "eroded_labels": ("vaihingen", "potsdam"),
    "elevation": ("vaihingen",),
    "elevations": ("vaihingen",),
    "label_values": ("folder",),
    "ignored_colors": ("folder", "vaihingen", "potsdam"),
    "images": ("folder", "vaihingen", "potsdam"),
    "labels": ("folder", "vaihingen", "potsdam"),
}
"""The settings of a layout that only some data sets have."""
_ID_SUFFIXES = (".png", ".tif", ".tiff")  # as published, or as `in2nect data prepare` writes them


@dataclass(frozen=True)
class LayoutSettings:
    """What is chosen among the files of a data set. Folders are relative to the root, or absolute.

    Attributes:
        splits: folder with train.txt, val.txt and test.txt, one entry a line, in place of the published splits (and of
            split.csv); an entry is an area (Vaihingen: 30), a tile (Potsdam: 2_10), a folder or an image (LoveDA:
            Train/Urban, Train/Urban/1366), or an image's name (folder).
        train_on: train, or train+val: everything with labels, as for LoveDA's test server; no validation then.
        eval_labels: Vaihingen and Potsdam: score on eroded labels, as published figures are, or on full ones.
        domain: LoveDA: urban, rural or both.
        image_type: Potsdam: rgb (2_Ortho_RGB), irrg (3_Ortho_IRRG) or rgbir (4_Ortho_RGBIR, four bands).
        elevation: Vaihingen: add the surface model as a last band.
        elevation_range: heights that become 0 and 255, in metres; a file of uint8 stays as it is.
        label_values: what label files of a folder hold: codes (one band) or colors (three, those of the classes).
        ignored_colors: colours of pixels without a label, where labels are colours; null for black, unless it is the
            colour of a class.
        unknown_labels: a code or a colour that stands for nothing is an error, or leaves its pixel out (ignore).
        images: folder of the images, where it is not the published one.
        labels: folder of the labels, where it is not the published one.
        eroded_labels: folder of the eroded labels, where it is not the published one.
        elevations: folder of the surface models, where it is not the published one.
    """

    splits: str | None = None
    train_on: Literal["train", "train+val"] = "train"
    eval_labels: Literal["eroded", "full"] = "eroded"
    domain: Literal["both", "urban", "rural"] = "both"
    image_type: Literal["rgb", "irrg", "rgbir"] = "rgb"
    elevation: bool = False
    elevation_range: tuple[float, float] = (240.0, 380.0)
    label_values: Literal["codes", "colors"] = "codes"
    ignored_colors: list[tuple[int, int, int]] | None = None
    unknown_labels: Literal["error", "ignore"] = "error"
    images: str | None = None
    labels: str | None = None
    eroded_labels: str | None = None
    elevations: str | None = None

    def __post_init__(self) -> None:
        if not self.elevation_range[0] < self.elevation_range[1]:
            raise ValueError(
                f"layout.elevation_range: {list(self.elevation_range)}; expected the lower height first, then the upper"
            )


@dataclass(frozen=True)
class DataSet:
    """A data set in a folder: its scenes by split, how to read them, what their labels mean."""

    name: DatasetName
    root: Path
    classes: Classes
    reading: Reading
    layout: LayoutSettings
    _scenes: Callable[[str], list[Scene]]
    _images: Callable[[str], list[Path]]
    _splits: Callable[[], set[str]]

    def splits(self) -> set[str]:
        """The splits that have images; without val where a training takes that in."""
        without = {"val"} if self.layout.train_on == "train+val" else set()
        return self._splits() - without

    def scenes(self, split: str) -> list[Scene]:
        """The scenes of a split, in the order of its list; train holds those of val where `layout.train_on` says so.

        Raises:
            FileNotFoundError: a folder or a list that is not there.
            ValueError: an entry that is listed twice, or a split without any.
        """
        scenes = self._scenes(split)
        if split == "train" and self.layout.train_on == "train+val":
            scenes = scenes + self._scenes("val")
        return scenes

    def images(self, split: str) -> list[Path]:
        """The images of a split, all of which are there.

        Raises:
            FileNotFoundError, ValueError: as `scenes`; an image that is missing.
        """
        return self._images(split)


def open_dataset(
    name: DatasetName,
    root: str | os.PathLike[str],
    *,
    classes: str | os.PathLike[str] | None = None,
    bands: tuple[int, ...] | None = None,
    layout: LayoutSettings | None = None,
) -> DataSet:
    """A data set by its name; see `docs/data.md`.

    Args:
        classes: class file in place of the data set's own; root/classes.yaml for a folder where it is not given.
        bands: 1-based bands of the images, in the order the network takes them; None for all.

    Raises:
        FileNotFoundError: no such root or class file.
        ValueError: another name, or settings that do not fit it.
    """
    root, layout = Path(root), layout or LayoutSettings()
    if name not in get_args(DatasetName):
        raise ValueError(f"data.dataset: {name!r}; expected one of {', '.join(get_args(DatasetName))}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; data.root names the folder that holds the data set")
    if bands is not None and (not bands or min(bands) < 1):
        raise ValueError(f"data.bands: {list(bands)}; expected band numbers, counted from 1")
    for setting, names in _BELONGS_TO.items():
        if name not in names and getattr(layout, setting) != getattr(LayoutSettings(), setting):
            value = getattr(layout, setting)
            raise ValueError(
                f"data.layout.{setting}: {value!r}, with data.dataset {name}, which has no such choice; it is one of "
                f"{' and '.join(names)}"
            )
    own = classes_of(name, root, classes)
    reading = Reading(_coding(name, own, layout), bands, layout.elevation_range)
    if name == "folder" and layout.splits is None:
        images, labels = layout.images or "images", layout.labels or "labels"
        scenes = partial(split_scenes, root, images=images, labels=labels)
        return DataSet(
            name,
            root,
            own,
            reading,
            layout,
            scenes,
            partial(split_images, root, images=images),
            partial(split_names, root),
        )
    find = {"folder": _folder, "loveda": _loveda, "vaihingen": _vaihingen, "potsdam": _potsdam}[name]

    def listed(split: str) -> list[Scene]:
        path = _split_file(name, layout, split)
        entries = _entries(path)
        found = [scene for entry in entries for scene in find(root, layout, split, entry)]
        if not found:
            raise ValueError(f"{path}: no image in split {split!r} under {root}; expected at least one")
        return found

    return DataSet(
        name,
        root,
        own,
        reading,
        layout,
        listed,
        lambda split: _present([scene.image for scene in listed(split)]),
        lambda: {split for split in SPLITS if _split_file(name, layout, split).is_file()},
    )


def classes_of(
    name: DatasetName, root: str | os.PathLike[str] | None, given: str | os.PathLike[str] | None = None
) -> Classes:
    """The classes of a data set: those of the class file given, or its own.

    Raises:
        FileNotFoundError, ValueError: a folder without a class file, or as `Classes.from_yaml`.
    """
    if given is not None:
        return Classes.from_yaml(given)
    if name != "folder":
        return LOVEDA if name == "loveda" else ISPRS
    path = Path(root or ".") / "classes.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, and no other class file given; set `classes` to a YAML of classes")
    return Classes.from_yaml(path)


def _coding(name: DatasetName, classes: Classes, layout: LayoutSettings) -> LabelCoding:
    if name == "loveda":
        return CodeLabels(classes, first=1, ignored=(0,), unknown=layout.unknown_labels)
    if name == "folder" and layout.label_values == "codes":
        return CodeLabels(classes, unknown=layout.unknown_labels)
    black = () if (0, 0, 0) in classes.colors else ((0, 0, 0),)
    ignored = black if layout.ignored_colors is None else tuple((r, g, b) for r, g, b in layout.ignored_colors)
    return ColorLabels(classes, ignored, layout.unknown_labels)


def _split_file(name: DatasetName, layout: LayoutSettings, split: str) -> Path:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    folder = Path(__file__).parent / "splits" / name if layout.splits is None else Path(layout.splits)
    return folder / f"{split}.txt"


def _entries(path: Path) -> list[str]:
    """The lines of a split's list, without comments; each at most once, also over the lists beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list; data.layout.splits holds train.txt, val.txt and test.txt")
    found: dict[str, str] = {}
    for other in [path, *(path.with_name(f"{split}.txt") for split in SPLITS if f"{split}.txt" != path.name)]:
        if not other.is_file():
            continue
        for number, line in enumerate(read_text(other).splitlines(), 1):
            entry = line.split("#", 1)[0].strip()
            if entry in found:
                raise ValueError(
                    f"{other}, line {number}: {entry} is listed before, in {found[entry]}; keep one of them"
                )
            if entry:
                found[entry] = f"{other.name}, line {number}"
    return [entry for entry, place in found.items() if place.startswith(f"{path.name},")]


def _folder(root: Path, layout: LayoutSettings, split: str, entry: str) -> list[Scene]:
    images, labels = root / (layout.images or "images"), root / (layout.labels or "labels")
    name = Path(entry).name
    stem = Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name
    image = _one_of(images, [name] if stem != name else [f"{stem}{suffix}" for suffix in IMAGE_SUFFIXES])
    return [Scene(stem, image, _one_of(labels, [f"{stem}{suffix}" for suffix in LABEL_SUFFIXES]))]


def _loveda(root: Path, layout: LayoutSettings, split: str, entry: str) -> list[Scene]:
    folder, number = root / entry, None
    if not folder.is_dir():
        folder, number = folder.parent, Path(entry).stem
        folder = folder.parent if folder.name == "images_png" else folder
    if not (folder / "images_png").is_dir():
        places = [place for place in ("Urban", "Rural") if (folder / place).is_dir()]
        if number is not None or not places:
            raise FileNotFoundError(
                f"{root / entry}: no such folder of LoveDA; expected {root}/{{Train,Val,Test}}/{{Urban,Rural}}/"
                f"{{images_png,masks_png}} (`in2nect data download loveda --root {root}` fetches it)"
            )
        return [scene for place in places for scene in _loveda(root, layout, split, f"{entry}/{place}")]
    if layout.domain != "both" and folder.name.lower() != layout.domain:
        return []
    images, masks = folder / "images_png", folder / "masks_png"
    found = by_stem(images, _ID_SUFFIXES)
    labels = by_stem(masks, _ID_SUFFIXES) if masks.is_dir() else {}
    labelled = split != "test" or masks.is_dir()
    stems = sorted({*found, *labels}, key=_numeric) if number is None else [number]
    return [
        Scene(
            stem,
            found.get(stem, images / f"{stem}.png"),
            labels.get(stem, masks / f"{stem}.png") if labelled else None,
        )
        for stem in stems
    ]


def _vaihingen(root: Path, layout: LayoutSettings, split: str, entry: str) -> list[Scene]:
    stem = f"top_mosaic_09cm_area{entry}"
    images = _place(root, layout.images, ("top", "ISPRS_semantic_labeling_Vaihingen/top"))
    label, hint = _isprs_label(
        root,
        layout,
        split,
        f"{stem}.tif",
        f"{stem}_noBoundary.tif",
        (
            "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE",
            "gts_for_participants",
            "ISPRS_semantic_labeling_Vaihingen/gts_for_participants",
        ),
        ("ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE",),
    )
    elevation = None
    if layout.elevation:
        heights = _place(root, layout.elevations, ("dsm", "ISPRS_semantic_labeling_Vaihingen/dsm", "ndsm", "nDSM"))
        name = f"dsm_09cm_matching_area{entry}"
        elevation = _one_of(heights, [f"{name}.tif", f"{name}_normalized.jpg", f"{name}_normalized.tif"])
    return [Scene(stem, images / f"{stem}.tif", label, elevation, hint)]


def _potsdam(root: Path, layout: LayoutSettings, split: str, entry: str) -> list[Scene]:
    stem, kind = f"top_potsdam_{entry}", layout.image_type.upper()
    number = {"RGB": 2, "IRRG": 3, "RGBIR": 4}[kind]
    images = _place(root, layout.images, (f"{number}_Ortho_{kind}",))
    label, hint = _isprs_label(
        root,
        layout,
        split,
        f"{stem}_label.tif",
        f"{stem}_label_noBoundary.tif",
        ("5_Labels_all", "5_Labels_for_participants"),
        ("5_Labels_all_noBoundary", "5_Labels_for_participants_no_Boundary"),
    )
    return [Scene(stem, images / f"{stem}_{kind}.tif", label, None, hint)]


def _isprs_label(
    root: Path,
    layout: LayoutSettings,
    split: str,
    full: str,
    eroded: str,
    full_places: tuple[str, ...],
    eroded_places: tuple[str, ...],
) -> tuple[Path, str]:
    """The label of a scene, and what to say where it is missing: full to train, eroded to score."""
    if split == "train" or layout.eval_labels == "full":
        path = _place(root, layout.labels, full_places) / full
        return path, f"expected {path}; add it, name its folder with data.layout.labels, or take the image out"
    path = _place(root, layout.eroded_labels, eroded_places) / eroded
    return path, (
        f"expected the eroded one, {path}. Published figures are those on eroded labels; on full ones the same network "
        "scores about 6 mIoU lower. Add it, name its folder with data.layout.eroded_labels, or score on full labels "
        "with data.layout.eval_labels=full"
    )


def _place(root: Path, given: str | None, published: tuple[str, ...]) -> Path:
    """The folder given, or the first published one that is there."""
    if given is not None:
        return root / given
    return next((root / place for place in published if (root / place).is_dir()), root / published[0])


def _one_of(folder: Path, names: list[str]) -> Path:
    """The first file of these that is there; the first of all where none is."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def _present(images: list[Path]) -> list[Path]:
    missing = [path for path in images if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: no such image{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}; add it, or "
            "take it out of the split (`in2nect data check` lists all)"
        )
    return images


def _numeric(stem: str) -> tuple[int, str]:
    return (int(stem) if stem.isdigit() else -1), stem
