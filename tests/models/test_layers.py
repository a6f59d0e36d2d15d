"""The vocabulary's padding and resizing against torch's own."""

import pytest
import torch
from torch.nn import functional

from in2nect.models.layers import ConvBN, SeparableConvBN, pad_end, resize_like


@pytest.mark.parametrize(("height", "width", "bottom", "right"), [(9, 12, 7, 4), (8, 8, 1, 0), (2, 3, 0, 2)])
def test_pad_end_reflects(height: int, width: int, bottom: int, right: int) -> None:
    x = torch.randn(2, 3, height, width)
    expected = functional.pad(x, (0, right, 0, bottom), mode="reflect")
    assert torch.equal(pad_end(x, bottom, right), expected)


def test_pad_end_replicates_a_side_no_longer_than_its_pad() -> None:
    x = torch.randn(2, 3, 4, 9)
    rows = functional.pad(x, (0, 0, 0, 4), mode="replicate")  # 4 rows cannot be reflected by 4
    assert torch.equal(pad_end(x, 4, 7), functional.pad(rows, (0, 7, 0, 0), mode="reflect"))


def test_pad_end_keeps_channels_last() -> None:
    x = torch.randn(2, 3, 4, 9).to(memory_format=torch.channels_last)
    assert pad_end(x, 4, 7).is_contiguous(memory_format=torch.channels_last)


def test_pad_end_gradient() -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pad_end(x, 3, 2), (x,))


def test_resize_like_takes_the_references_size() -> None:
    x = torch.arange(4.0).reshape(1, 1, 1, 4)
    resized = resize_like(x, torch.empty(5, 2, 1, 8))
    assert torch.equal(resized[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))


def test_convolutions_have_no_bias_and_keep_the_size() -> None:
    x = torch.randn(2, 8, 9, 7)
    assert ConvBN(8, 4, 3)(x).shape == (2, 4, 9, 7)
    assert SeparableConvBN(8, 4, 3)(x).shape == (2, 4, 9, 7)
    assert SeparableConvBN(8, 4, 8)(x).shape == (2, 4, 8, 6)
    names = dict(SeparableConvBN(8, 4, 3).named_parameters())
    assert {name: tuple(value.shape) for name, value in names.items()} == {
        "0.weight": (8, 1, 3, 3),
        "1.weight": (8,),
        "1.bias": (8,),
        "2.weight": (4, 8, 1, 1),
    }
