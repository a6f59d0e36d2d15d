"""bench/data.py at a size of nothing: its rows and JSON, the windows that its peers cut, and what it refuses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio

BENCH = Path(__file__).resolve().parents[2] / "bench"
TINY = ["--size", "192", "--crop", "48", "--seconds", "0.03", "--workers", "1"]


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, whose plain names are gone again afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("data", "output")})
    finally:
        sys.path.remove(str(BENCH))
        for name in {path.stem for path in BENCH.glob("*.py")} - before:
            sys.modules.pop(name, None)


def test_rows_and_what_is_kept(bench, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench.data, "TILE", 64)
    monkeypatch.delenv("IN2NECT_CACHE", raising=False)
    folder = tmp_path / "rasters"
    folder.mkdir()
    options = [*TINY, "--folder", str(folder), "--json", str(tmp_path / "out.json")]
    assert bench.data.main([*options, "--layout", "striped", "tiled, deflate"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in shown) <= 120
    assert list(folder.iterdir()) == [] and "IN2NECT_CACHE" not in os.environ

    document = json.loads((tmp_path / "out.json").read_text())
    assert set(document) == {"schema", "tool", "date", "machine", "versions", "arguments", "seconds", "rows"}
    assert document["tool"] == "data" and document["versions"]["rasterio"] == rasterio.__version__
    assert document["arguments"]["size"] == 192 and "json" not in document["arguments"]
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()
    methods = {"crops, plain", "crops", "crops, balanced", "whole files", "torchgeo"}
    for layout in ("striped", "tiled, deflate"):
        rows = {row["method"]: row for row in document["rows"] if row["layout"] == layout}
        assert set(rows) == methods
        for name, row in rows.items():
            if name == "torchgeo" and importlib.util.find_spec("torchgeo") is None:
                assert row["status"] == "absent" and "pip install torchgeo" in row["why"]
                assert row["crops_per_second"] is None and row["rates"] == []
                continue
            assert row["status"] == "timed" and row["why"] is None
            assert len(row["rates"]) == 3 and min(row["rates"]) > 0
            assert row["crops_per_second"] == median(row["rates"])


@pytest.mark.parametrize("layout", ["striped", "tiled", "tiled, deflate"])
def test_rasters_are_stored_as_they_are_called(bench, tmp_path, layout) -> None:
    pair = bench.data.make_raster(tmp_path, layout, 1100, seed=0)
    with rasterio.open(pair.image) as image, rasterio.open(pair.label) as label:
        assert image.shape == label.shape == (pair.height, pair.width) == (1100, 1100)
        assert (image.count, label.count) == (3, 1) and image.crs is not None
        assert image.block_shapes[0] == ((512, 512) if "tiled" in layout else (image.block_shapes[0][0], 1100))
        assert (image.compression is not None) == ("deflate" in layout)
        codes = label.read(1)
        assert set(np.unique(codes)) == set(range(7))
        assert (codes[:64, :64] == codes[0, 0]).all()  # also over the border of two rows of tiles:
        assert (codes[512:576, :64] == codes[512, 0]).all()
        assert image.read().std() > 10


def test_whole_files_are_cut_to_the_crop(bench, tmp_path) -> None:
    pair = bench.data.make_raster(tmp_path, "tiled", 192, seed=0)
    sample = bench.data.WholeFiles(pair, 48)[5]
    assert sample["image"].shape == (3, 48, 48) and sample["label"].shape == (1, 48, 48)
    with rasterio.open(pair.image) as image:
        windows = np.lib.stride_tricks.sliding_window_view(image.read(1), (48, 48))
    assert (windows == sample["image"][0].numpy()).all((2, 3)).any()


def test_what_fails_is_a_row_and_the_next_goes_on(bench, tmp_path, monkeypatch, capsys) -> None:
    def broken(*given):
        raise OSError("no such raster")

    monkeypatch.setitem(bench.data.METHODS, "crops", broken)
    assert bench.data.main([*TINY, "--layout", "striped", "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "failed: OSError: no such raster" in shown and "whole files" in shown
    for name in list(bench.data.METHODS):
        monkeypatch.setitem(bench.data.METHODS, name, broken)
    assert bench.data.main([*TINY, "--layout", "striped", "--folder", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--size", "100", "--crop", "101"], "--crop 101: larger than the raster, --size 100"),
        (["--workers", "0"], "expected a positive whole number"),
        (["--seconds", "0"], "--seconds 0: expected more than 0"),
        (["--layout", "cog"], "invalid choice: 'cog'"),
        (["--work", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_refused(bench, capsys, arguments, why) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.data.main(arguments)
    assert stopped.value.code == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_help_explains_every_option(bench) -> None:
    for action in bench.data._parser()._actions:
        assert action.help, action.option_strings


def test_more_workers_than_cores_are_no_warning(bench, tmp_path, monkeypatch, recwarn) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setitem(bench.data.METHODS, "torchgeo", bench.data.METHODS["crops"])
    options = [*TINY, "--folder", str(tmp_path), "--layout", "tiled", "--workers", "2"]
    assert bench.data.main(options) == 0
    assert not [str(warning.message) for warning in recwarn if "worker processes" in str(warning.message)]
