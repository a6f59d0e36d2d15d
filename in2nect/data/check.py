"""Reads every file of a data set through and says what is in it and what is wrong: `in2nect data check`.

Files are read in threads, by bands of rows, so that memory stays at some 20 MB a thread and GDAL's cache whatever the
size of a raster; the time is that of decoding the files once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray

from in2nect.data.coding import CodeLabels
from in2nect.data.datasets import DataSet
from in2nect.data.folder import SPLITS
from in2nect.data.scenes import Problem, Scene, as_bytes, examine_scene, mixed_bands, telling
from in2nect.data.windows import bands_of_rows, open_raster, quiet_without_georeference

PUBLISHED = {"loveda": {"train": 2522, "val": 1669, "test": 1796}}
"""Scenes of a split that the lists in `splits/` do not count."""


@dataclass
class SplitReport:
    """What a split holds. `values` counts the values 0..255 of every band, `pixels` those of every class; the last
    of them is the ignored ones.
    """

    scenes: int = 0
    unlabelled: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    crs: dict[str, int] = field(default_factory=dict)
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    values: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 256), np.int64))

    @property
    def mean(self) -> list[float]:
        """Of each band, on the scale where an image is 0..1."""
        return [float(counts @ _LEVELS / max(counts.sum(), 1)) for counts in self.values]

    @property
    def std(self) -> list[float]:
        """Of each band, on the scale where an image is 0..1."""
        return [
            float(np.sqrt(counts @ (_LEVELS - mean) ** 2 / max(counts.sum(), 1)))
            for counts, mean in zip(self.values, self.mean, strict=True)
        ]

    @property
    def long_tail_ratio(self) -> float | None:
        """Pixels of the most frequent class over those of the least frequent one that occurs."""
        occurring = self.pixels[:-1][self.pixels[:-1] > 0]
        return float(occurring.max() / occurring.min()) if len(occurring) else None


@dataclass
class Report:
    """What a data set holds, what is wrong with it, and what is worth knowing without being wrong."""

    dataset: DataSet
    splits: dict[str, SplitReport]
    problems: list[tuple[str, Problem]]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values: what the tables print, and every problem."""
        names = self.dataset.classes.names
        return {
            "dataset": self.dataset.name,
            "root": str(self.dataset.root),
            "splits": {
                name: {
                    "scenes": split.scenes,
                    "unlabelled": split.unlabelled,
                    "sizes": split.sizes,
                    "crs": split.crs,
                    "pixels": dict(zip([*names, "ignored"], split.pixels.tolist(), strict=True)),
                    "long_tail_ratio": split.long_tail_ratio,
                    "mean": split.mean,
                    "std": split.std,
                }
                for name, split in self.splits.items()
            },
            "problems": [
                {"split": split, "file": str(problem.path), "kind": problem.kind, "message": problem.message}
                for split, problem in self.problems
            ],
            "notes": self.notes,
        }


def check_dataset(
    dataset: DataSet, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Reads all scenes of all splits.

    Args:
        workers: threads; the number of cores where it is not given.
        progress: called with (scenes read, scenes in all).
    """
    splits = {split: SplitReport(pixels=np.zeros(dataset.classes.num_classes + 1, np.int64)) for split in SPLITS}
    problems: list[tuple[str, Problem]] = []
    jobs: list[tuple[str, Scene]] = []
    there = dataset.splits()
    told: set[str] = set()
    for split in [name for name in SPLITS if name in there] or SPLITS[:1]:  # where there is none, that says why
        try:
            jobs += [(split, scene) for scene in dataset.scenes(split)]
        except (FileNotFoundError, ValueError) as error:
            if str(error) not in told:  # what is wrong with a list that all splits share is one problem
                problems.append((split, Problem(dataset.root, "missing", f"split {split!r}: {error}")))
            told.add(str(error))
    with quiet_without_georeference(), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = {pool.submit(_read_scene, scene, dataset): number for number, (_, scene) in enumerate(jobs)}
        found: dict[int, _SceneReport] = {}
        for done in as_completed(futures):
            found[futures[done]] = done.result()
            if progress is not None:
                progress(len(found), len(jobs))
    for number, (split, scene) in enumerate(jobs):
        _add(splits[split], scene, found[number])
        problems += [(split, problem) for problem in found[number].problems]
    if dataset.reading.bands is None:
        splits_of = {scene.image: split for split, scene in jobs}
        mixed = mixed_bands((scene.image, found[number].bands) for number, (_, scene) in enumerate(jobs))
        problems += [(splits_of[problem.path], problem) for problem in mixed]
    splits = {name: report for name, report in splits.items() if name in there}
    return Report(dataset, splits, problems, _notes(dataset, splits, {split for split, _ in problems}))


@dataclass
class _SceneReport:
    problems: list[Problem]
    bands: int = 0
    size: str = ""
    crs: str = ""
    pixels: NDArray[np.int64] | None = None
    values: NDArray[np.int64] | None = None


_LEVELS = np.arange(256) / 255


def _read_scene(scene: Scene, dataset: DataSet) -> _SceneReport:
    _, bands, problems = examine_scene(scene, dataset.reading)
    report = _SceneReport(list(problems), bands)
    unusable = {problem.path for problem in problems}
    with rasterio.Env(GDAL_PNG_WHOLE_IMAGE_OPTIM="NO"):  # which proves no checksums
        if scene.image not in unusable:
            with telling(scene.image, report.problems):
                report.values = _image_values(scene, dataset, report, with_elevation=scene.elevation not in unusable)
        if scene.label is not None and scene.label not in unusable and scene.label.exists():
            with telling(scene.label, report.problems):
                report.pixels = _label_pixels(scene.label, dataset)
    return report


def _image_values(
    scene: Scene, dataset: DataSet, report: _SceneReport, *, with_elevation: bool
) -> NDArray[np.int64] | None:
    with open_raster(scene.image) as source:
        report.size = f"{source.height} x {source.width}"
        report.crs = source.crs.to_string() if source.crs else "none"
        if set(source.dtypes) != {"uint8"}:
            return None
        indexes = list(dataset.reading.bands or source.indexes)
        values = _total(_histograms(source.read(indexes, window=window)) for window in bands_of_rows(source))
    if scene.elevation is None or not with_elevation:
        return values
    with telling(scene.elevation, report.problems), open_raster(scene.elevation) as source:
        limits = dataset.reading.elevation_range
        heights = _total(_histograms(as_bytes(source.read([1], window=w), limits)) for w in bands_of_rows(source))
        return np.concatenate([values, heights])
    return None


def _label_pixels(path: Path, dataset: DataSet) -> NDArray[np.int64]:
    coding = dataset.reading.coding or CodeLabels(dataset.classes)
    with open_raster(path) as source:
        counts = _total(_histograms(coding(source.read(window=w), path)[None]) for w in bands_of_rows(source))
    return counts[0, [*range(dataset.classes.num_classes), dataset.classes.ignore_index]]


def _total(counts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.sum(list(counts), axis=0)


def _histograms(values: NDArray[Any]) -> NDArray[np.int64]:
    return np.stack([np.bincount(band.ravel(), minlength=256) for band in values])


def _add(split: SplitReport, scene: Scene, found: _SceneReport) -> None:
    split.scenes += 1
    split.unlabelled += scene.label is None
    for counts, key in ((split.sizes, found.size), (split.crs, found.crs)):
        if key:
            counts[key] = counts.get(key, 0) + 1
    if found.pixels is not None:
        split.pixels += found.pixels
    if found.values is not None:
        if not len(split.values):
            split.values = np.zeros_like(found.values)
        if split.values.shape == found.values.shape:
            split.values += found.values


def _taken_in(split: str, dataset: DataSet) -> bool:
    return split == "val" and dataset.layout.train_on == "train+val"


def _notes(dataset: DataSet, splits: dict[str, SplitReport], wrong: set[str]) -> list[str]:
    notes = [f"no split {name!r}" for name in SPLITS if name not in splits and not _taken_in(name, dataset)]
    for name, split in splits.items():
        expected = PUBLISHED.get(dataset.name, {}).get(name)
        if expected is not None and dataset.layout.domain == "both" and split.scenes not in (0, expected):
            notes.append(f"split {name!r}: {split.scenes} scenes; {dataset.name} as published has {expected}")
        labelled = split.scenes > split.unlabelled
        absent = [
            class_name
            for class_name, count in zip(dataset.classes.names, split.pixels[:-1], strict=True)
            if labelled and not count
        ]
        if absent and name not in wrong:
            notes.append(f"split {name!r}: no pixel of {', '.join(absent)}")
        if split.unlabelled:
            notes.append(f"split {name!r}: {split.unlabelled} scenes without labels, to predict alone")
    return notes
