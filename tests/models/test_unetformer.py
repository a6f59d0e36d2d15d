"""UNetFormer: published size and cost, any input size, the attention against loops over its definition."""

import pytest
import torch
from torch import Tensor, nn

from in2nect.models import SegmentationModel, TrainingOutput, create_model
from in2nect.models.unetformer import HEADS, WINDOW, GlobalLocalAttention
from tests.models.counting import gmac


@pytest.fixture(scope="module")
def model() -> SegmentationModel:
    torch.manual_seed(0)
    return create_model("unetformer", 7).eval()


def test_published_parameters(model: SegmentationModel) -> None:
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    auxiliary = sum(count for name, count in parameters.items() if name.startswith("decoder.aux_head."))
    assert sum(parameters.values()) == 11_725_022  # published: 11.725 M
    assert auxiliary == 37_440  # published: 0.037 M
    assert len(model.state_dict()) == 289  # entries of the public checkpoints


@pytest.mark.parametrize(("side", "published"), [(512, 11.76), (1024, 47.04)])
def test_published_cost(side: int, published: float) -> None:
    """Multiply-adds of a forward without the auxiliary head.

    Convolutions and attention products alone are 0.44 % below the published figures; with batch norm at 2 a value and
    bilinear resizing at 4 a value they are met to the last digit.
    """
    products, total = gmac(create_model("unetformer", 7), side)
    assert products == pytest.approx(published, rel=0.005)
    assert total == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize("size", [(1024, 1024), (513, 700), (128, 128), (64, 64), (33, 65)])
def test_any_size(model: SegmentationModel, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size).to(memory_format=torch.channels_last))
    assert logits.shape == (1, 7, *size)
    assert logits.isfinite().all()


def test_channels_last_is_the_same_function(model: SegmentationModel) -> None:
    x = torch.randn(2, 3, 72, 96)
    with torch.no_grad():
        expected = model(x)
        actual = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_training_output() -> None:
    model = create_model("unetformer", 5).train()
    x = torch.randn(2, 3, 64, 96)
    output = model.forward_training(x)
    assert isinstance(output, TrainingOutput)
    assert output.auxiliary is not None
    assert output.logits.shape == output.auxiliary.shape == (2, 5, 64, 96)
    assert output.features.shape == (2, 64, 16, 24)
    logits = model(x)
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 5, 64, 96)


def test_without_auxiliary_head() -> None:
    model = create_model("unetformer", 5, auxiliary=False)
    assert not any(name.startswith("decoder.aux_head") for name in model.state_dict())
    assert model.forward_training(torch.randn(2, 3, 64, 64)).auxiliary is None


def test_features_are_taken_before_dropout() -> None:
    model = create_model("unetformer", 5).train()
    model.get_submodule("decoder.segmentation_head.dropout").p = 1.0  # type: ignore[assignment]
    output = model.forward_training(torch.randn(2, 3, 64, 64))
    assert not output.logits.any()
    assert (output.features != 0).float().mean() > 0.2


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = create_model("unetformer", 5).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts each residual branch at zero, which stops its gradient once
    output = model.forward_training(torch.randn(2, 3, 128, 160))
    assert output.auxiliary is not None
    labels = torch.randint(0, 5, (2, 128, 160))
    loss = nn.functional.cross_entropy(output.logits, labels) + nn.functional.cross_entropy(output.auxiliary, labels)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_other_channels() -> None:
    model = create_model("unetformer", 5, in_channels=4).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 4, 64, 64)).shape == (1, 5, 64, 64)


def test_state_round_trip(model: SegmentationModel) -> None:
    torch.manual_seed(1)
    other = create_model("unetformer", 7).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("size", [(64, 96), (75, 64)])
def test_compiles_without_graph_breaks(model: SegmentationModel, size: tuple[int, int]) -> None:
    torch._dynamo.reset()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        actual = torch.compile(model.forward_training, fullgraph=True, backend="eager")(x)
        expected = model.forward_training(x)
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("size", [(16, 24), (11, 19), (3, 5)])
def test_window_attention_is_its_definition(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attention = GlobalLocalAttention(16).double()
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    nn.init.normal_(attention.relative_position_bias_table)
    with torch.no_grad():
        actual, expected = attention._window_attention(x), window_attention(x, attention)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_strips_are_their_definition() -> None:
    x = torch.randn(1, 2, 9, 12, dtype=torch.float64)
    actual, expected = GlobalLocalAttention(16)._strips(x), torch.zeros_like(x)
    vertical = torch.cat((x, x[:, :, -2:-1]), dim=2)  # one reflected, zeros beyond
    horizontal = torch.cat((x, x[:, :, :, -2:-1]), dim=3)
    for row in range(9):
        expected[:, :, row] += vertical[:, :, max(row - 3, 0) : row + 5].sum(2) / WINDOW
    for column in range(12):
        expected[:, :, :, column] += horizontal[:, :, :, max(column - 3, 0) : column + 5].sum(3) / WINDOW
    torch.testing.assert_close(actual, expected)


def window_attention(x: Tensor, attention: GlobalLocalAttention) -> Tensor:
    """Per image, window and head: softmax(q k^T / sqrt(d) + bias of the offset) v, by loops."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // WINDOW) * WINDOW, -(-width // WINDOW) * WINDOW
    x = x[:, :, grown(height, rows)][:, :, :, grown(width, columns)]
    weights = attention.qkv.weight[:, :, 0, 0].reshape(3, HEADS, channels // HEADS, channels)
    query, key, value = torch.einsum("nhdc,bcij->nbhdij", weights, x)
    bias = attention.relative_position_bias_table.reshape(2 * WINDOW - 1, 2 * WINDOW - 1, HEADS)
    out = torch.empty_like(query)
    for i in range(rows):
        for j in range(columns):
            top, left = i // WINDOW * WINDOW, j // WINDOW * WINDOW
            window = (..., slice(top, top + WINDOW), slice(left, left + WINDOW))
            scores = torch.einsum("bhd,bhdij->bhij", query[..., i, j], key[window]) / (channels // HEADS) ** 0.5
            place = (i - top + WINDOW - 1, j - left + WINDOW - 1)
            offsets = bias[place[0] - WINDOW + 1 : place[0] + 1, place[1] - WINDOW + 1 : place[1] + 1].flip(0, 1)
            weights = (scores + offsets.permute(2, 0, 1)).flatten(2).softmax(-1).reshape(scores.shape)
            out[..., i, j] = torch.einsum("bhij,bhdij->bhd", weights, value[window])
    return out.reshape(batch, channels, rows, columns)[:, :, :height, :width]


def grown(size: int, to: int) -> list[int]:
    """Places that fill a side: reflected at its end where it is long enough, else its last one again."""
    reflects = to - size < size
    return [i if i < size else 2 * (size - 1) - i if reflects else size - 1 for i in range(to)]
