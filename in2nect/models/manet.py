"""MANet (Li et al., IEEE TGRS 60, 2022): ResNet50, kernel and channel attention on every skip, a LinkNet decoder.

With resnet50 and 7 classes: 35.861 M parameters, 54.3 GMAC at 512 x 512. Both attentions are linear in the number of
pixels: no map of pixels against pixels is ever made. Not segmentation_models_pytorch's MAnet, another network.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from in2nect.models.encoder import Encoder, create_encoder
from in2nect.models.gradient_checkpointing import Checkpointed
from in2nect.models.layers import fit_size, full_precision
from in2nect.models.registry import Pretrained, Representation, SegmentationModel, TrainingOutput, register_model

WIDTH = 32
_EPSILON = 1e-6


class MANet(SegmentationModel):
    """MANet over an encoder with strides 4, 8, 16, 32; any input size, channels_last preferred.

    The representation is at the image's own size, so the losses see every pixel. The network has no auxiliary head.

    Args:
        encoder: from ``create_encoder``; the decoder's widths follow its channels.
        num_classes: K.
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        c2, c3, c4, c5 = encoder.channels
        self.backbone = encoder.backbone
        self.attention4 = DualAttention(c5)
        self.attention3 = DualAttention(c4)
        self.attention2 = DualAttention(c3)
        self.attention1 = DualAttention(c2)
        self.decoder4 = DecoderBlock(c5, c4)
        self.decoder3 = DecoderBlock(c4, c3)
        self.decoder2 = DecoderBlock(c3, c2)
        self.decoder1 = DecoderBlock(c2, c2)
        self.finaldeconv1 = nn.ConvTranspose2d(c2, WIDTH, 4, stride=2, padding=1)
        self.finalconv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.finalconv3 = nn.Conv2d(WIDTH, num_classes, 3, padding=1)
        self.input_mean = encoder.input_mean
        self.input_std = encoder.input_std
        self.representation = Representation("finalconv3", WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) of normalised images x (B, C, H, W)."""
        return self.finalconv3(self._features(x))

    def forward_training(self, x: Tensor) -> TrainingOutput:
        """Logits (B, K, H, W) and representation (B, 32, H, W) of x (B, C, H, W); no auxiliary logits."""
        features = self._features(x)
        return TrainingOutput(self.finalconv3(features), features, None)

    def _features(self, x: Tensor) -> Tensor:
        c2, c3, c4, c5 = self.backbone(x)
        d4 = self.decoder4(self.attention4(c5), self.attention3(c4))
        d3 = self.decoder3(d4, self.attention2(c3))
        d2 = self.decoder2(d3, self.attention1(c2))
        d1 = self.decoder1(d2)  # stride 2
        full = fit_size(self.finaldeconv1(d1), x).relu()
        return self.finalconv2(full).relu()


@register_model("manet")
def manet(num_classes: int, *, encoder: str | None, pretrained: Pretrained, in_channels: int, auxiliary: bool) -> MANet:
    """MANet, over resnet50 unless another encoder is named. It has no auxiliary head, whatever ``auxiliary`` says."""
    return MANet(create_encoder(encoder or "resnet50", pretrained=pretrained, in_channels=in_channels), num_classes)


class DualAttention(Checkpointed):
    """Kernel attention over pixels plus attention over channels, both of the same map. (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.PAM = KernelAttention(channels)
        self.CAM = ChannelAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.PAM(x) + self.CAM(x)


class KernelAttention(nn.Module):
    """Every pixel against every pixel by a kernel that factors: x + gamma phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K)).

    phi is softplus; queries and keys have C / 8 channels. Products with phi(K) come first: C^2 / 4 multiply-adds a
    pixel. Sums run over all pixels, so they are taken in float32 at least, under autocast too.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(channels // 8, 1)
        self.query_conv = nn.Conv2d(channels, narrow, 1)
        self.key_conv = nn.Conv2d(channels, narrow, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (_pixels(conv(x)) for conv in (self.query_conv, self.key_conv, self.value_conv))
        with full_precision(x):
            query, key = functional.softplus(query), functional.softplus(key)  # (B, N, C / 8)
            out = query @ (key.transpose(1, 2) @ value)  # (B, N, C)
            normaliser = query @ key.sum(1)[:, :, None] + _EPSILON  # (B, N, 1)
            out = self.gamma * out / normaliser
        return x + _image(out, x)


class ChannelAttention(nn.Module):
    """Every channel against every channel: x + gamma softmax(max - X X^T) X. It leans on what differs most.

    C^2 multiply-adds a pixel, twice. The energies are sums over all pixels: float32 at least, under autocast too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        pixels = _pixels(x)  # (B, N, C)
        with full_precision(x):
            energy = pixels.transpose(1, 2) @ pixels  # (B, C, C)
            attention = (-energy).softmax(-1)  # the row's maximum adds the same to every channel, and cancels
            out = self.gamma * (pixels @ attention.transpose(1, 2))
        return x + _image(out, x)


class DecoderBlock(Checkpointed):
    """1x1 to a quarter of the width, 3x3 transposed convolution to twice the size, 1x1 to the skip's width; + skip."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = in_channels // 4
        self.conv1 = nn.Conv2d(in_channels, quarter, 1)
        self.norm1 = nn.BatchNorm2d(quarter)
        self.deconv2 = nn.ConvTranspose2d(quarter, quarter, 3, stride=2, padding=1, output_padding=1)
        self.norm2 = nn.BatchNorm2d(quarter)
        self.conv3 = nn.Conv2d(quarter, out_channels, 1)
        self.norm3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.deconv2(x)
        if skip is not None:
            x = fit_size(x, skip)  # a skip of odd size
        x = self.norm2(x).relu()
        x = self.norm3(self.conv3(x)).relu()
        return x if skip is None else x + skip


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C) in float32 or wider; a view where x is channels_last and wide enough."""
    pixels = x.flatten(2).transpose(1, 2)
    return pixels if pixels.dtype == torch.float64 else pixels.float()


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    """(B, N, C) -> (B, C, H, W), the size and dtype of ``like``."""
    return pixels.transpose(1, 2).unflatten(2, like.shape[2:]).to(like.dtype)
