"""`in2nect demo` with tiny parameters: everything is written, and what is finished is not done again."""

import json
from pathlib import Path

import pytest
import rasterio
import torch

from in2nect.training.cli import main

ARGUMENTS = "--steps 3 --batch-size 2 --crop-size=64 --scene_size 128 --encoder test_efficientnet --pretrained false"


@pytest.mark.slow
def test_demo_writes_everything_and_trains_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "demo"
    arguments = ["demo", "--output", str(output), *ARGUMENTS.split()]
    assert main(arguments) == 0
    assert "with In2NeCT" in capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())
    plain, tuned = metrics["runs"].values()
    assert plain["confusion"] != tuned["confusion"] and "delta_inter" in tuned["collapse"]
    assert "| mIoU |" in (output / "report.md").read_text()
    assert (output / "report.png").stat().st_size > 10_000
    scene = output / "data" / "images" / "scene_006.tif"
    for arm in ("with", "without"):
        with rasterio.open(output / "predictions" / f"{arm}.tif") as codes, rasterio.open(scene) as image:
            assert (codes.crs, codes.transform, codes.shape) == (image.crs, image.transform, image.shape)
        assert torch.load(output / arm / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3

    weights = {arm: (output / arm / "checkpoints" / "last.ckpt").stat().st_mtime_ns for arm in ("with", "without")}
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("trained already") == 2
    again = json.loads((output / "metrics.json").read_text())
    assert again["runs"] == metrics["runs"]
    for arm, written in weights.items():
        assert (output / arm / "checkpoints" / "last.ckpt").stat().st_mtime_ns == written

    marker = output / "with" / "arm.json"
    marker.write_text(
        json.dumps({**json.loads(marker.read_text()), "finished": False})
    )  # as if killed just before the end
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("trained already") == 1
    assert json.loads((output / "metrics.json").read_text())["runs"] == metrics["runs"]

    monkeypatch.setattr("in2nect.demo._STEPS_PER_EPOCH", 2)
    arguments[2] = str(output.rename(tmp_path / "moved"))
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("trained already") == 2
    assert main([*arguments, "--lr=0.001"]) == 0
    assert "trained already" not in capsys.readouterr().out


def test_demo_removes_no_folder_that_it_did_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "demo" / "without" / "thesis.tex"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")
    assert main(["demo", "--output", str(tmp_path / "demo"), *ARGUMENTS.split()]) == 2
    assert "without is not empty and holds no arm.json" in capsys.readouterr().err
    assert foreign.read_text() == "years of work"
