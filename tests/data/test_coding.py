"""What label files hold, against a decoding of one comparison a class."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from in2nect.data.classes import ISPRS, LOVEDA, Classes
from in2nect.data.coding import CodeLabels, ColorLabels
from tests.data.trees import colours, write


def test_loveda_values_are_one_more_than_codes() -> None:
    raw = np.arange(8, dtype=np.uint8).reshape(1, 2, 4)
    coding = CodeLabels(LOVEDA, first=1, ignored=(0,))
    assert coding(raw, Path("mask.png")).tolist() == [[255, 0, 1, 2], [3, 4, 5, 6]]


def test_a_value_of_no_class_is_named(tmp_path: Path) -> None:
    raw = np.ones((1, 30, 20), np.uint8)
    raw[0, 3, 4], raw[0, 20:22, 5] = 8, 255
    path = write(tmp_path / "7.png", raw)
    message = (
        r"7\.png: code 255 on 2 pixels, one at row 20, column 5; code 8 on 1 pixel, one at row 3, column 4\. "
        r"Expected 1\.\.7 \(background, .* or 0 for ignored"
    )
    with pytest.raises(ValueError, match=message):
        CodeLabels(LOVEDA, first=1, ignored=(0,))(raw, path)
    lenient = CodeLabels(LOVEDA, first=1, ignored=(0,), unknown="ignore")(raw, path)
    assert (lenient == 255).sum() == 3
    assert (lenient == 0).sum() == 597


def test_colours_and_black(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).choice([0, 1, 2, 3, 4, 5, 255], (123, 77)).astype(np.uint8)
    coding = pickle.loads(pickle.dumps(ColorLabels(ISPRS)))
    raw = colours(codes)
    assert (coding(raw, Path("label.tif")) == codes).all()
    with_alpha = np.concatenate([raw, np.full((1, 123, 77), 9, np.uint8)])
    assert (coding(with_alpha, Path("label.tif")) == codes).all()


@pytest.mark.parametrize("colour", [(255, 255, 254), (252, 255, 0), (0, 0, 1), (128, 0, 0)])
def test_an_unknown_colour_is_never_a_class(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    raw = colours(np.zeros((600, 40), np.uint8))
    raw[:, 577, 31] = colour
    path = write(tmp_path / "top_potsdam_2_10_label.tif", raw)
    message = rf"top_potsdam_2_10_label\.tif: \({colour[0]}, {colour[1]}, {colour[2]}\) on 1 pixel, one at row 577, "
    with pytest.raises(ValueError, match=message + r"column 31\. Expected \(255, 255, 255\) impervious surface; "):
        ColorLabels(ISPRS)(raw, path)
    lenient = ColorLabels(ISPRS, unknown="ignore")(raw, path)
    assert lenient[577, 31] == 255 and (lenient == 0).sum() == 600 * 40 - 1


def test_many_unknown_colours_are_counted(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(1, 255, (3, 64, 64), dtype=np.uint8)
    path = write(tmp_path / "blurred.tif", raw)
    with pytest.raises(ValueError, match=r"and \d+ other values\. Expected"):
        ColorLabels(ISPRS)(raw, path)


def test_one_colour_with_two_meanings() -> None:
    classes = Classes(("night", "day"), ((0, 0, 0), (255, 255, 255)))
    with pytest.raises(ValueError, match=r"colour \(0, 0, 0\) means both night and ignored"):
        ColorLabels(classes)(np.zeros((3, 2, 2), np.uint8), Path("label.png"))
    assert ColorLabels(classes, ())(np.zeros((3, 2, 2), np.uint8), Path("label.png")).tolist() == [[0, 0]] * 2


def test_an_ignored_code_right_behind_the_classes() -> None:
    classes = Classes(("a", "b"), ((1, 1, 1), (2, 2, 2)), ignore_index=2)
    raw = np.array([0, 1, 2], np.uint8).repeat(3).reshape(3, 3).T.reshape(3, 1, 3)
    assert ColorLabels(classes)(raw, Path("label.png")).tolist() == [[2, 0, 1]]
