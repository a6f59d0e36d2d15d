"""Evaluation grids: every pixel has exactly one owner, windows stay inside the image, neighbours overlap."""

from __future__ import annotations

import os
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling

from in2nect.data.windows import RasterCache, axis_spans, grid_windows, open_raster
from tests.data.conftest import WriteRaster


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 123, 252, 507, 1024])
@pytest.mark.parametrize(("window", "overlap"), [(64, 0), (64, 16), (64, 63), (100, 33), (512, 64), (1, 0)])
def test_owned_parts_partition_the_axis(length: int, window: int, overlap: int) -> None:
    spans = axis_spans(length, window, overlap)
    owned = [pixel for span in spans for pixel in range(span.own_start, span.own_stop)]
    assert owned == list(range(length))
    for span in spans:
        assert 0 <= span.start <= span.own_start < span.own_stop <= span.start + span.size <= length
        assert span.size == min(window, length)
    for left, right in pairwise(spans):
        assert left.start + left.size - right.start >= overlap
        # Seams lie in the middle of what neighbours share, so both see as much context.
        assert abs((left.own_stop - right.start) - (left.start + left.size - left.own_stop)) <= 1


@pytest.mark.parametrize(("height", "width"), [(252, 507), (123, 123), (40, 300), (96, 96)])
def test_grid_covers_each_pixel_once(height: int, width: int) -> None:
    hits = np.zeros((height, width), int)
    for place in grid_windows(height, width, 96, 20):
        hits[place.rows.own_start : place.rows.own_stop, place.cols.own_start : place.cols.own_stop] += 1
    assert (hits == 1).all()


@pytest.mark.parametrize(("window", "overlap"), [(0, 0), (8, 8), (8, -1)])
def test_bad_grid(window: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=rf"window {window} with overlap {overlap}"):
        axis_spans(10, window, overlap)


def test_read_resamples_a_window(tmp_path: Path, write_raster) -> None:
    values = np.arange(40 * 30, dtype=np.int64).reshape(40, 30)
    path = write_raster(tmp_path / "a.tif", (values % 251).astype(np.uint8))
    cache = RasterCache()
    window = cache.read(path, (8, 4, 10, 12), nearest=True)
    np.testing.assert_array_equal(window[0], (values % 251)[8:18, 4:16])
    assert cache.read(path, (8, 4, 10, 12), (5, 24), nearest=False).shape == (1, 5, 24)
    halved = cache.read(path, (8, 4, 10, 12), (5, 6), nearest=True)
    assert np.isin(halved, window).all()


def test_overviews_never_stand_in(tmp_path: Path, write_raster) -> None:
    """An averaged overview of a label would hold codes that are nowhere in it."""
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 2
    path = write_raster(tmp_path / "a.tif", stripes)
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2], Resampling.average)
    codes = np.unique(RasterCache().read(path, (0, 0, 512, 512), (256, 256), nearest=True))
    assert 1 not in codes


def test_cache_closes_the_least_recently_used(tmp_path: Path, write_raster) -> None:
    paths = [write_raster(tmp_path / f"{n}.tif", np.full((4, 4), n, np.uint8)) for n in range(4)]
    cache = RasterCache(limit=2)
    for number in (0, 1, 0, 2, 3, 0):
        assert cache.read(paths[number], (0, 0, 4, 4), nearest=True).max() == number
    assert list(cache._open) == [paths[3], paths[0]]


def test_handles_stay_in_their_process(tmp_path: Path, write_raster) -> None:
    path = write_raster(tmp_path / "a.tif", np.full((4, 4), 9, np.uint8))
    cache = RasterCache()
    cache.read(path, (0, 0, 4, 4), nearest=True)
    copy = pickle.loads(pickle.dumps(cache))
    assert not copy._open
    assert copy.read(path, (0, 0, 4, 4), nearest=True).max() == 9
    inherited = cache._open[path]
    cache._process = os.getppid()  # as in a forked child
    cache.read(path, (0, 0, 4, 4), nearest=True)
    assert cache._open[path] is not inherited


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(rasterio.errors.RasterioIOError, match=r"none\.tif"):
        open_raster(tmp_path / "none.tif")


def test_a_file_cut_short_is_named(tmp_path: Path, write_raster: WriteRaster) -> None:
    path = write_raster(tmp_path / "scene.tif", np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"scene.tif: rows 40 to 60, columns 0 to 20 .*cut short"):
        RasterCache().read(path, (40, 0, 20, 20), nearest=True)
