"""`in2nect data prepare`: nothing is lost, what is there is not done again, and a failure leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from in2nect.data.prepare import Job, plan, prepare
from in2nect.data.windows import open_raster, transform_of
from in2nect.training.cli import main
from tests.data import trees

WHERE = {"crs": trees.UTM32, "transform": rasterio.transform.from_origin(4e5, 5e6, 0.05, 0.05)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An image of four bands, a label of colours, a palette with nodata, heights, a PNG; each larger than a tile."""
    codes = trees.land_cover(0, (1100, 700), 6)
    folder = tmp_path / "source"
    trees.write(folder / "4_Ortho_RGBIR" / "a_RGBIR.tif", trees.picture(0, codes, 4), **WHERE)
    trees.write(folder / "5_Labels_all" / "a_label.tif", trees.colours(codes))
    trees.write(folder / "masks_png" / "3.png", codes[None])
    heights = 250 + codes.astype(np.float32)
    heights[0, 0] = np.nan
    trees.write(folder / "dsm" / "a.tif", heights[None], nodata=-9999, **WHERE)
    palette = trees.write(folder / "images" / "palette.tif", codes[None], nodata=255, **WHERE)
    with rasterio.open(palette, "r+") as raster:
        raster.write_colormap(1, {code: (code, 2 * code, 3 * code, 255) for code in range(6)})
        raster.update_tags(AUTHOR="somebody")
    (folder / "split.csv").write_text("image,split\n")
    return folder


@pytest.mark.parametrize("compression", ["deflate", "zstd"])
def test_nothing_is_lost(source: Path, tmp_path: Path, compression: str) -> None:
    target = tmp_path / "target"
    assert main(["data", "prepare", str(source), str(target), f"--compression={compression}", "--workers=1"]) == 0
    jobs, _ = plan(source, target)
    assert len(jobs) == 5
    for job in jobs:
        with open_raster(job.source) as before, open_raster(job.target) as after:
            np.testing.assert_array_equal(after.read(), before.read())
            for name in ("crs", "dtypes", "nodata", "count", "descriptions"):
                assert getattr(after, name) == getattr(before, name), (job.source, name)
            assert transform_of(job.target) == transform_of(job.source)
            assert after.profile["tiled"] and after.block_shapes[0] == (512, 512)
            assert after.compression.name == compression
            if before.colorinterp[0] == ColorInterp.palette:
                assert after.colorinterp[0] == ColorInterp.palette and after.colormap(1) == before.colormap(1)
                assert after.tags()["AUTHOR"] == "somebody"
        with rasterio.open(job.target) as raster:  # open_raster hides them
            assert raster.overviews(1) == [2, 4]
    assert (target / "split.csv").read_text() == "image,split\n"
    assert not [path for path in target.rglob("*") if "partial" in path.name or path.name.endswith(".aux.xml")]


def test_overviews_of_labels_hold_their_own_colours(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "target", workers=1)
    for name in ("5_Labels_all/a_label.tif", "masks_png/3.tif"):
        with rasterio.open(source / name.replace("3.tif", "3.png")) as raster:
            values = {tuple(pixel) for pixel in raster.read().reshape(raster.count, -1).T.tolist()}
        with rasterio.open(tmp_path / "target" / name, overview_level=1) as overview:
            assert overview.shape == (275, 175)
            assert {tuple(pixel) for pixel in overview.read().reshape(overview.count, -1).T.tolist()} <= values


def test_a_second_call_does_what_is_new_or_has_changed(source: Path, tmp_path: Path) -> None:
    target, seen = tmp_path / "target", []
    assert prepare(source, target, workers=2)[:2] == (5, 0)
    times = {path: path.stat().st_mtime_ns for path in target.rglob("*.tif")}
    assert prepare(source, target, workers=1)[:2] == (0, 5)
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*.tif")} == times
    os.utime(source / "dsm" / "a.tif", (1, 1))
    (target / "masks_png" / "3.tif").unlink()
    prepare(source, target, workers=1, progress=lambda done, total, path: seen.append((done, total, path.name)))
    assert seen == [(4, 5, "a.tif"), (5, 5, "3.tif")]
    assert prepare(source, target, workers=1, compression="zstd")[:2] == (5, 0)


def test_a_damaged_source_is_named_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, cut in (("4_Ortho_RGBIR/a_RGBIR.tif", 5000), ("masks_png/3.png", 40)):
        path = source / name
        path.write_bytes(path.read_bytes()[:-cut])
    assert main(["data", "prepare", str(source), str(tmp_path / "target"), "--workers=1"]) == 2
    told = capsys.readouterr()
    assert "3 rasters written" in told.out
    assert "a_RGBIR.tif: cannot be rewritten as" in told.err
    assert "3.png: cannot be rewritten as" in told.err
    assert len([path for path in (tmp_path / "target").rglob("*") if path.is_file()]) == 4


def test_one_file(source: Path, tmp_path: Path) -> None:
    mask = source / "masks_png" / "3.png"
    assert plan(mask, tmp_path / "x.tif")[0] == [Job(mask, tmp_path / "x.tif", False)]
    assert plan(mask, tmp_path / "out", ("3*",))[0] == [Job(mask, tmp_path / "out" / "3.tif", True)]


def test_what_cannot_be_planned(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies in it; give a folder elsewhere"):
        plan(source, source / "tiled")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        plan(tmp_path / "nothing", tmp_path / "target")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no raster in it"):
        plan(tmp_path / "empty", tmp_path / "target")
    with pytest.raises(ValueError, match=r"x\.png: GeoTIFFs are written; give a name that ends in \.tif"):
        plan(source / "masks_png" / "3.png", tmp_path / "x.png")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: is a file, and .*source a folder"):
        plan(source, tmp_path / "file")
    trees.write(source / "masks_png" / "3.tif", np.zeros((1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"3\.png and .*3\.tif: both would become"):
        plan(source, tmp_path / "target")


def test_a_prepared_data_set_reads_the_same(tmp_path: Path) -> None:
    trees.loveda(tmp_path / "l")
    prepare(tmp_path / "l", tmp_path / "tiled", workers=1)
    for root in ("l", "tiled"):
        assert main(["data", "check", str(tmp_path / root), "--dataset=loveda", f"--json={tmp_path / root}.json"]) == 0
    plain, tiled = ((tmp_path / f"{root}.json").read_text() for root in ("l", "tiled"))
    assert plain.replace(str(tmp_path / "l"), "") == tiled.replace(str(tmp_path / "tiled"), "")


def test_files_of_others_are_not_replaced(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    own = trees.write(target / "masks_png" / "3.tif", np.zeros((1, 4, 4), np.uint8))
    before = own.read_bytes()
    assert main(["data", "prepare", str(source), str(target), "--workers=1"]) == 2
    assert "3.tif: there already, and not written by `in2nect data prepare`" in capsys.readouterr().err
    assert own.read_bytes() == before and not (target / "split.csv").exists()
    own.unlink()
    prepare(source, target, workers=1)
    (target / "split.csv").write_text("image,split\nmine,train\n")
    prepare(source, target, workers=1)
    assert "mine" in (target / "split.csv").read_text()
    (source / "split.csv").write_text("image,split\nnew,train\n")
    os.utime(source / "split.csv", (2e9, 2e9))
    prepare(source, target, workers=1)
    assert "new" in (target / "split.csv").read_text()


def test_a_link_to_nowhere_is_named(source: Path, tmp_path: Path) -> None:
    for name, where in (("lost.tif", "nowhere.tif"), ("ring.tif", "ring.tif"), ("all", ".")):
        (source / "images" / name).symlink_to(where)
    written, _, failed = prepare(source, tmp_path / "target", workers=1)
    assert written == 5
    assert [line.split(": ")[0] for line in failed] == [
        str(source / "images" / name) for name in ("lost.tif", "ring.tif")
    ]


def test_types_without_a_predictor(tmp_path: Path) -> None:
    values = trees.land_cover(0, (64, 48), 2)[None]
    trees.write(tmp_path / "bits" / "a.tif", values, nbits=1)
    trees.write(tmp_path / "bits" / "b.tif", values.astype(np.uint16) * 4000, nbits=12)
    trees.write(tmp_path / "bits" / "c.tif", values.astype(np.complex64))
    assert prepare(tmp_path / "bits", tmp_path / "target", workers=1) == (3, 0, [])
    for name in ("a.tif", "b.tif", "c.tif"):
        with open_raster(tmp_path / "bits" / name) as before, open_raster(tmp_path / "target" / name) as after:
            np.testing.assert_array_equal(after.read(), before.read())
