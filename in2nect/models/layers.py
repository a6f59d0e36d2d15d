"""The vocabulary the networks are written in: convolutions with "same" padding, without bias where a norm follows."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConvBN(nn.Sequential):
    """Convolution without bias, batch norm. (B, in, H, W) -> (B, out, H, W) for an odd kernel, one less for an even."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, padding=(kernel - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        )


class ConvBNReLU6(ConvBN):
    """``ConvBN``, then ReLU6."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel)
        self.append(nn.ReLU6())


class SeparableConvBN(nn.Sequential):
    """Depthwise convolution with batch norm, then 1x1 without bias: the norm sits between the two."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(
            *ConvBN(in_channels, in_channels, kernel, groups=in_channels),
            conv1x1(in_channels, out_channels),
        )


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """Bilinear (align_corners=False) to the reference's height and width."""
    return functional.interpolate(x, size=reference.shape[-2:], mode="bilinear", align_corners=False)


def fit_size(x: Tensor, reference: Tensor) -> Tensor:
    """x with the reference's height and width: cut at its end, or grown there by ``pad_end``."""
    height, width = reference.shape[-2:]
    x = x[..., :height, :width]
    return pad_end(x, height - x.shape[-2], width - x.shape[-1])


def full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast off on x's device, for sums that run over every pixel: cast what goes in."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def pad_end(x: Tensor, bottom: int, right: int) -> Tensor:
    """Grow x (B, C, H, W) to (B, C, H + bottom, W + right).

    By reflection; along a side no longer than its pad, where no reflection exists, by replication.
    """
    return _grow(_grow(x, -2, bottom), -1, right)


def _grow(x: Tensor, dim: int, amount: int) -> Tensor:
    # Written with cat: the backward of torch's reflection padding is not deterministic on CUDA.
    if amount == 0:
        return x
    size = x.shape[dim]
    if amount < size:
        return torch.cat((x, x.narrow(dim, size - 1 - amount, amount).flip(dim)), dim)
    return torch.cat((x, *[x.narrow(dim, size - 1, 1)] * amount), dim)
