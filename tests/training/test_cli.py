"""The command line end to end on four tiny scenes: fit, test, predict, resume after SIGKILL, and what mistakes are
answered with.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from in2nect.data.classes import LOVEDA, Classes
from in2nect.prediction import submission
from in2nect.training.cli import main

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "--data.crop_size=64",
    "--data.batch_size=2",
    "--data.samples_per_epoch=4",
    "--model.encoder=test_efficientnet",
    "--trainer.accelerator=cpu",
]


def fit(dataset: Path, output: Path, epochs: int, *more: str) -> list[str]:
    return ["fit", f"--data.root={dataset}", f"--output={output}", f"--trainer.max_epochs={epochs}", *SETTINGS, *more]


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(fit(dataset, output, 1)) == 0
    return output


def test_fit_writes_config_and_plain_checkpoints(run: Path, dataset: Path) -> None:
    for name in ("last", "best"):
        checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 2
        assert checkpoint["classes"]["names"] == ["field", "road", "water"]
    assert str(dataset) in (run / "config.yaml").read_text()
    assert list(run.glob("events.out.tfevents.*"))


def test_test_needs_the_checkpoint_alone_and_scores_every_labelled_pixel_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["test", f"--ckpt_path={run}/checkpoints/last.ckpt", "--data.eval_window=48", "--data.eval_overlap=16"])
        == 0
    )
    printed = capsys.readouterr().out
    words = ("IoU", "F1", "precision", "recall", "water", "mIoU, AF", "overall accuracy", "s an image")
    assert all(word in printed for word in words)
    scores = json.loads((run / "metrics_test.json").read_text())
    assert (scores["protocol"], scores["tta"]) == ("all", "none") and scores["seconds_per_image"] > 0
    assert sum(sum(row) for row in scores["confusion"]) == 92 * 80  # 96 rows, 4 of them unlabelled
    assert 0 <= scores["mean_iou"] <= 1
    rows = list(csv.DictReader((run / "metrics_test.csv").open()))
    assert [row["class"] for row in rows[:3]] == ["field", "road", "water"]
    assert float(rows[3]["iou"]) == scores["mean_iou"] and int(rows[5]["pixels"]) == 92 * 80
    assert float(rows[5]["accuracy"]) == scores["overall_accuracy"]
    assert (run / "confusion_test.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob(".*partial*"))


def test_augmented_test_scores_the_same_pixels(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {}
    for name in ("none", "paper"):
        arguments = ["test", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--tta={name}", "--data.eval_window=70"]
        assert main(arguments) == 0
        scores[name] = json.loads((run / "metrics_test.json").read_text())
    assert f"tta paper, {torch.device('cpu')}" in capsys.readouterr().out
    assert scores["paper"]["tta"] == "paper"
    pixels = [[row["pixels"] for row in scores[name]["classes"].values()] for name in ("none", "paper")]
    assert pixels[0] == pixels[1] and sum(pixels[0]) == 92 * 80
    assert scores["paper"]["confusion"] != scores["none"]["confusion"]


def test_the_protocol_is_that_of_the_classes(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six classes, three of which the labels hold; clutter, one of them, is out of the means."""
    six = tmp_path / "six.yaml"
    names = ("clutter", "building", "car", "tree", "low vegetation", "impervious surface")
    Classes(names, tuple((code, 0, 0) for code in range(6))).to_yaml(six)
    output = tmp_path / "run"
    assert main(fit(dataset, output, 1, f"--data.classes={six}", "--protocol=isprs")) == 0
    assert main(["test", f"--ckpt_path={output}/checkpoints/best.ckpt"]) == 0  # config.yaml holds the protocol
    assert "mIoU, AF without clutter" in " ".join(capsys.readouterr().out.split())
    scores = json.loads((output / "metrics_test.json").read_text())
    assert scores["protocol"] == "isprs" and "clutter" not in scores["averaged"]
    averaged = [scores["classes"][name]["iou"] for name in scores["averaged"]]
    known = [value for value in averaged if value is not None]
    assert scores["mean_iou"] == pytest.approx(sum(known) / len(known))
    assert main(["test", f"--ckpt_path={output}/checkpoints/best.ckpt", "--protocol=all"]) == 0
    assert json.loads((output / "metrics_test.json").read_text())["averaged"] == list(names)
    assert main(["test", f"--ckpt_path={run}/checkpoints/best.ckpt", "--protocol=isprs"]) == 2
    assert "protocol isprs scores 6 classes, and 3 were given" in capsys.readouterr().err


def test_validate_writes_its_own_scores(run: Path) -> None:
    assert main(["validate", f"--ckpt_path={run}/checkpoints/best.ckpt"]) == 0
    assert (run / "metrics_validate.json").is_file()


def test_predict_keeps_the_georeference(run: Path, dataset: Path, tmp_path: Path) -> None:
    images = dataset / "images"
    code = main(
        [
            "predict",
            f"--ckpt_path={run}/checkpoints/last.ckpt",
            f"--data.predict_images={images}",
            f"--output={tmp_path}",
            "--prediction.window=64",
            "--prediction.overlap=16",
            "--prediction.colour_png=true",
        ]
    )
    assert code == 0
    written = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert written == [f"scene{number}{suffix}" for number in range(4) for suffix in (".png", ".tif")]
    with (
        rasterio.open(images / "scene0.tif") as image,
        rasterio.open(tmp_path / "predictions" / "scene0.tif") as codes,
    ):
        assert (codes.crs, codes.transform, codes.shape) == (image.crs, image.transform, image.shape)
        assert codes.read(1).max() < 3


def test_predict_takes_augmentation_and_tells_the_time(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = dataset / "images" / "scene3.tif"
    codes = {}
    for name in ("none", "flips", "paper"):
        predict = ["predict", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--data.predict_images={image}"]
        small = ["--prediction.window=48", "--prediction.overlap=16", f"--output={tmp_path / name}"]
        assert main([*predict, *small, f"--tta={name}"]) == 0
        assert re.search(r"scene3\.tif: \d+\.\d\d s", capsys.readouterr().out)
        with rasterio.open(tmp_path / name / "predictions" / "scene3.tif") as raster:
            codes[name] = raster.read(1)
    assert codes["none"].shape == codes["paper"].shape
    assert (codes["flips"] != codes["none"]).any() and (codes["paper"] != codes["flips"]).any()


def test_two_processes_score_and_predict_as_one(run: Path, dataset: Path, tmp_path: Path) -> None:
    """The confusion matrix is that of all pixels, and each raster is predicted once."""
    checkpoint = f"--ckpt_path={run}/checkpoints/last.ckpt"
    options = ["--data.eval_window=48", "--data.eval_overlap=16", "--tta=flips", "--data.batch_size=3"]
    confusions = []
    for devices in (1, 2):
        assert command("test", checkpoint, *options, f"--trainer.devices={devices}").returncode == 0
        scores = json.loads((run / "metrics_test.json").read_text())
        assert scores["seconds_per_image"] > 0
        confusions.append(scores["confusion"])
    assert confusions[0] == confusions[1]
    rasters = [f"--data.predict_images={dataset / 'images'}", f"--output={tmp_path}", "--trainer.devices=2"]
    told = command("predict", checkpoint, *rasters)
    assert told.returncode == 0, told.stderr
    assert [told.stdout.count(f"scene{number}.tif: ") for number in range(4)] == [1] * 4
    assert len(list((tmp_path / "predictions").iterdir())) == 4


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_submission_to_loveda(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images of 1024 x 1024 stand for the Test split."""
    classes, output, images = tmp_path / "loveda.yaml", tmp_path / "run", tmp_path / "Test"
    LOVEDA.to_yaml(classes)
    images.mkdir()
    for number in (4191, 4192):
        with rasterio.open(
            images / f"{number}.png", "w", driver="PNG", width=1024, height=1024, count=3, dtype="uint8"
        ) as raster:
            raster.write(np.full((3, 1024, 1024), 100, dtype=np.uint8))
    assert main(fit(dataset, output, 1, f"--data.classes={classes}", "--protocol=loveda")) == 0
    predict = ["predict", f"--ckpt_path={output}/checkpoints/last.ckpt", f"--data.predict_images={images}"]
    assert main([*predict, "--submission=loveda"]) == 2
    assert "2 images, and the Test split of loveda has 1796" in capsys.readouterr().err
    assert not (output / "predictions").exists()  # told before the first image
    monkeypatch.setitem(submission.RULES, "loveda", replace(submission.LOVEDA, images=2))
    assert main([*predict, "--submission=loveda"]) == 0
    assert capsys.readouterr().out.count("submission_loveda.zip") == 1
    assert submission.check_submission(output / "submission_loveda.zip", ["4191", "4192"]) == []


def test_submission_of_other_classes_is_refused(run: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", f"--ckpt_path={run}/checkpoints/last.ckpt", "--submission=loveda"]
    assert main(arguments) == 2
    assert "the network tells 3 classes apart and a submission to loveda holds 7" in capsys.readouterr().err


def test_killed_run_resumes_to_the_same_weights(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the second epoch of three; dropout is on, and so is a projection with its own BatchNorm. The resume
    takes its settings from config.yaml.
    """
    options = ["--model.tuning.projection=8", "--trainer.accumulate_grad_batches=2", "--data.samples_per_epoch=8"]
    kill = ["--trainer.callbacks+=kill.KillAt", "--trainer.callbacks.epoch=1", "--trainer.callbacks.batch=2"]
    whole, parts = fit(dataset, tmp_path / "whole", 3, *options), fit(dataset, tmp_path / "parts", 3, *options)
    assert subprocess_main([*parts, *kill]).returncode == -signal.SIGKILL
    monkeypatch.syspath_prepend(Path(__file__).parent)  # config.yaml names kill.KillAt
    resume = ["fit", "--ckpt_path=last", f"--output={tmp_path / 'parts'}", "--trainer.callbacks=null"]
    assert main(resume) == 0
    assert main(whole) == 0
    for name in ("last", "best"):
        expected, found = (
            torch.load(tmp_path / run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in ("whole", "parts")
        )
        assert found["global_step"] == expected["global_step"]
        assert_same(found["state_dict"], expected["state_dict"])
        assert_same(found["optimizer_states"], expected["optimizer_states"])
        moved = str(expected["callbacks"]).replace(str(tmp_path / "whole"), str(tmp_path / "parts"))
        assert str(found["callbacks"]) == moved and moved.count("best_model_score") == 2
        if name == "last":
            assert found["global_step"] == 6
            states = {Path(state["best_model_path"]).name: state for state in found["callbacks"].values()}
            best = torch.load(tmp_path / "parts" / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
            assert states["best.ckpt"] in best.values()  # no epoch older than the file itself


@pytest.mark.parametrize(("workers", "accumulated"), [(0, 2), (1, 1)])
def test_killed_run_resumes_within_an_epoch(
    workers: int, accumulated: int, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last.ckpt is of the fourth batch of six in the second epoch, kill -9 comes before the sixth; the resume goes on
    with the fifth, and not from the beginning of the epoch.
    """
    every = f"--checkpoint_every={2 // accumulated}"
    options = ["--data.samples_per_epoch=12", f"--data.num_workers={workers}", "--data.sampling=dominance", every]
    options += ["--data.augmentations.contrast=0.3", f"--trainer.accumulate_grad_batches={accumulated}"]
    kill = ["--trainer.callbacks+=kill.KillAt", "--trainer.callbacks.epoch=1", "--trainer.callbacks.batch=5"]
    whole, parts = fit(dataset, tmp_path / "whole", 3, *options), fit(dataset, tmp_path / "parts", 3, *options)
    assert subprocess_main([*parts, *kill]).returncode == -signal.SIGKILL
    last = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (1, 10 // accumulated)
    monkeypatch.syspath_prepend(Path(__file__).parent)  # config.yaml names kill.KillAt
    seen = {}
    for run, arguments in (("parts", ["fit", "--ckpt_path=last", f"--output={tmp_path / 'parts'}"]), ("whole", whole)):
        note = ["--trainer.callbacks=kill.Batches", f"--trainer.callbacks.target={tmp_path / run / 'batches'}"]
        assert main([*arguments, *note]) == 0
        seen[run] = (tmp_path / run / "batches").read_text().splitlines()
    assert len(seen["whole"]) == 18 and seen["parts"] == seen["whole"][10:]
    for name in ("last", "best"):
        expected, found = (
            torch.load(tmp_path / run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in ("whole", "parts")
        )
        assert found["global_step"] == expected["global_step"]
        assert_same(found["state_dict"], expected["state_dict"])
        assert_same(found["optimizer_states"], expected["optimizer_states"])
        assert_same(found["lr_schedulers"], expected["lr_schedulers"])


def test_resuming_with_other_settings_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.yaml").read_bytes()
    for checkpoint in ("last", str(run / "checkpoints" / "last.ckpt")):
        resume = ["fit", f"--ckpt_path={checkpoint}", f"--output={run}", "--model.optimizer.lr=0.1"]
        assert main([*resume, "--model.tuning.weight=0.3"]) == 2
        told = capsys.readouterr().err
        assert "optimizer.lr is 0.0005 there and 0.1 here; tuning.weight is 0.2 there and 0.3 here" in told
    assert (run / "config.yaml").read_bytes() == before


def test_a_run_is_read_from_another_folder(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on relative paths; `predict` gets along without the data set."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(dataset, here / "data")
    (here / "data" / "classes.yaml").rename(here / "classes.yaml")
    there.mkdir()
    monkeypatch.chdir(here)
    assert main([*fit(Path("data"), Path("run"), 1), "--data.classes=classes.yaml"]) == 0
    monkeypatch.chdir(there)
    assert main(["test", f"--ckpt_path={here}/run/checkpoints/last.ckpt"]) == 0
    assert main(["validate", "--ckpt_path=best", f"--output={here / 'run'}"]) == 0
    assert (here / "run" / "metrics_validate.json").is_file()
    image = there / "scene.tif"
    shutil.copy(here / "data" / "images" / "scene0.tif", image)
    shutil.rmtree(here / "data")
    (here / "classes.yaml").unlink()
    predict = ["predict", f"--ckpt_path={here}/run/checkpoints/last.ckpt", f"--data.predict_images={image}"]
    assert main([*predict, "--output=with_config"]) == 0
    (here / "run" / "config.yaml").unlink()
    assert main([*predict, "--output=alone"]) == 0
    codes = [(there / name / "predictions" / "scene.tif").read_bytes() for name in ("with_config", "alone")]
    assert codes[0] == codes[1]


@pytest.mark.parametrize("split", ["val", "none"])
def test_fit_without_validation_checkpoints_or_bar(split: str, dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    if split == "none":
        table = data / "split.csv"
        table.write_text(table.read_text().replace(",val", ",test"))
    less = ["--trainer.limit_val_batches=0"] if split == "val" else []
    assert main(fit(data, tmp_path / "run", 2, *less, "--trainer.enable_progress_bar=false")) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert main(fit(data, tmp_path / "none", 1, *less, "--trainer.enable_checkpointing=false")) == 0
    assert (tmp_path / "none" / "config.yaml").is_file() and not (tmp_path / "none" / "checkpoints").exists()


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_a_run_that_moved_is_told_of_when_it_is_resumed(subcommand: str, run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main([subcommand, "--ckpt_path=last", f"--output={moved}"]) == 0
    assert any("dirpath has changed" in str(warning.message) for warning in told) is (subcommand == "fit")


def test_a_backend_that_cannot_run_here_is_told_before_training(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IN2NECT_BACKEND", "cuda")
    monkeypatch.setattr("in2nect.native.why_not", lambda backend: "the library is not built")
    assert main(fit(dataset, tmp_path / "run", 1)) == 2
    assert "IN2NECT_BACKEND=cuda" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "expected one of fit"),
        (["fit", "--data.root=/nowhere"], "/nowhere: no such folder"),
        (["fit", "--data.root=DATA", "--model.network=segnet"], "unknown model 'segnet'; expected one of"),
        (["fit", "--data.root=DATA", "--model.tuning.weigth=1"], "model.tuning.weigth"),
        (["fit", "--data.root=DATA", "--model.tuning.estimator=magic"], "magic"),
        (["fit", "--data.root=DATA", "--model.tuning.intra_audit=-1"], "tuning.intra_audit is -1; expected"),
        (["fit", "--data.root=DATA", "--output=RUN"], "Resume that run with --ckpt_path last"),
        (["fit", "--config=missing.yaml"], "missing.yaml"),
        (["test", "--data.root=DATA"], "give --ckpt_path"),
        (["test", "--ckpt_path=RUN/checkpoints/last.ckpt", "--tta=rotations"], "rotations"),
        (["test", "--ckpt_path=RUN/checkpoints/last.ckpt", "--protocol=cityscapes"], "cityscapes"),
        (["fit", "--data.root=DATA", "--output=NEW", "--protocol=loveda"], "protocol loveda scores 7 classes, and 3"),
        (["fit", "--data.root=DATA", "--trainer.accelerator=cpu", "--trainer.devices=0"], "devices"),
        (["fit", "--ckpt_path=last"], "runs/fit/checkpoints/last.ckpt: no such checkpoint"),
        (["test", "--ckpt_path=missing.ckpt"], "missing.ckpt: no such checkpoint"),
        (["predict", "--ckpt_path=best", "--output=x"], "x/checkpoints/best.ckpt: no such checkpoint"),
    ],
)
def test_mistakes_are_answered_briefly(
    arguments: list[str],
    message: str,
    run: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("DATA", str(dataset)).replace("RUN", str(run)) for argument in arguments]
    try:
        code = main(arguments)
    except SystemExit as exit_:  # argparse's own way out
        code = exit_.code
    told = capsys.readouterr().err
    assert code == 2
    assert message in told and "Traceback" not in told and len(told.splitlines()) < 20


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("in2nect.data.command.main", interrupted)
    assert main(["data", "check", "."]) == 130
    assert capsys.readouterr().err == "in2nect: interrupted\n"


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IN2NECT_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["fit", "--data.root=/nowhere"])


def test_help_is_quick_and_says_what_every_field_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = subprocess_python(
        "import sys; from in2nect.training.cli import main; main(['--help']); "
        "print([name for name in ('lightning', 'timm', 'rasterio', 'matplotlib') if name in sys.modules])"
    )
    assert found.returncode == 0 and found.stdout.strip().endswith("[]")
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in (
        "w of Eq. 7",
        "audit/intra_gradient_error",
        "side of a training crop",
        "a class is drawn first",
        "Write last.ckpt also within an epoch",
        "highest learning rate",
        "Folder of the run",
        "side of a window",
        "Which classes mIoU and AF are taken over",
        "Test-time augmentation",
        "the zip that a test server takes",
    ):
        assert field in text


@pytest.mark.skipif("IN2NECT_DATA" not in os.environ, reason="IN2NECT_DATA does not say where real data lies")
def test_real_images(tmp_path: Path) -> None:
    root = Path(os.environ["IN2NECT_DATA"]) / "dubai"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    config, output = ROOT / "configs" / "dubai_unetformer_lite0.yaml", tmp_path / "run"
    small = ["--data.samples_per_epoch=4", "--data.batch_size=2", "--data.crop_size=128", "--trainer.max_epochs=1"]
    less = ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.accelerator=cpu"]
    classes = f"--data.classes={ROOT}/configs/classes/dubai.yaml"
    arguments = [f"--config={config}", f"--data.root={root}", f"--output={output}", classes, *small, *less]
    assert main(["fit", *arguments]) == 0
    assert main(["test", f"--ckpt_path={output}/checkpoints/last.ckpt"]) == 0
    assert json.loads((output / "metrics_test.json").read_text())["classes"]["building"]["pixels"] > 0


def assert_same(found: object, expected: object) -> None:
    """Bit for bit, through nested containers."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor) and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert isinstance(found, (list, tuple)) and len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As `in2nect ...`, which starts processes of its own where there are several devices."""
    line = [sys.executable, "-m", "in2nect.training.cli", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240)


def subprocess_main(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess_python("import sys; from in2nect.training.cli import main; sys.exit(main())", *arguments)


def subprocess_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
