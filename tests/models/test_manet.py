"""MANet: published size and cost, both attentions against their definitions, what low precision and odd sizes do."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from in2nect.models import create_model
from in2nect.models.encoder import create_encoder
from in2nect.models.manet import ChannelAttention, KernelAttention, MANet
from tests.models.counting import gmac


@pytest.fixture(scope="module")
def small() -> MANet:
    torch.manual_seed(0)
    model = MANet(create_encoder("resnet10t"), 5).eval()
    for module in model.modules():
        if isinstance(module, (KernelAttention, ChannelAttention)):
            nn.init.constant_(module.gamma, 0.5)
    return model


def test_published_parameters() -> None:
    model = create_model("manet", 7)
    assert sum(parameter.numel() for parameter in model.parameters()) == 35_860_911  # published: 35.861 M
    plain = create_model("manet", 7, auxiliary=False)
    assert plain.state_dict().keys() == model.state_dict().keys()  # there is no auxiliary head to build


@pytest.mark.parametrize(("side", "published"), [(512, 54.3), (1024, 217.1)])
def test_published_cost(side: int, published: float) -> None:
    products, total = gmac(create_model("manet", 7), side)
    assert products == pytest.approx(published, rel=0.005)
    assert total == pytest.approx(published, abs=0.05)  # to the last digit


@pytest.mark.parametrize("size", [(123, 77), (252, 31), (507, 65), (33, 32)])
def test_any_size(small: MANet, size: tuple[int, int]) -> None:
    with torch.no_grad():
        output = small.forward_training(torch.randn(1, 3, *size))
    assert output.logits.shape == (1, 5, *size)
    assert output.features.shape == (1, 32, *size)
    assert output.auxiliary is None
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("encoder", ["convnext_atto", "test_efficientnet"])  # the first rounds sides down
def test_other_encoders(encoder: str) -> None:
    model = create_model("manet", 3, encoder=encoder, in_channels=4).train()
    assert model(torch.randn(2, 4, 123, 77)).shape == (2, 3, 123, 77)


def test_odd_sizes_are_cut_where_the_transposed_convolution_ends(small: MANet) -> None:
    """A skip of 2n - 1 takes what output_padding=0 gives, which is what the convolution's output_size means."""
    block = small.decoder4
    x, skip = torch.randn(2, 512, 5, 4), torch.randn(2, 256, 9, 8)
    with torch.no_grad():
        inner = block.norm1(block.conv1(x)).relu()
        inner = block.norm2(block.deconv2(inner, output_size=[9, 8])).relu()
        expected = block.norm3(block.conv3(inner)).relu() + skip
        torch.testing.assert_close(block(x, skip), expected)


def test_kernel_attention_is_its_definition() -> None:
    torch.manual_seed(0)
    attention, x = KernelAttention(16).double(), torch.randn(2, 16, 5, 7, dtype=torch.float64)
    nn.init.constant_(attention.gamma, 0.7)
    query, key, value = (
        conv(x).flatten(2) for conv in (attention.query_conv, attention.key_conv, attention.value_conv)
    )
    weights = torch.einsum("bcn,bcm->bnm", functional.softplus(query), functional.softplus(key))  # (B, N, N)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    expected = x + 0.7 * torch.einsum("bnm,bcm->bcn", weights, value).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)


def test_channel_attention_is_its_definition() -> None:
    torch.manual_seed(0)
    attention, x = ChannelAttention().double(), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    nn.init.constant_(attention.gamma, 0.7)
    flat = x.flatten(2)
    energy = flat @ flat.transpose(1, 2)
    weights = (energy.amax(-1, keepdim=True) - energy).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(attention(x), x + 0.7 * (weights @ flat).reshape(x.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [KernelAttention, ChannelAttention])
def test_attention_starts_as_the_identity_and_learns(kind: type[nn.Module]) -> None:
    attention = kind(16) if kind is KernelAttention else kind()
    x = torch.randn(2, 16, 4, 4)
    out = attention(x)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert attention.gamma.grad.any()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [KernelAttention, ChannelAttention])
def test_autocast_sums_over_pixels_in_float32(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """Sums of 16,384 pixels pass float16's largest number, and lose every digit of bfloat16's eight bits."""
    torch.manual_seed(0)
    attention = kind(16) if kind is KernelAttention else kind()
    nn.init.ones_(attention.gamma)  # type: ignore[arg-type]
    x = (3 + torch.randn(1, 16, 128, 128)).to(dtype)
    with torch.autocast("cpu", dtype):
        found = attention(x)
    rounded = attention(x.float()).to(dtype)
    expected = attention.double()(x.double())
    assert found.dtype == dtype and found.isfinite().all()
    # Twice what rounding the result of float32 costs: autocast also rounds the convolutions and the residual.
    assert (found - expected).abs().max() <= 2 * (rounded - expected).abs().max()


def test_no_map_of_pixels_against_pixels() -> None:
    x = torch.randn(1, 16, 24, 24)
    with _LargestTensor() as seen:
        KernelAttention(16)(x)
        ChannelAttention()(x)
    assert seen.elements <= x.numel() < (24 * 24) ** 2


class _LargestTensor(TorchDispatchMode):
    """The most elements that any operator's result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out
