"""Encoders by timm's names: strides, channels, input statistics, and errors that say what to do."""

from typing import Any

import pytest
import timm
import torch

from in2nect.models.encoder import create_encoder


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (64, 128, 256, 512)),
        ("tf_efficientnet_lite0", (24, 40, 112, 320)),  # has stride 2 too
        ("convnext_atto", (40, 80, 160, 320)),
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768)),  # timm gives NHWC unless asked
    ],
)
def test_features_at_the_four_strides(name: str, channels: tuple[int, ...]) -> None:
    encoder = create_encoder(name)
    assert encoder.channels == channels
    with torch.no_grad():
        features = encoder.backbone.eval()(torch.randn(1, 3, 224, 224))
    assert [feature.shape for feature in features] == [
        (1, width, 224 // stride, 224 // stride) for width, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]


def test_strides_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224' has features at strides \[16, 16, 16\], not at"):
        create_encoder("vit_tiny_patch16_224")


def test_unknown_encoder_suggests_names() -> None:
    with pytest.raises(ValueError, match=r"'resnet81'.*resnet18"):
        create_encoder("resnet81")


def test_input_statistics() -> None:
    resnet = create_encoder("resnet18", in_channels=4)
    assert resnet.input_mean == (0.485, 0.456, 0.406, 0.485)
    assert resnet.input_std == (0.229, 0.224, 0.225, 0.229)
    assert create_encoder("tf_efficientnet_lite0").input_mean == (0.5, 0.5, 0.5)


def test_failed_download_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained:
            asked.append(name)
            raise ConnectionError("no route")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        ConnectionError, match=r"weights of .*no route.*pretrained: /path/to/weights.safetensors.*bundled"
    ):
        create_encoder("resnet18", pretrained=True)
    assert asked == ["resnet18.fb_swsl_ig1b_ft_in1k"]
