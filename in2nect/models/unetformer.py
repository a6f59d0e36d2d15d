"""UNetFormer (Wang et al., ISPRS J. 190, 2022): convolutional encoder, decoder of global-local attention, width 64.

With resnet18 and 7 classes: 11.725 M parameters; 11.71 GMAC at 512 x 512 in convolutions and attention, 11.76 with
batch norm (2 a value) and bilinear resizing (4 a value) counted. Attention costs 64 keys a pixel, at strides 8 to 32.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from in2nect.models.encoder import Encoder, create_encoder
from in2nect.models.gradient_checkpointing import Checkpointed
from in2nect.models.layers import ConvBN, ConvBNReLU6, SeparableConvBN, conv1x1, pad_end, resize_like
from in2nect.models.registry import Pretrained, Representation, SegmentationModel, TrainingOutput, register_model

WIDTH = 64
HEADS = 8
WINDOW = 8


class UNetFormer(SegmentationModel):
    """UNetFormer over an encoder with strides 4, 8, 16, 32; any input size, channels_last preferred.

    Args:
        encoder: from ``create_encoder``.
        num_classes: K.
        auxiliary: build the auxiliary head, which ``forward_training`` alone runs.
    """

    def __init__(self, encoder: Encoder, num_classes: int, *, auxiliary: bool = True) -> None:
        super().__init__()
        self.backbone = encoder.backbone
        self.decoder = Decoder(encoder.channels, num_classes, auxiliary=auxiliary)
        self.input_mean = encoder.input_mean
        self.input_std = encoder.input_std
        self.representation = Representation("decoder.segmentation_head.dropout", WIDTH, 4)
        self.training_only = ("decoder.aux_head",) if auxiliary else ()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) of normalised images x (B, C, H, W)."""
        maps = self.decoder(*self.backbone(x))
        _, logits = self.decoder.segmentation_head(maps.x1)
        return resize_like(logits, x)

    def forward_training(self, x: Tensor) -> TrainingOutput:
        """Logits (B, K, H, W), representation (B, 64, H/4, W/4) and auxiliary logits (B, K, H, W) of x (B, C, H, W)."""
        maps = self.decoder(*self.backbone(x))
        features, logits = self.decoder.segmentation_head(maps.x1)
        auxiliary = None
        if self.decoder.aux_head is not None:
            fused = resize_like(maps.x4, maps.x2) + resize_like(maps.x3, maps.x2) + maps.x2
            _, auxiliary = self.decoder.aux_head(fused)
            auxiliary = resize_like(auxiliary, x)
        return TrainingOutput(resize_like(logits, x), features, auxiliary)


@register_model("unetformer")
def unetformer(
    num_classes: int, *, encoder: str | None, pretrained: Pretrained, in_channels: int, auxiliary: bool
) -> UNetFormer:
    """UNetFormer, over resnet18 unless another encoder is named."""
    backbone = create_encoder(encoder or "resnet18", pretrained=pretrained, in_channels=in_channels)
    return UNetFormer(backbone, num_classes, auxiliary=auxiliary)


@register_model("lsknet_t")
def lsknet_t(
    num_classes: int, *, encoder: str | None, pretrained: Pretrained, in_channels: int, auxiliary: bool
) -> UNetFormer:
    """LSKNet-T under UNetFormer's decoder: 4.51 M parameters."""
    return _lsknet("lsknet_t", num_classes, encoder, pretrained, in_channels, auxiliary)


@register_model("lsknet_s")
def lsknet_s(
    num_classes: int, *, encoder: str | None, pretrained: Pretrained, in_channels: int, auxiliary: bool
) -> UNetFormer:
    """LSKNet-S under UNetFormer's decoder: 14.39 M parameters."""
    return _lsknet("lsknet_s", num_classes, encoder, pretrained, in_channels, auxiliary)


class DecoderMaps(NamedTuple):
    """The decoder's maps (B, 64, ., .) at strides 4, 8, 16 and 32."""

    x1: Tensor
    x2: Tensor
    x3: Tensor
    x4: Tensor


class Decoder(nn.Module):
    """From the deepest feature up: global-local block, then twice (fuse with the skip, block), then refinement.

    Sub-modules bear the names of the public checkpoints. The heads hang here for the same reason; they are called by
    the network, not in ``forward``.
    """

    def __init__(self, channels: tuple[int, ...], num_classes: int, *, auxiliary: bool) -> None:
        super().__init__()
        c2, c3, c4, c5 = channels
        self.pre_conv = ConvBN(c5, WIDTH, 1)
        self.b4 = GlobalLocalBlock(WIDTH)
        self.p3 = WeightedFusion(c4, WIDTH)
        self.b3 = GlobalLocalBlock(WIDTH)
        self.p2 = WeightedFusion(c3, WIDTH)
        self.b2 = GlobalLocalBlock(WIDTH)
        self.p1 = FeatureRefinementHead(c2, WIDTH)
        self.aux_head = Head(WIDTH, num_classes) if auxiliary else None
        self.segmentation_head = Head(WIDTH, num_classes)

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> DecoderMaps:
        x4 = self.b4(self.pre_conv(c5))
        x3 = self.b3(self.p3(x4, c4))
        x2 = self.b2(self.p2(x3, c3))
        return DecoderMaps(self.p1(x2, c2), x2, x3, x4)


class GlobalLocalBlock(Checkpointed):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attn = GlobalLocalAttention(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = ConvolutionalMLP(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ConvolutionalMLP(nn.Module):
    """1x1 convolution to the hidden width, ReLU6, 1x1 back."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.ReLU6()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class GlobalLocalAttention(nn.Module):
    """Window attention averaged across windows along strips, plus two convolutions: proj(strips(attention) + local).

    Windows do not overlap; the strips (8 x 1 and 1 x 8) carry what each window found into its neighbours.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = conv1x1(channels, 3 * channels)
        self.local1 = ConvBN(channels, channels, 3)
        self.local2 = ConvBN(channels, channels, 1)
        self.proj = SeparableConvBN(channels, channels, WINDOW)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 2, HEADS))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _relative_position_index(WINDOW))
        self.relative_position_index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        local = self.local1(x) + self.local2(x)
        out = self._strips(self._window_attention(x)) + local
        return self.proj(pad_end(out, 1, 1))  # the even kernel takes one pixel off each side

    def _window_attention(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = pad_end(x, -height % WINDOW, -width % WINDOW)
        query, key, value = _windows(self.qkv(padded))  # each (windows, heads, 64, d)
        # Plain matmuls: with a learned bias they are faster on the CPU than scaled_dot_product_attention.
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1) + self._position_bias()
        out = _unwindow(scores.softmax(-1) @ value, *padded.shape[-2:])
        return out[:, :, :height, :width]

    def _position_bias(self) -> Tensor:
        """(heads, 64, 64)"""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def _strips(self, x: Tensor) -> Tensor:
        before = WINDOW // 2 - 1
        vertical = functional.avg_pool2d(pad_end(x, 1, 0), (WINDOW, 1), stride=1, padding=(before, 0))
        horizontal = functional.avg_pool2d(pad_end(x, 0, 1), (1, WINDOW), stride=1, padding=(0, before))
        return vertical + horizontal


class WeightedFusion(Checkpointed):
    """The deep map at the skip's size and the skip at width 64, averaged by two learned weights; then 3x3."""

    def __init__(self, skip_channels: int, channels: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(2))
        self.pre_conv = conv1x1(skip_channels, channels)
        self.post_conv = ConvBNReLU6(channels, channels, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-8)
        skip = self.pre_conv(skip)
        return self.post_conv(weights[0] * skip + weights[1] * resize_like(x, skip))


class FeatureRefinementHead(WeightedFusion):
    """Fusion at stride 4, then pixel attention (where) plus channel attention (what), projected, with a shortcut."""

    def __init__(self, skip_channels: int, channels: int, *, reduction: int = 16) -> None:
        super().__init__(skip_channels, channels)
        self.pa = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Sigmoid())
        self.ca = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            conv1x1(channels, channels // reduction),
            nn.ReLU6(),
            conv1x1(channels // reduction, channels),
            nn.Sigmoid(),
        )
        self.shortcut = ConvBN(channels, channels, 1)
        self.proj = SeparableConvBN(channels, channels, 3)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = super().forward(x, skip)
        return self.act(self.proj(x * (self.pa(x) + self.ca(x))) + self.shortcut(x))


class Head(nn.Module):
    """3x3 convolution, which gives the representation; dropout of channels; 1x1 classifier without bias."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = ConvBNReLU6(channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = conv1x1(channels, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.classifier(self.dropout(features))


def _lsknet(
    name: str, num_classes: int, encoder: str | None, pretrained: Pretrained, in_channels: int, auxiliary: bool
) -> UNetFormer:
    if encoder is not None:
        raise ValueError(
            f"encoder is {encoder!r}, but {name} is itself the encoder; leave encoder at its default, or take network "
            f"unetformer with encoder {encoder}"
        )
    backbone = create_encoder(name, pretrained=pretrained, in_channels=in_channels)
    return UNetFormer(backbone, num_classes, auxiliary=auxiliary)


def _windows(qkv: Tensor) -> Tensor:
    """(B, 3 heads d, H, W) -> (3, windows, heads, 64, d)"""
    batch, channels, height, width = qkv.shape
    rows, columns, dim = height // WINDOW, width // WINDOW, channels // (3 * HEADS)
    split = qkv.permute(0, 2, 3, 1).reshape(batch, rows, WINDOW, columns, WINDOW, 3, HEADS, dim)
    return split.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch * rows * columns, HEADS, WINDOW**2, dim)


def _unwindow(windows: Tensor, height: int, width: int) -> Tensor:
    """(windows, heads, 64, d) -> (B, heads d, H, W), channels_last"""
    rows, columns = height // WINDOW, width // WINDOW
    split = windows.reshape(-1, rows, columns, HEADS, WINDOW, WINDOW, windows.shape[-1])
    joined = split.permute(0, 1, 4, 2, 5, 3, 6).reshape(split.shape[0], height, width, -1)
    return joined.permute(0, 3, 1, 2)


def _relative_position_index(window: int) -> Tensor:
    """(64, 64): which of the 15^2 offsets lies between two places of a window, row offset major."""
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    offsets = places[:, None] - places[None] + window - 1  # (64, 64, 2)
    return offsets[..., 0] * (2 * window - 1) + offsets[..., 1]
