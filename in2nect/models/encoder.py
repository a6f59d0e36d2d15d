"""Encoders at strides 4, 8, 16 and 32, with or without weights: LSKNet, and any timm network that has these strides."""

from difflib import get_close_matches
from itertools import cycle, islice
from typing import Any, NamedTuple, cast

import timm
from timm.layers import Format
from timm.models import FeatureInfo
from torch import nn

from in2nect.models.lsknet import SIZES, STRIDES, LSKNet
from in2nect.models.pretrained import BUNDLED_MEAN, BUNDLED_STD, load_bundled_weights, load_weights_file
from in2nect.models.registry import Pretrained

_DEFAULT_TAGS = {
    "resnet18": "resnet18.fb_swsl_ig1b_ft_in1k"
}  # the weights that UNetFormer's results were published with
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(NamedTuple):
    """A feature network (B, C, H, W) -> [c2, c3, c4, c5] at ``STRIDES``, with what a decoder and a caller must know."""

    backbone: nn.Module
    channels: tuple[int, ...]
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]


def create_encoder(name: str, *, pretrained: Pretrained = False, in_channels: int = 3) -> Encoder:
    """Make the encoder ``name``: lsknet_t, lsknet_s or one of timm's; arguments and errors as in ``create_model``.

    With ``in_channels`` other than 3 the weights of the first convolution are repeated and rescaled as timm does, and
    the input statistics are repeated in the same order.
    """
    if name in SIZES:
        return _create_lsknet(name, pretrained, in_channels)
    name = _DEFAULT_TAGS.get(name, name)
    options = {"features_only": True, "in_chans": in_channels, **_feature_options(name)}
    backbone = _download(name, options) if pretrained is True else timm.create_model(name, **options)
    configuration = timm.get_pretrained_cfg(name)
    mean, std = (configuration.mean, configuration.std) if configuration else (_IMAGENET_MEAN, _IMAGENET_STD)
    if pretrained == "bundled":
        load_bundled_weights(backbone, name, in_channels)
        mean, std = BUNDLED_MEAN, BUNDLED_STD
    elif not isinstance(pretrained, bool):
        load_weights_file(backbone, name, pretrained, in_channels)
    return _described(backbone, mean, std, in_channels)


def _create_lsknet(name: str, pretrained: Pretrained, in_channels: int) -> Encoder:
    if pretrained is True or pretrained == "bundled":
        raise ValueError(
            f"pretrained is {pretrained!r}, and neither timm's hub nor PyPI has weights of {name!r}; give the path of "
            "a public LSKNet backbone file (pretrained: /path/to/weights.pth), or pretrained: false"
        )
    backbone = LSKNet(SIZES[name], in_channels)
    if pretrained is not False:
        load_weights_file(backbone, name, pretrained, in_channels)
    return _described(backbone, _IMAGENET_MEAN, _IMAGENET_STD, in_channels)


def _described(backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], in_channels: int) -> Encoder:
    return Encoder(
        backbone,
        channels=tuple(_feature_info(backbone).channels()),
        input_mean=_per_channel(mean, in_channels),
        input_std=_per_channel(std, in_channels),
    )


def _feature_options(name: str) -> dict[str, Any]:
    if not timm.is_model(name):
        similar = get_close_matches(name, timm.list_models(), n=3) or ["see timm.list_models()"]
        raise ValueError(f"timm has no network named {name!r}; did you mean: {', '.join(similar)}?")
    probe = timm.create_model(name, features_only=True)
    strides = list(_feature_info(probe).reduction())
    missing = [stride for stride in STRIDES if stride not in strides]
    if missing:
        raise ValueError(
            f"encoder {name!r} has features at strides {strides}, not at {missing}; "
            f"choose one with strides {list(STRIDES)}, such as resnet18, tf_efficientnet_lite0 or convnext_tiny"
        )
    options: dict[str, Any] = {"out_indices": tuple(strides.index(stride) for stride in STRIDES)}
    if getattr(probe, "output_fmt", Format.NCHW) != Format.NCHW:
        options["feature_cls"] = "getter"  # timm's wrapper that gives NCHW
    return options


def _feature_info(backbone: nn.Module) -> FeatureInfo:
    return cast(FeatureInfo, backbone.feature_info)


def _download(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub's clients raise many types, with no base of their own
        raise ConnectionError(
            f"the weights of {name!r} could not be had from timm's hub ({type(error).__name__}: {error}); without "
            "network give their path (pretrained: /path/to/weights.safetensors), or take encoder tf_efficientnet_lite0 "
            "with pretrained: bundled, or pretrained: false"
        ) from error


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(islice(cycle(values), channels))
