"""Training on LoveDA and Potsdam in their own layouts, by the configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import rasterio
import torch
import yaml

from in2nect.training.cli import main
from tests.data import trees

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*_unetformer_*[24].yaml"))
TINY = [
    "--data.crop_size=64",
    "--data.batch_size=2",
    "--data.samples_per_epoch=4",
    "--data.num_workers=0",
    "--model.encoder=test_efficientnet",
    "--model.pretrained=false",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
]


def fit(config: str, root: Path, output: Path, *more: str) -> int:
    path = ROOT / "configs" / config
    return main(["fit", f"--config={path}", f"--data.root={root}", f"--output={output}", *TINY, *more])


def test_six_configurations_parse(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(CONFIGS) == 6
    for path in CONFIGS:
        with pytest.raises(SystemExit) as done:
            main(["fit", f"--config={path}", "--print_config"])
        assert done.value.code == 0
        resolved = yaml.safe_load(capsys.readouterr().out)
        name, _, crop = path.stem.split("_")
        assert (resolved["data"]["dataset"], resolved["data"]["crop_size"]) == (name, int(crop))
        assert resolved["protocol"] == ("loveda" if name == "loveda" else "isprs")
        assert resolved["trainer"]["max_epochs"] == {"loveda": 50, "vaihingen": 100, "potsdam": 100}[name]
        assert resolved["model"]["optimizer"]["lr"] == 5e-4
        assert (resolved["data"]["batch_size"], resolved["model"]["tuning"]["weight"]) == (16, 0.2)


def test_loveda_trains_validates_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.loveda(tmp_path / "loveda")
    output = tmp_path / "run"
    assert fit("loveda_unetformer_512.yaml", tmp_path / "loveda", output) == 0
    checkpoint = f"--ckpt_path={output}/checkpoints/last.ckpt"
    assert main(["validate", checkpoint]) == 0
    assert "agriculture" in capsys.readouterr().out
    assert main(["predict", checkpoint]) == 0
    assert sorted(path.stem for path in (output / "predictions").glob("*.tif")) == ["4191", "4192", "5167"]
    assert main(["predict", checkpoint, "--submission=loveda"]) == 2
    assert "3 images, and the Test split of loveda has 1796" in capsys.readouterr().err
    assert main(["data", "check-submission", str(tmp_path / "none.zip")]) == 2
    assert "none.zip: no such file" in capsys.readouterr().out
    assert main(["test", checkpoint]) == 2
    assert "labels of loveda's split 'test' are not public" in capsys.readouterr().err


def test_bands_reach_the_network_the_normalisation_and_the_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    tiles = {"train": ("3_10",), "val": ("2_10",), "test": ("2_13",)}
    for split, (tile,) in tiles.items():
        (lists / f"{split}.txt").write_text(tile)
    root = trees.potsdam(tmp_path / "potsdam", tiles=tiles).root
    layout = [f"--data.layout.splits={lists}", "--data.layout.image_type=rgbir"]
    config = "potsdam_unetformer_512.yaml"
    assert fit(config, root, tmp_path / "four", *layout) == 2
    told = capsys.readouterr().err
    assert "RGBIR.tif gives 4 bands, and model.in_channels is 3; set model.in_channels to 4, or choose 3" in told
    bands = ["--data.bands=[4,1]", "--model.in_channels=2", "--data.mean=[0.3,0.4]", "--data.std=[0.1,0.2]"]
    assert fit(config, root, tmp_path / "run", *layout, *bands) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert weights["input_mean"].flatten().tolist() == pytest.approx([0.3, 0.4])
    assert weights["input_std"].flatten().tolist() == pytest.approx([0.1, 0.2])
    assert main(["test", f"--ckpt_path={path}"]) == 0
    assert main(["predict", f"--ckpt_path={path}"]) == 0
    with rasterio.open(tmp_path / "run" / "predictions" / "top_potsdam_2_13_RGBIR.tif") as raster:
        assert raster.crs.to_string() == trees.UTM32
    three = ["--data.mean=[0.3,0.4,0.5]", "--data.std=[0.1,0.2,0.3]"]
    assert fit(config, root, tmp_path / "other", *layout, *bands, *three) == 2
    assert "data.mean has 3 values for 2 bands" in capsys.readouterr().err


def test_a_training_stops_before_its_first_step_or_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = trees.loveda(tmp_path / "loveda").root
    (root / "Train" / "Rural" / "images_png" / "0.png").write_bytes(b"")
    assert fit("loveda_unetformer_512.yaml", root, tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "0.png: 0 bytes" in told and "data.on_bad_file=skip" in told
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.warns(UserWarning, match="1 of 5 scenes left out"):
        assert fit("loveda_unetformer_512.yaml", root, tmp_path / "run", "--data.on_bad_file=skip") == 0


@pytest.mark.parametrize("name", ["root", "classes", "predict_images"])
def test_null_on_the_command_line_is_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--data.{name}=null", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"][name] is None
