"""Model files of a run, and `in2nect models`: one file predicts and is scored as the checkpoint is, anywhere."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from safetensors.torch import load_file, save_file

from in2nect.models import ModelDescription, create_model, load_model, read_description
from in2nect.models.pretrained import read_state
from in2nect.training.checkpoints import AtomicCheckpointIO, model_of, read_checkpoint
from in2nect.training.cli import main
from tests.training.conftest import CLASSES

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "checkpoints.md"
SETTINGS = [
    "--data.crop_size=64",
    "--data.batch_size=2",
    "--data.samples_per_epoch=4",
    "--data.eval_window=48",
    "--data.eval_overlap=16",
    "--data.bands=[3,1]",
    "--data.mean=[0.3,0.4]",
    "--data.std=[0.1,0.2]",
    "--model.in_channels=2",
    "--model.encoder=test_efficientnet",
    "--model.tuning.projection=8",
    "--model.optimizer.lr=0.01",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
]


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an auxiliary head, a projection, bands and a normalisation of its own."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["fit", f"--data.root={dataset}", f"--output={output}", *SETTINGS]) == 0
    return output


@pytest.fixture
def alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model file and nothing else, in the working directory."""
    folder = tmp_path / "alone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Path(shutil.copy(run / "checkpoints" / "best.safetensors", folder / "model.safetensors"))


def test_fit_writes_the_model_file_of_its_best_checkpoint(run: Path) -> None:
    path = run / "checkpoints" / "best.safetensors"
    stored, state = load_file(path), read_checkpoint(path.with_suffix(".ckpt"))["state_dict"]
    names = {name.removeprefix("model.") for name in state if name.startswith("model.") and "aux_head" not in name}
    assert set(stored) == names
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in stored.items())
    assert {name.split(".")[0] for name in state} > {"model", "criterion"}  # which the file has nothing of
    description = read_description(path)
    assert (description.mean, description.std, description.bands) == ((0.3, 0.4), (0.1, 0.2), (3, 1))
    assert description.classes.names == ("field", "road", "water")
    assert json.loads(path.with_suffix(".json").read_text()) == description.to_dict()


def test_it_holds_the_scores_of_its_own_weights(run: Path) -> None:
    metrics = read_description(run / "checkpoints" / "best.safetensors").metrics
    assert metrics is not None and (metrics["split"], metrics["protocol"]) == ("val", "all")
    assert main(["validate", f"--ckpt_path={run}/checkpoints/best.ckpt"]) == 0
    scores = json.loads((run / "metrics_validate.json").read_text())
    del scores["confusion"]
    assert metrics == {"split": "val", **scores}
    assert metrics["classes"]["road"]["pixels"] > 0


def test_without_a_validation_there_are_no_scores(dataset: Path, tmp_path: Path) -> None:
    options = [*SETTINGS, "--trainer.limit_val_batches=0"]
    assert main(["fit", f"--data.root={dataset}", f"--output={tmp_path}", *options]) == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    target = tmp_path / "model.safetensors"
    assert main(["models", "export", f"{tmp_path}/checkpoints/last.ckpt", f"--output={target}"]) == 0
    assert read_description(target).metrics is None


def test_it_predicts_alone_as_the_checkpoint_does(run: Path, alone: Path, dataset: Path, tmp_path: Path) -> None:
    image = dataset / "images" / "scene3.tif"
    bare = Path(shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "bare.ckpt"))  # without config.yaml
    given = {"file": alone, "checkpoint": run / "checkpoints" / "best.ckpt", "bare": bare}
    for name, path in given.items():
        arguments = [f"--ckpt_path={path}", f"--data.predict_images={image}", f"--output={name}"]
        assert main(["predict", *arguments]) == 0
    found = [Path(name, "predictions", "scene3.tif").read_bytes() for name in given]
    assert found[0] == found[1] == found[2]
    with rasterio.open("file/predictions/scene3.tif") as raster:
        assert len(np.unique(raster.read(1))) > 1  # a network that says one class everywhere would prove nothing
    assert "in_channels: 2" in Path("file/hparams.yaml").read_text()  # what is logged is the network of the file


@pytest.mark.parametrize("subcommand", ["test", "validate"])
def test_it_is_scored_as_the_checkpoint_is(subcommand: str, run: Path, alone: Path, dataset: Path) -> None:
    """Data with a normalisation of its own does not change that of the file."""
    data = [f"--data.root={dataset}", "--data.eval_window=48", "--data.eval_overlap=16"]
    others = ["--data.mean=[0.5,0.5]", "--data.std=[1,1]", "--model.network=segnet", "--model.tuning.intra_audit=3"]
    assert main([subcommand, f"--ckpt_path={alone}", "--output=here", *data, *others]) == 0
    assert main([subcommand, f"--ckpt_path={run}/checkpoints/best.ckpt"]) == 0
    tables = [json.loads((folder / f"metrics_{subcommand}.json").read_text()) for folder in (Path("here"), run)]
    assert tables[0]["confusion"] == tables[1]["confusion"]


def test_other_classes_than_the_files_are_an_error(
    alone: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (dataset / "classes.yaml").read_text().replace("road", "street")
    Path("classes.yaml").write_text(text)
    assert main(["test", f"--ckpt_path={alone}", f"--data.root={dataset}", "--data.classes=classes.yaml"]) == 2
    assert "[field, street, water] with 255 ignored" in capsys.readouterr().err


def test_a_training_cannot_go_on_from_it(alone: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", f"--ckpt_path={alone}", f"--data.root={dataset}", "--output=new"]) == 2
    assert "resume from last.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{}", None], ids=["empty", "text", "no header"])
def test_a_broken_file_is_told_briefly(
    content: bytes | None, alone: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        save_file({"weight": torch.zeros(1)}, alone)
    else:
        alone.write_bytes(content)
    for arguments in (
        ["predict", f"--ckpt_path={alone}", f"--data.predict_images={dataset}/images"],
        ["models", "show", str(alone)],
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert f"{alone}" in told and "Traceback" not in told and len(told.splitlines()) < 4


def test_what_is_evaluated_is_what_is_exported(run: Path, tmp_path: Path) -> None:
    """A checkpoint of averaged weights holds the average as its state, and what is trained on beside it."""
    checkpoint = read_checkpoint(run / "checkpoints" / "best.ckpt")
    trained = checkpoint["state_dict"]
    averaged = {name: value / 2 if value.is_floating_point() else value for name, value in trained.items()}
    checkpoint |= {"state_dict": averaged, "current_model_state": trained}
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "best.ckpt")
    stored = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(value, averaged[f"model.{name}"]) for name, value in stored.items())
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.safetensors").exists()


def test_export_and_show(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, target = run / "checkpoints" / "last.ckpt", tmp_path / "model.safetensors"
    assert main(["models", "export", str(checkpoint), "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    weights, description = model_of(read_checkpoint(checkpoint))
    assert read_description(target) == description
    assert all(torch.equal(value, weights[name]) for name, value in load_file(target).items())
    shown = []
    for path in (target, checkpoint):
        assert main(["models", "show", str(path)]) == 0
        shown.append(capsys.readouterr().out)
    assert "a model file, written by in2nect" in shown[0] and "a checkpoint of epoch 1, step 2" in shown[1]
    assert shown[0].splitlines()[1:] == shown[1].splitlines()[1:]
    for text in ("unetformer, encoder test_efficientnet", "2 channels, bands 3, 1", "mean 0.3 0.4, std 0.1 0.2"):
        assert text in shown[0]
    assert "3, and 255 is ignored" in shown[0] and "1 road (128, 128, 128), IoU" in shown[0]
    assert "mIoU" in shown[0] and "width 64, stride 4" in shown[0]


PUBLIC = create_model("unetformer", 3, encoder="test_efficientnet")


def public(folder: Path, *, without: str = "nothing", **changes: torch.Tensor) -> list[str]:
    """A checkpoint as Lightning writes it for a module that calls the network `net`, and how to import it."""
    CLASSES.to_yaml(folder / "classes.yaml")
    state = {f"net.{name}": value for name, value in PUBLIC.state_dict().items() if not re.search(without, name)}
    torch.save({"epoch": 3, "state_dict": {**state, **changes}}, folder / "public.ckpt")
    options = ["--network=unetformer", "--encoder=test_efficientnet", f"--classes={folder}/classes.yaml"]
    return ["models", "import", str(folder / "public.ckpt"), *options, f"--output={folder}/model.safetensors"]


@pytest.mark.parametrize(
    "without", ["nothing", "aux_head|num_batches_tracked"], ids=["all of it", "what predictions need"]
)
def test_import(without: str, tmp_path: Path) -> None:
    assert main(public(tmp_path, without=without)) == 0
    model, description = load_model(tmp_path / "model.safetensors")
    assert (description.classes, description.metrics, description.bands) == (CLASSES, None, None)
    assert (description.mean, description.std) == (PUBLIC.input_mean, PUBLIC.input_std)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model(x), PUBLIC.eval()(x))


def test_import_with_another_normalisation(tmp_path: Path) -> None:
    arguments = [*public(tmp_path), "--mean=[0.1,0.2,0.3]", "--std=[1,2,3]"]
    assert main(arguments) == 0
    description = read_description(tmp_path / "model.safetensors")
    assert (description.mean, description.std) == ((0.1, 0.2, 0.3), (1, 2, 3))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"without": r"p1\.weights"},
            [],
            "public.ckpt: not the weights of this network (layout UNetFormer); 1 missing: ",
        ),
        ({"net.other": torch.zeros(1)}, [], "1 of no use there: net.other"),
        ({"net.decoder.p1.weights": torch.zeros(3)}, [], "net.decoder.p1.weights (3,), expected (2,)"),
        ({"without": "."}, [], "in no known layout"),
        (
            {"without": ".", "patch_embed1.norm.weight": torch.zeros(32)},
            ["--network=lsknet_t", "--encoder=null"],
            "alone",
        ),
        ({}, ["--network=segnet"], "unknown model 'segnet'"),
        ({}, ["--mean=[0.1,0.2,0.3]"], "--mean (0.1, 0.2, 0.3) and --std None: give both"),
        ({}, ["--mean=[0.1,0.2,0.3]", "--std=[1,1,0]"], "and an std above 0"),
        ({}, ["--classes=none.yaml"], "none.yaml: no such class file"),
    ],
)
def test_what_cannot_be_imported(
    changes: dict[str, Any], options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*public(tmp_path, **changes), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    for auxiliary, column in ((False, 0), (True, 2)):
        network = create_model("unetformer", 7, auxiliary=auxiliary)
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        assert rows["unetformer"][column] == f"{millions:.3f}"
    assert rows["unetformer"][-2:] == ["64", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "no command 'fly'; expected one of list, show, export"),
        (["show", "none.safetensors"], "none.safetensors: no such model file"),
        (["show", "none.ckpt"], "none.ckpt: no such checkpoint"),
        (["show", "RUN/config.yaml"], "another kind of file than the checkpoint of a run"),
        (
            ["export", "RUN/checkpoints/best.safetensors", "--output=x.safetensors"],
            "it is no checkpoint that `in2nect fit`",
        ),
        (["export", "RUN/checkpoints/last.ckpt", "--output=x.onnx"], "x.onnx: the name of a model file ends in"),
        (["export", "OTHER", "--output=x.safetensors"], "it is no checkpoint that `in2nect fit` wrote"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, other)
    arguments = [argument.replace("RUN", str(run)).replace("OTHER", str(other)) for argument in arguments]
    assert main(["models", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 10, -1000])
@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors"])
def test_what_was_cut_short_is_neither_exported_nor_imported(kept: int, name: str, run: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes((run / "checkpoints" / name).read_bytes()[:kept])
    for read in (read_checkpoint, read_state):
        with pytest.raises(ValueError, match=r"bytes\).* was cut short"):
            read(path)


def test_the_documentation_holds(alone: Path) -> None:
    """Its JSON is a description, and its code runs."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (shown,) = [text for kind, text in blocks if kind == "json"]
    described = ModelDescription.from_dict(json.loads(shown))
    assert json.loads(shown) == described.to_dict()
    shutil.copy(alone, "best.safetensors")
    for text in [text for kind, text in blocks if kind == "python"]:
        names = {"images": torch.zeros(1, 2, 64, 64, dtype=torch.uint8)}
        exec(text, names)
        assert "in2nect_version" in names["description"] if "state" in names else names["found"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "a checkpoint of a run to a model file" in text and "NAME.safetensors; replaced if it is there" in text
    assert main(["models"]) == 2
