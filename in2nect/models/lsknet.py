"""LSKNet (Li et al., ICCV 2023; IJCV 2024): the encoder. Its blocks weigh two depthwise convolutions, 5x5 and 23x23 in
what they see, by place. T: 3.990 M parameters, 18.72 GMAC at 1024 x 1024; S: 13.841 M, 53.95 GMAC.
"""

from typing import NamedTuple

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from in2nect.models.gradient_checkpointing import Checkpointed

STRIDES = (4, 8, 16, 32)
_MLP_RATIOS = (8, 8, 4, 4)


class Size(NamedTuple):
    """Channels and number of blocks of each of the four stages."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]


SIZES = {
    "lsknet_t": Size((32, 64, 160, 256), (3, 3, 5, 2)),
    "lsknet_s": Size((64, 128, 320, 512), (2, 2, 4, 2)),
}


class LSKNet(nn.Module):
    """Images (B, C, H, W) -> [c2, c3, c4, c5] at strides 4, 8, 16 and 32, sides rounded up; any size.

    There is no stochastic depth.

    Attributes:
        feature_info: as timm's networks have it.
    """

    def __init__(self, size: Size, in_channels: int = 3) -> None:
        super().__init__()
        inputs = (in_channels, *size.widths[:3])
        for stage, (width, depth, ratio) in enumerate(zip(*size, _MLP_RATIOS, strict=True), start=1):
            kernel, stride = (7, 4) if stage == 1 else (3, 2)
            blocks = [Block(width, ratio) for _ in range(depth)]
            self.add_module(f"patch_embed{stage}", PatchEmbedding(inputs[stage - 1], width, kernel, stride))
            self.add_module(f"block{stage}", nn.Sequential(*blocks))
            self.add_module(f"norm{stage}", nn.LayerNorm(width, eps=1e-6))
        self.feature_info = FeatureInfo(
            [
                {"num_chs": width, "reduction": stride, "module": f"norm{stage}"}
                for stage, (width, stride) in enumerate(zip(size.widths, STRIDES), start=1)
            ],
            out_indices=(0, 1, 2, 3),
        )
        self.apply(_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in range(1, len(STRIDES) + 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            x = self.get_submodule(f"block{stage}")(x)
            x = self.get_submodule(f"norm{stage}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            features.append(x)
        return features


class PatchEmbedding(nn.Module):
    """Overlapping patches: a convolution with a stride, batch norm."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Block(Checkpointed):
    """Batch norm, selective-kernel attention, residual; batch norm, MLP, residual; each branch scaled a channel."""

    def __init__(self, channels: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attn = Attention(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = DepthwiseMLP(channels, mlp_ratio * channels)
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1[:, None, None] * self.attn(self.norm1(x))
        return x + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))


class Attention(nn.Module):
    """1x1, GELU, selection of kernels, 1x1, and a residual of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = KernelSelection(channels)
        self.proj_2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x))))


class KernelSelection(nn.Module):
    """The LSK unit: two kernels' responses, each pixel its own mixture of them, multiply the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv0 = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.conv_spatial = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.conv1 = nn.Conv2d(channels, half, 1)
        self.conv2 = nn.Conv2d(channels, half, 1)
        self.conv_squeeze = nn.Conv2d(2, 2, 7, padding=3)
        self.conv = nn.Conv2d(half, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.conv0(x)
        far = self.conv_spatial(near)  # sees 5 + 6 x 3 = 23 pixels
        near, far = self.conv1(near), self.conv2(far)
        both = torch.cat((near, far), 1)
        summary = torch.cat((both.mean(1, keepdim=True), both.amax(1, keepdim=True)), 1)  # (B, 2, H, W)
        near_weight, far_weight = self.conv_squeeze(summary).sigmoid().split(1, dim=1)
        return x * self.conv(near * near_weight + far * far_weight)


class DepthwiseMLP(nn.Module):
    """1x1 to the hidden width, depthwise 3x3, GELU, 1x1 back."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = DepthwiseConvolution(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class DepthwiseConvolution(nn.Module):
    """Depthwise 3x3; a module of its own only for the public checkpoints' key, mlp.dwconv.dwconv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


def _initialise(module: nn.Module) -> None:
    """He et al. over the outputs a weight reaches, groups counted: the depthwise kernels must not start near zero."""
    if isinstance(module, nn.Conv2d):
        outputs = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / outputs) ** 0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
