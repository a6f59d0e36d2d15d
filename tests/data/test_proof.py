"""What shows only in the pixels of files: found before the first step, once, and told as long as the files are so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from in2nect.data import proof
from in2nect.data.classes import Classes
from in2nect.data.coding import CodeLabels
from in2nect.data.proof import kept_at, prove
from in2nect.data.windows import open_raster
from in2nect.training.datamodule import FolderDataModule

SIZES = [(64, 70)] * 6
SPLITS = ["train", "train", "train", "val", "val", "test"]


@pytest.fixture
def root(make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IN2NECT_CACHE", str(tmp_path / "cache"))
    return make_folder(SIZES, SPLITS, suffix=".jpg")


def module(root: Path, stage: str = "fit", **options: Any) -> FolderDataModule:
    data = FolderDataModule(root, batch_size=2, crop_size=32, samples_per_epoch=4, **options)
    data.setup(stage)
    return data


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture
def damaged(root: Path, write_raster: Callable[..., Path]) -> Path:
    """A JPEG without its end, a label whose checksum is wrong, one with a code of no class."""
    _cut(root / "images" / "part0.jpg")
    _flip(root / "labels" / "part1.png")
    label = np.zeros((64, 70), np.uint8)
    label[3, 5] = 9
    write_raster(root / "labels" / "part3.png", label)
    return root


def test_a_training_lists_what_is_wrong_in_pixels_before_its_first_step(damaged: Path) -> None:
    with pytest.raises(ValueError, match="3 files are not usable") as told:
        module(damaged)
    for part in (
        "part0.jpg: damaged or cut short",
        "part1.png: damaged or cut short",
        "part3.png: code 9 on 1 pixel, one at row 3, column 5",
        "data.on_bad_file=skip",
    ):
        assert part in str(told.value)
    with pytest.raises(ValueError, match=r"part3\.png: code 9 on 1 pixel"):
        module(damaged, "validate")
    module(damaged, "test")


def test_a_damaged_label_is_named_without_it_too(damaged: Path) -> None:
    """Its codes are made up, and it breaks off when they are to be told."""
    coding = CodeLabels(module(damaged, read_through=False).classes)
    with pytest.raises(OSError, match=r"part1\.png: damaged or cut short"):
        coding(np.full((1, 2, 2), 77, np.uint8), damaged / "labels" / "part1.png")


def test_skip_leaves_them_out_and_says_how_many(damaged: Path) -> None:
    for _ in range(2):  # found, and known from before
        with pytest.warns(UserWarning, match="left out") as told:
            data = module(damaged, on_bad_file="skip")
        said = " ".join(str(warning.message) for warning in told)
        assert "split 'train': 2 of 3 scenes left out" in said and "split 'val': 1 of 2 scenes left out" in said
        assert [pair.name for pair in data.train.pairs] == ["part2"]
        assert data.val is not None and {pair.name for pair, _ in data.val.windows} == {"part4"}


def test_images_of_another_number_of_bands_are_left_out_in_every_split(
    root: Path, write_raster: Callable[..., Path]
) -> None:
    write_raster(root / "images" / "part3.jpg", np.zeros((64, 70), np.uint8))
    with pytest.raises(ValueError, match=r"part3\.jpg: 1 bands, where most images have 3"):
        module(root)
    with pytest.warns(UserWarning, match="split 'val': 1 of 2 scenes left out"):
        module(root, on_bad_file="skip")


def test_scenes_to_predict_are_read_through_too(damaged: Path, write_raster: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"part0\.jpg: damaged or cut short"):
        module(damaged, "predict", predict_images=str(damaged / "images"))
    with pytest.warns(UserWarning, match=r"1 of 6 images left out .*part0\.jpg"):
        data = module(damaged, "predict", predict_images=str(damaged / "images"), on_bad_file="skip")
    assert [path.stem for path in data.predict.paths] == [f"part{number}" for number in range(1, 6)]
    (damaged / "images" / "part0.jpg").unlink()
    write_raster(damaged / "images" / "part0.png", np.zeros((3, 64, 70), np.uint16))
    with pytest.raises(ValueError, match=r"part0\.png: uint16 values; expected uint8"):
        module(damaged, "predict", predict_images=str(damaged / "images"))


def test_files_are_read_again_only_after_they_changed(
    root: Path, classes: Classes, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [(root / "images" / "part0.jpg", None), (root / "labels" / "part0.png", CodeLabels(classes))]
    assert prove(files) == [] and kept_at(files).is_file()
    read: list[Path] = []
    monkeypatch.setattr(proof, "open_raster", lambda path: read.append(path) or open_raster(path))
    assert prove(files) == [] and not read
    kept_at(files).write_text("{")
    assert prove(files) == [] and len(read) == 2
    os.utime(root / "labels" / "part0.png", (1, 1))
    assert prove(files) == [] and len(read) == 4
    two = Classes(classes.names[:2], classes.colors[:2], 255)
    (problem,) = prove([files[0], (files[1][0], CodeLabels(two))])
    assert problem.path == files[1][0] and "code 2" in problem.message


def test_a_cache_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "file").touch()
    monkeypatch.setenv("IN2NECT_CACHE", str(root / "file"))
    with pytest.warns(UserWarning, match="cannot be written .* Set IN2NECT_CACHE to a folder"):
        assert prove([(root / "images" / "part0.jpg", None)]) == []
