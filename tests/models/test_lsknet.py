"""LSKNet: published size and cost, the selection of kernels against its definition, public backbone files."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from in2nect.models import create_model
from in2nect.models.encoder import create_encoder
from in2nect.models.lsknet import SIZES, Block, KernelSelection, LSKNet
from tests.models.counting import gmac


@pytest.mark.parametrize(
    ("name", "backbone", "network", "cost"),
    [("lsknet_t", 3_990_190, 4.51, 18.72), ("lsknet_s", 13_840_892, 14.39, 53.95)],
)
def test_published_size_and_cost(name: str, backbone: int, network: float, cost: float) -> None:
    model = create_model(name, 7)
    found = sum(parameter.numel() for parameter in model.get_submodule("backbone").parameters())
    assert found == backbone  # published: 3.990 M, 13.841 M
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(network, abs=0.005)
    products, total = gmac(model.get_submodule("backbone"), 1024)
    assert products == pytest.approx(cost, rel=0.005)
    assert total == pytest.approx(cost, abs=0.005)  # to the last digit


def test_encoder_says_what_timms_networks_say() -> None:
    encoder = create_encoder("lsknet_t", in_channels=4)
    assert encoder.channels == (32, 64, 160, 256)
    assert encoder.backbone.feature_info.reduction() == [4, 8, 16, 32]  # type: ignore[union-attr, operator]
    assert encoder.input_mean == (0.485, 0.456, 0.406, 0.485)
    with torch.no_grad():
        features = encoder.backbone(torch.randn(1, 4, 123, 77))
    assert [feature.shape[1:] for feature in features] == [(32, 31, 20), (64, 16, 10), (160, 8, 5), (256, 4, 3)]


def test_the_network_is_unetformers_decoder_over_it() -> None:
    torch.manual_seed(0)
    by_encoder, by_name = create_model("unetformer", 5, encoder="lsknet_t").eval(), create_model("lsknet_t", 5).eval()
    by_name.load_state_dict(by_encoder.state_dict())
    x = torch.randn(1, 3, 75, 64)
    with torch.no_grad():
        assert torch.equal(by_encoder(x), by_name(x))


def test_it_is_its_own_encoder() -> None:
    with pytest.raises(ValueError, match="encoder is 'resnet18', but lsknet_s is itself the encoder"):
        create_model("lsknet_s", 5, encoder="resnet18")


@pytest.mark.parametrize("pretrained", [True, "bundled"])
def test_weights_come_from_a_file_alone(pretrained: bool | str) -> None:
    with pytest.raises(ValueError, match=r"neither timm's hub nor PyPI has weights of 'lsknet_t'; give the path"):
        create_model("lsknet_t", 5, pretrained=pretrained)


def test_public_backbone_files(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = LSKNet(SIZES["lsknet_t"]).state_dict()
    head = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}  # ImageNet's
    torch.save({"state_dict": state | head, "epoch": 299}, tmp_path / "lsk_t.pth")
    model = create_model("lsknet_t", 5, pretrained=tmp_path / "lsk_t.pth")
    loaded = model.get_submodule("backbone").state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)

    four = create_encoder("lsknet_t", pretrained=tmp_path / "lsk_t.pth", in_channels=4).backbone.state_dict()
    rgb = state["patch_embed1.proj.weight"]
    torch.testing.assert_close(four["patch_embed1.proj.weight"], torch.cat((rgb, rgb[:, :1]), 1) * 0.75)

    with pytest.raises(ValueError, match=r"no place for: block1\.2\.|lacks weights|does not fit"):
        create_encoder("lsknet_s", pretrained=tmp_path / "lsk_t.pth")
    del state["block3.4.attn.spatial_gating_unit.conv_squeeze.bias"]
    torch.save({"state_dict": state | {"neck.weight": torch.zeros(1)}}, tmp_path / "lsk_t.pth")
    with pytest.raises(ValueError, match=r"lacks .*block3\.4\.attn\.spatial_gating_unit\.conv_squeeze\.bias;"):
        create_encoder("lsknet_t", pretrained=tmp_path / "lsk_t.pth")


def test_kernel_selection_is_its_definition() -> None:
    torch.manual_seed(0)
    unit, x = KernelSelection(4).double(), torch.randn(2, 4, 9, 11, dtype=torch.float64)
    near = functional.conv2d(x, unit.conv0.weight, unit.conv0.bias, padding=2, groups=4)
    kernel = torch.zeros(4, 1, 19, 19, dtype=torch.float64)  # the dilated kernel, its holes as zeros
    kernel[:, :, ::3, ::3] = unit.conv_spatial.weight
    far = functional.conv2d(near, kernel, unit.conv_spatial.bias, padding=9, groups=4)
    near, far = unit.conv1(near), unit.conv2(far)
    together = torch.cat((near, far), dim=1)
    weights = torch.stack((together.mean(1), together.max(1).values), dim=1)
    weights = functional.conv2d(weights, unit.conv_squeeze.weight, unit.conv_squeeze.bias, padding=3).sigmoid()
    expected = x * unit.conv(near * weights[:, 0, None] + far * weights[:, 1, None])
    torch.testing.assert_close(unit(x), expected, rtol=0, atol=1e-12)


def test_what_a_pixel_sees() -> None:
    """Two depthwise kernels: 23 pixels across in the unit, two more in the MLP's 3x3; the summary's 7x7 adds six."""
    torch.manual_seed(0)
    block = Block(4, 2).double().eval()
    nn.init.ones_(block.layer_scale_1)
    x = torch.randn(1, 4, 41, 41, dtype=torch.float64, requires_grad=True)
    block(x)[0, :, 20, 20].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0).nonzero()
    assert (seen.amin(0).tolist(), seen.amax(0).tolist()) == ([20 - 15] * 2, [20 + 15] * 2)
