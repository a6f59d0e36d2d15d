"""Evaluation batches: each pixel scored once at native resolution, batches of one shape, ranks without repeats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from in2nect.data.classes import Classes
from in2nect.data.folder import split_pairs
from in2nect.data.grid import GridDataset, ShapeBatchSampler
from in2nect.data.windows import open_raster

SIZES = [(252, 123), (50, 70), (252, 130), (64, 64)]


@pytest.fixture
def dataset(make_folder, classes: Classes) -> GridDataset:
    root = make_folder(SIZES, ["test"] * len(SIZES))
    return GridDataset(split_pairs(root, "test"), classes, window=64, overlap=10)


def test_every_pixel_is_scored_once_with_its_own_label(dataset: GridDataset, classes: Classes) -> None:
    scored = {pair.name: np.full((pair.height, pair.width), classes.ignore_index) for pair, _ in dataset.windows}
    hits = {name: np.zeros_like(label) for name, label in scored.items()}
    for sample in dataset[list(range(len(dataset)))]:
        row, col, height, width = sample["window"].tolist()
        label = sample["label"].numpy()
        place = slice(row, row + height), slice(col, col + width)
        own = label != classes.ignore_index
        assert sample["image"].shape == (3, height, width)
        assert (sample["image"][0].numpy() == label * 100)[own].all()
        hits[sample["name"]][place] += own
        scored[sample["name"]][place][own] = label[own]
    for pair in {pair for pair, _ in dataset.windows}:
        with open_raster(pair.label) as source:
            np.testing.assert_array_equal(scored[pair.name], source.read(1))
        assert (hits[pair.name] == 1).all()


def test_batches_have_one_shape_and_hold_every_window_once(dataset: GridDataset) -> None:
    batches = list(ShapeBatchSampler(dataset.windows, 4))
    assert sorted(number for batch in batches for number in batch) == list(range(len(dataset)))
    for batch in batches:
        assert len(batch) <= 4
        assert len({dataset.windows[number][1].shape for number in batch}) == 1
    assert len({tuple(sample["image"].shape) for sample in dataset[batches[0]]}) == 1


def test_ranks_share_the_windows_without_repeating(dataset: GridDataset) -> None:
    dealt = [list(ShapeBatchSampler(dataset.windows, 4, rank=rank, world_size=3)) for rank in range(3)]
    numbers = [number for batches in dealt for batch in batches for number in batch]
    assert sorted(number for number in numbers if number >= 0) == list(range(len(dataset)))


@pytest.mark.parametrize("ranks", [2, 3, 5, 100])
def test_every_rank_has_as_many_batches(dataset: GridDataset, classes: Classes, ranks: int) -> None:
    """Also where there are more ranks than windows: a rank with nothing left scores none of what it is given."""
    dealt = [list(ShapeBatchSampler(dataset.windows, 16, rank=rank, world_size=ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches in dealt}) == 1 and dealt[-1]
    assert max(len(batch) for batches in dealt for batch in batches) <= max(1, len(dataset) // ranks)
    filling = [number for batches in dealt for batch in batches for number in batch if number < 0]
    assert len(filling) < ranks and (filling or ranks < 100)
    assert all((sample["label"] == classes.ignore_index).all() for sample in dataset[filling])


def test_foreign_codes_are_refused(make_folder, classes: Classes, write_raster) -> None:
    root = make_folder([(20, 20)], ["test"])
    label = np.zeros((20, 20), np.uint8)
    label[3, 4] = 200
    write_raster(root / "labels" / "part0.png", label)
    grid = GridDataset(split_pairs(root, "test"), classes, window=64, overlap=10)
    with pytest.raises(ValueError, match=r"part0\.png: code 200 on 1 pixel, one at row 3, column 4"):
        grid[[0]]


def test_bad_batch_size(dataset: GridDataset) -> None:
    with pytest.raises(ValueError, match="batch_size: 0"):
        ShapeBatchSampler(dataset.windows, 0)


def test_images_stay_unscaled(dataset: GridDataset) -> None:
    assert dataset[[0]][0]["image"].dtype == torch.uint8
    assert dataset[[0]][0]["image"].max() > 100
