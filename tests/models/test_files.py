"""Model files: what is written comes back bit for bit, one file is enough, and a broken one is told by name."""

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from in2nect.data.classes import Classes
from in2nect.models import ModelDescription, SegmentationModel, create_model, load_model, read_description, save_model

CLASSES = Classes(("field", "road", "water"), ((0, 128, 0), (128, 128, 128), (0, 0, 255)), 254)
DESCRIPTION = ModelDescription(
    network="unetformer",
    classes=CLASSES,
    mean=(0.3, 0.4, 0.5, 0.6),
    std=(0.1, 0.2, 0.25, 0.3),
    encoder="test_efficientnet",
    bands=(4, 1, 2, 3),
    metrics={"split": "val", "mean_iou": 0.75, "classes": {"field": {"iou": None}}},
)


@pytest.fixture(scope="module")
def model() -> SegmentationModel:
    """As after some training: statistics of batch norm that are no longer 0 and 1; with its auxiliary head."""
    torch.manual_seed(0)
    model = create_model("unetformer", 3, encoder="test_efficientnet", in_channels=4).train()
    for _ in range(2):
        model.forward_training(torch.randn(2, 4, 64, 64))
    return model.eval()


@pytest.fixture
def path(model: SegmentationModel, tmp_path: Path) -> Path:
    save_model(tmp_path / "model.safetensors", model.state_dict(), DESCRIPTION)
    return tmp_path / "model.safetensors"


def test_logits_come_back_bit_for_bit(model: SegmentationModel, path: Path) -> None:
    loaded, description = load_model(path)
    assert description == DESCRIPTION and description.in_channels == 4
    assert not loaded.training and (loaded.input_mean, loaded.input_std) == (DESCRIPTION.mean, DESCRIPTION.std)
    x = torch.randn(1, 4, 75, 50, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_what_only_training_needs_is_left_out(model: SegmentationModel, path: Path) -> None:
    state, stored = model.state_dict(), load_file(path)
    assert any("aux_head" in name for name in state)
    assert set(stored) == {name for name in state if "aux_head" not in name}
    assert load_model(path)[0].forward_training(torch.zeros(1, 4, 32, 32)).auxiliary is None


def test_the_file_is_read_without_in2nect_and_described_beside_it(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["in2nect"])
    assert metadata["format"] == "pt"
    assert content == json.loads(path.with_suffix(".json").read_text())
    assert content["format_version"] == 1 and content["classes"][1] == {"name": "road", "color": [128, 128, 128]}
    assert (content["ignore_index"], content["bands"]) == (254, [4, 1, 2, 3])
    assert ModelDescription.from_dict({**content, "a later field": 1}) == DESCRIPTION


def test_any_layout_of_memory_is_written(model: SegmentationModel, tmp_path: Path) -> None:
    """Channels last, as training has it, and weights that share memory: the format itself takes neither."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    weights = [name for name, value in state.items() if value.dim() == 4 and value.shape[1] > 1]
    for name in weights:
        state[name] = state[name].contiguous(memory_format=torch.channels_last)
    first, second = [name for name in state if name.endswith("norm1.running_mean")][:2]
    state[second] = state[first]
    save_model(tmp_path / "model.safetensors", state, DESCRIPTION)
    stored = load_file(tmp_path / "model.safetensors")
    assert len(weights) > 10 and all(torch.equal(value, state[name]) for name, value in stored.items())


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_others_may_read_it_as_any_other_file(path: Path) -> None:
    plain = path.with_name("plain.txt")
    plain.touch()
    modes = [stat.S_IMODE(file.stat().st_mode) for file in (plain, path)]
    assert modes[0] == modes[1]


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "decoder.p1.weights"), r"1 missing: decoder\.p1\.weights$"),
        (lambda s: s | {"criterion.etf": torch.zeros(2)}, r"1 of no use there: criterion\.etf$"),
        (
            lambda s: s | {"decoder.p1.weights": torch.zeros(3)},
            r"1 of another shape: decoder\.p1\.weights \(3,\), expected \(2,\)$",
        ),
        (lambda s: {f"model.{key}": value for key, value in s.items()}, r"\d+ missing: .* and \d+ more; \d+ of no use"),
    ],
    ids=["missing", "extra", "shape", "prefix"],
)
def test_other_weights_are_refused_before_they_are_written_and_after(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, path: Path
) -> None:
    before, metadata = path.read_bytes(), {"in2nect": json.dumps(DESCRIPTION.to_dict())}
    state = change(load_file(path))
    network = "not the weights of network 'unetformer' with encoder 'test_efficientnet'; "
    with pytest.raises(ValueError, match=network + message):
        save_model(path, state, DESCRIPTION)
    assert path.read_bytes() == before
    save_file(state, path, metadata)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ": " + network + message):
        load_model(path)


@pytest.mark.parametrize("size", [0, 5, 100, 20_000])
def test_a_file_that_was_cut_short(size: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=rf"model\.safetensors \({size:,} bytes\): no .safetensors file, or one that w"
    ):
        load_model(path)


def test_weights_alone_are_no_model_file(path: Path) -> None:
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match=r"it does not say what network and classes .* `in2nect models import`"):
        load_model(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such model file"):
        load_model(tmp_path / "none.safetensors")


def test_another_suffix(model: SegmentationModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.pt: the name of a model file ends in \.safetensors"):
        save_model(tmp_path / "model.pt", model.state_dict(), DESCRIPTION)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, r"format_version: 2, and in2nect .* reads up to 1; the file was written by in2nect 9\.9"),
        ("format_version", None, "format_version: None; expected a whole number"),
        ("network", 3, "network: 3; expected the name of a network"),
        ("encoder", [], r"encoder: \[\]; expected a timm name, or null"),
        ("in_channels", 0, "in_channels: 0; expected a whole number, 1 or more"),
        ("mean", [0.1], r"mean: \[0\.1\]; expected 4 numbers, one a channel"),
        ("mean", [0.1, 0.2, "x", 0.4], "expected 4 numbers"),
        ("std", [0.1, 0.2, 0.0, 0.4], "expected one value a channel of each, and an std above 0"),
        ("bands", [0, 1, 2, 3], "expected numbers of bands counted from 1, or null"),
        ("classes", [{"name": "field"}], r"classes\[0\]: .*expected \{name"),
        ("classes", None, "classes: missing"),
        ("ignore_index", 1, "ignore_index: 1; expected a code between 3"),
        ("metrics", 0.7, "metrics: 0.7; expected an object"),
        ("in2nect_version", None, "in2nect_version: None"),
    ],
)
def test_a_header_that_is_wrong_is_told_by_its_field(field: str, value: Any, message: str, path: Path) -> None:
    header(path, {**DESCRIPTION.to_dict(), "in2nect_version": "9.9", field: value})
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        read_description(path)


def test_a_header_that_is_no_json(path: Path) -> None:
    save_file(load_file(path), path, {"in2nect": "{"})
    with pytest.raises(ValueError, match=r"model\.safetensors: .*line 1 column 2"):
        read_description(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "segnet"}, r"'segnet' is not known to in2nect .*unetformer.* written by in2nect 9\.9.*register"),
        ({"encoder": "resnet_of_tomorrow"}, "timm has no network named 'resnet_of_tomorrow'"),
        ({"encoder": "resnet10t"}, r"not the weights of network 'unetformer' with encoder 'resnet10t'; \d+ missing"),
    ],
)
def test_a_network_that_is_unknown_or_another(changes: dict[str, str], message: str, path: Path) -> None:
    header(path, replace(DESCRIPTION, in2nect_version="9.9", **changes).to_dict())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        load_model(path)


def header(path: Path, content: dict[str, Any]) -> None:
    save_file(load_file(path), path, {"in2nect": json.dumps(content)})
