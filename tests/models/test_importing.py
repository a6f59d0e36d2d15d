"""Public checkpoints in their layouts, made up here key by key: every key is used, or listed, or an error."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from in2nect.models import SegmentationModel, create_model
from in2nect.models.importing import LAYOUTS, import_state_dict
from in2nect.models.lsknet import SIZES, LSKNet
from in2nect.models.pretrained import read_state

State = dict[str, Tensor]
# What the public UNetFormer writes otherwise than we do: numbered heads, and containers of one convolution.
UNETFORMER_NAMES = (
    (r"segmentation_head\.body\.", "segmentation_head.0."),
    (r"segmentation_head\.classifier\.", "segmentation_head.2.0."),
    (r"aux_head\.body\.", "aux_head.conv."),
    (r"aux_head\.classifier\.", "aux_head.conv_out.0."),
    (r"(qkv|p\d\.pre_conv|ca\.\d)\.weight$", r"\1.0.weight"),
)
LINKNET_NAMES = (
    (r"^backbone\.conv1\.", "firstconv."),
    (r"^backbone\.bn1\.", "firstbn."),
    (r"^backbone\.layer(\d)\.", r"encoder\1."),
)


@pytest.fixture(scope="module")
def unetformer() -> SegmentationModel:
    return create_model("unetformer", 6)


@pytest.fixture(scope="module")
def manet() -> SegmentationModel:
    return create_model("manet", 6, encoder="resnet26")  # as resnet50, with fewer blocks


@pytest.fixture(scope="module")
def lsknet() -> SegmentationModel:
    return create_model("lsknet_t", 6)


def invented(state: State, names: tuple[tuple[str, str], ...] = (), prefix: str = "") -> State:
    """Other values under a layout's own names."""
    generator = torch.Generator().manual_seed(5)
    return {
        prefix + renamed(key, names): torch.randint(0, 100, value.shape, generator=generator).to(value.dtype)
        for key, value in state.items()
    }


def renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


@pytest.mark.parametrize("names", [UNETFORMER_NAMES, ()], ids=["public", "own"])
@pytest.mark.parametrize("prefix", ["net.", "module.net.", ""])
def test_unetformer(unetformer: SegmentationModel, prefix: str, names: tuple[tuple[str, str], ...]) -> None:
    state = invented(unetformer.state_dict(), names, prefix)
    report = import_state_dict(unetformer, state)
    assert report.layout == "UNetFormer"
    assert len(report.loaded) == 289
    assert_filled(unetformer, state, report.loaded)
    assert report.loaded[f"{prefix}backbone.layer1.0.conv1.weight"] == "backbone.layer1.0.conv1.weight"
    classifier = "2.0.weight" if names else "classifier.weight"
    assert torch.equal(
        unetformer.get_submodule("decoder.segmentation_head.classifier").weight,  # type: ignore[arg-type]
        state[f"{prefix}decoder.segmentation_head.{classifier}"],
    )
    assert not (report.missing or report.extra or report.dropped or report.untouched)


def test_public_names_differ_where_they_should(unetformer: SegmentationModel) -> None:
    state = invented(unetformer.state_dict(), UNETFORMER_NAMES)
    others = set(state) - set(unetformer.state_dict())
    assert len(others) == 22  # two heads of seven entries; qkv, the skips' convolutions, and two of channel attention


def test_lsknet_backbone(lsknet: SegmentationModel) -> None:
    state = invented(LSKNet(SIZES["lsknet_t"]).state_dict())
    head = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    report = import_state_dict(lsknet, state | head)
    assert report.layout == "LSKNet backbone"
    assert report.dropped == ("head.weight", "head.bias")
    assert report.loaded["block3.4.attn.proj_1.weight"] == "backbone.block3.4.attn.proj_1.weight"
    assert_filled(lsknet, state, report.loaded)
    assert report.untouched == tuple(key for key in lsknet.state_dict() if not key.startswith("backbone."))
    assert not (report.missing or report.extra)


@pytest.mark.parametrize("names", [LINKNET_NAMES, ()], ids=["linknet", "backbone"])
def test_manet(manet: SegmentationModel, names: tuple[tuple[str, str], ...]) -> None:
    state = invented(manet.state_dict(), names, "net.")
    report = import_state_dict(manet, state)
    assert report.layout == "MANet"
    assert_filled(manet, state, report.loaded)
    assert torch.equal(
        manet.state_dict()["backbone.layer2.1.bn3.running_var"],
        state["net.encoder2.1.bn3.running_var" if names else "net.backbone.layer2.1.bn3.running_var"],
    )
    assert not (report.missing or report.extra)


def test_missing_and_extra_keys_are_listed(manet: SegmentationModel) -> None:
    state = invented(manet.state_dict(), LINKNET_NAMES)
    del state["attention2.PAM.gamma"]
    state["decoder9.conv1.weight"] = torch.zeros(1)
    before = {key: value.clone() for key, value in manet.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks 1: attention2\.PAM\.gamma; .* no place: decoder9\.conv1\.weight\."):
        import_state_dict(manet, state)
    assert all(torch.equal(value, before[key]) for key, value in manet.state_dict().items())
    report = import_state_dict(manet, state, strict=False)
    assert (report.missing, report.extra) == (("attention2.PAM.gamma",), ("decoder9.conv1.weight",))
    assert_filled(manet, {key: value for key, value in state.items() if not key.startswith("decoder9")}, report.loaded)


def test_counters_of_batch_norm_may_be_absent(manet: SegmentationModel) -> None:
    state = invented(manet.state_dict(), LINKNET_NAMES)
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert import_state_dict(manet, state).missing == ()


def test_a_network_without_the_auxiliary_head(unetformer: SegmentationModel) -> None:
    state = {key: value for key, value in unetformer.state_dict().items() if "aux_head" not in key}
    with pytest.raises(ValueError, match=r"lacks 6: decoder\.aux_head\..*auxiliary=False"):
        import_state_dict(unetformer, state)
    assert import_state_dict(create_model("unetformer", 6, auxiliary=False), state).missing == ()


def test_shapes_are_named(unetformer: SegmentationModel) -> None:
    seven = invented(create_model("unetformer", 7).state_dict(), UNETFORMER_NAMES, "net.")
    message = (
        r"net\.decoder\.segmentation_head\.2\.0\.weight \(7, 64, 1, 1\), expected \(6, 64, 1, 1\)\. .*number of classes"
    )
    with pytest.raises(ValueError, match=message):
        import_state_dict(unetformer, seven, strict=False)


def test_another_networks_file(manet: SegmentationModel, lsknet: SegmentationModel) -> None:
    with pytest.raises(ValueError, match=r"LSKNet backbone checkpoint does not fit MANet; it lacks .*; it has .*"):
        import_state_dict(manet, LSKNet(SIZES["lsknet_t"]).state_dict())
    with pytest.raises(ValueError, match="MANet checkpoint does not fit UNetFormer"):
        import_state_dict(lsknet, {"attention1.CAM.gamma": torch.zeros(1)})


def test_no_known_layout(manet: SegmentationModel) -> None:
    with pytest.raises(ValueError, match=r"first keys: stem\.weight, head\.bias\); known are ") as told:
        import_state_dict(manet, {"stem.weight": torch.zeros(1), "head.bias": torch.zeros(1)})
    assert all(layout in str(told.value) for layout in LAYOUTS)
    with pytest.raises(ValueError, match="first keys: none at all"):
        import_state_dict(manet, {})


def test_two_keys_for_one_entry(manet: SegmentationModel) -> None:
    state = manet.state_dict()
    with pytest.raises(ValueError, match=r"'backbone\.conv1\.weight' and 'firstconv\.weight' both stand for"):
        import_state_dict(manet, state | {"firstconv.weight": state["backbone.conv1.weight"]})


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
def test_from_a_file(tmp_path: Path, manet: SegmentationModel, suffix: str) -> None:
    state = invented(manet.state_dict(), LINKNET_NAMES, "net.")
    path = tmp_path / f"manet{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix == ".ckpt" else state, path)
    assert len(import_state_dict(manet, read_state(path)).loaded) == len(state)


def test_a_file_that_would_run_code(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"weight": torch.zeros(1)}, "hyper_parameters": Path("config")}, tmp_path / "weights.ckpt"
    )
    with pytest.raises(ValueError, match=r"weights\.ckpt .* holds more than tensors and plain values"):
        read_state(tmp_path / "weights.ckpt")


def assert_filled(model: SegmentationModel, state: State, loaded: dict[str, str]) -> None:
    assert set(loaded) == set(state)
    filled = model.state_dict()
    assert all(torch.equal(filled[entry], state[key]) for key, entry in loaded.items())
