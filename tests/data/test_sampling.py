"""Where crops are taken: the index against counts by hand, its cache, and what each way to draw promises."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from in2nect.data import sampling
from in2nect.data.classes import Classes
from in2nect.data.crops import Augmentations, CropDataset
from in2nect.data.folder import Pair
from in2nect.data.sampling import CELL, LabelIndex, Method, Sampling, cached_at, count_classes, dominant_share
from tests.data.conftest import WriteRaster

PLAIN = Augmentations(scales=(1.0,), horizontal_flip=False, vertical_flip=False, quarter_turns=False)
IGNORED = 255


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IN2NECT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_pair(tmp_path: Path, write_raster: WriteRaster):
    def make(name: str, label: NDArray[np.uint8]) -> Pair:
        image = write_raster(tmp_path / "images" / f"{name}.tif", np.stack([label] * 3))
        return Pair(name, image, write_raster(tmp_path / "labels" / f"{name}.png", label), *label.shape)

    return make


def land(*size: int) -> NDArray[np.uint8]:
    return np.zeros(size, np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (128, 128), (129, 127), (300, 520), (1500, 90)])
def test_counts_are_those_of_every_cell(make_pair, classes: Classes, size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_CHUNK", 2 * CELL)  # in several pieces
    label = np.random.default_rng(0).choice(np.array([0, 1, 2, IGNORED], np.uint8), size)
    rows, cols = -(-size[0] // CELL), -(-size[1] // CELL)
    counts = count_classes([make_pair("a", label)], classes).reshape(rows, cols, 3)
    for row, col, code in np.ndindex(rows, cols, 3):
        cell = label[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL]
        assert counts[row, col, code] == (cell == code).sum()


def test_a_draw_is_a_class_and_then_a_cell_by_its_pixels(make_pair, classes: Classes) -> None:
    """Class 1 is nowhere; class 2 has 30 pixels in one cell and 10 in another, of the second image."""
    label = land(200, 300)
    label[10, 10:40], label[180, 280:290] = 2, 2
    index = LabelIndex.of([make_pair("a", land(64, 64)), make_pair("b", label)], classes)
    assert index.present == [0, 2]
    assert index.pixels == [64 * 64 + 200 * 300 - 40, 0, 40]
    assert index.image_pixels.tolist() == [[64 * 64, 0, 0], [200 * 300 - 40, 0, 40]]
    rng = np.random.default_rng(0)
    cells = [index.draw(rng) for _ in range(2000)]
    rare = [cell for cell in cells if cell.code == 2]
    assert len(rare) / 2000 == pytest.approx(0.5, abs=0.034)  # three standard deviations
    assert {(cell.image, cell.window) for cell in rare} == {(1, (0, 0, 128, 128)), (1, (128, 256, 72, 44))}
    assert np.mean([cell.window[0] == 0 for cell in rare]) == pytest.approx(0.75, abs=0.041)


def test_the_index_is_built_once_and_again_when_a_label_changes(
    make_pair, classes: Classes, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    count = sampling.count_classes
    monkeypatch.setattr(sampling, "count_classes", lambda *given: built.append(1) or count(*given))
    pair = make_pair("a", land(40, 40))
    assert LabelIndex.of([pair], classes).pixels == LabelIndex.of([pair], classes).pixels == [1600, 0, 0]
    assert len(built) == 1
    make_pair("a", land(40, 40) + np.uint8(1))
    os.utime(pair.label, ns=(0, 1))
    assert LabelIndex.of([pair], classes).pixels == [0, 1600, 0]
    cached_at([pair], classes).write_bytes(b"cut short")
    assert LabelIndex.of([pair], classes).pixels == [0, 1600, 0]
    assert len(built) == 3


def test_a_cache_that_cannot_be_written_is_told_of(
    make_pair, classes: Classes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IN2NECT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written .* Set IN2NECT_CACHE to a folder"):
        assert LabelIndex.of([make_pair("a", land(40, 40))], classes).present == [0]


def test_labels_without_a_labelled_pixel_or_with_a_foreign_code(make_pair, classes: Classes) -> None:
    with pytest.raises(ValueError, match=r"not one labelled pixel in 1 labels; .* set sampling to uniform"):
        LabelIndex.of([make_pair("a", land(40, 40) + np.uint8(IGNORED))], classes)
    with pytest.raises(ValueError, match=r"b\.png: code 9 on 1600 pixels"):
        LabelIndex.of([make_pair("b", land(40, 40) + np.uint8(9))], classes)


@pytest.mark.parametrize(
    ("augmentations", "corner"),
    [
        (PLAIN, (0, 0)),
        (PLAIN, (395, 395)),
        (PLAIN, (200, 131)),
        (Augmentations(), (200, 131)),
        (Augmentations(scales=(0.5, 1.0, 1.5), rotation=180.0), (200, 131)),
    ],
)
def test_a_balanced_crop_shows_the_class_that_was_drawn(
    make_pair, classes: Classes, augmentations: Augmentations, corner: tuple[int, int]
) -> None:
    """A patch of 5 x 5 pixels, at an edge and amid an image, under every scale, flip and turn."""
    label = land(400, 400)
    label[corner[0] : corner[0] + 5, corner[1] : corner[1] + 5] = 2
    dataset = CropDataset(
        [make_pair("a", label), make_pair("b", land(400, 400))],
        classes,
        crop_size=48,
        length=200,
        augmentations=augmentations,
        sampling=Sampling("balanced"),
    )
    assert dataset._index is not None
    drawn = [dataset._index.draw(np.random.default_rng((0, 0, item))).code for item in range(200)]
    # At the crop's own border the pixel that was drawn may be lost to the resampling.
    shown = [bool((dataset[item]["label"] == code).any()) for item, code in enumerate(drawn)]
    assert drawn.count(2) > 70
    assert all(shown) if augmentations is PLAIN else np.mean(shown) > 0.98


def test_the_drawn_pixel_is_anywhere_in_the_crop(make_pair, classes: Classes) -> None:
    label = land(400, 400)
    label[200, 131] = 2
    options = {"crop_size": 32, "length": 1200, "augmentations": PLAIN, "sampling": Sampling("balanced")}
    dataset = CropDataset([make_pair("a", label)], classes, **options)
    places = [np.argwhere(dataset[item]["label"].numpy() == 2) for item in range(1200)]
    seen = np.concatenate([place for place in places if len(place)])
    assert len(seen) > 500
    quadrants = np.histogram2d(*seen.T, bins=2, range=[[0, 32], [0, 32]])[0]
    assert quadrants.min() / len(seen) > 0.18 and quadrants.max() / len(seen) < 0.32  # three standard deviations of 1/4


def test_balanced_on_images_smaller_than_a_crop(make_pair, classes: Classes) -> None:
    label = land(30, 20)
    label[7, 3] = 1
    dataset = CropDataset([make_pair("a", label)], classes, crop_size=48, length=20, sampling=Sampling("balanced"))
    for item in range(20):
        assert dataset[item]["label"].shape == (48, 48)


def test_no_class_dominates_beyond_the_limit(make_pair, classes: Classes) -> None:
    """The right third of one image is water, all else land: most places show nothing else."""
    label = land(300, 300)
    label[:, 200:] = 1
    pairs = [make_pair("a", label), make_pair("b", land(300, 300))]

    def shares(method: Method, **options: float) -> list[float]:
        chosen = Sampling(method, **options)  # type: ignore[arg-type]
        dataset = CropDataset(pairs, classes, crop_size=48, length=60, augmentations=PLAIN, sampling=chosen)
        return [dominant_share(dataset[item]["label"].numpy(), IGNORED) for item in range(60)]

    assert np.mean(np.array(shares("uniform")) <= 0.75) < 0.2
    assert max(shares("dominance", tries=500)) <= 0.75
    assert np.mean(np.array(shares("dominance", tries=5)) <= 0.75) > 0.15
    assert shares("dominance", tries=1) == shares("uniform") == shares("dominance", limit=1.0)
    # Where none will do, the best of those that were looked at is taken.
    assert np.mean(shares("dominance", limit=0.01, tries=30)) < 0.7


def test_dominant_share_is_of_labelled_pixels() -> None:
    label = np.array([[0, 0, 1, IGNORED], [2, IGNORED, IGNORED, IGNORED]], np.uint8)
    assert dominant_share(label, IGNORED) == 0.5
    assert dominant_share(np.full((2, 2), IGNORED, np.uint8), IGNORED) == 1.0


@pytest.mark.parametrize("method", ["balanced", "dominance"])
def test_crops_stay_a_function_of_seed_epoch_and_index(make_pair, classes: Classes, method: Method) -> None:
    label = np.kron(np.random.default_rng(0).integers(0, 3, (20, 20), dtype=np.uint8), np.ones((16, 16), np.uint8))
    pair = make_pair("a", label)
    first, second = (CropDataset([pair], classes, crop_size=32, length=9, sampling=Sampling(method)) for _ in range(2))
    second[30], second[3]
    for item in (0, 8, 20):
        for key in ("image", "label", "window"):
            assert torch.equal(first[item][key], second[item][key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rare"}, "sampling: 'rare'; expected one of uniform, balanced, dominance"),
        ({"limit": 0.0}, r"dominance_limit: 0\.0; expected a share above 0"),
        ({"limit": 75}, "dominance_limit: 75; expected a share above 0 and at most 1"),
        ({"tries": 0}, "dominance_tries: 0; expected at least 1"),
    ],
)
def test_bad_sampling(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
