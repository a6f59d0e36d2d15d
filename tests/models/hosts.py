"""The host networks at a size for tests: the same code over the smallest encoders that show what matters."""

import torch

from in2nect.models import SegmentationModel, create_model
from in2nect.models.encoder import Encoder
from in2nect.models.lsknet import LSKNet, Size
from in2nect.models.unetformer import UNetFormer

# Encoders of timm that are a list of modules and a list of blocks, and one of ours.
HOSTS = (
    ("unetformer", "resnet10t"),
    ("unetformer", "test_efficientnet"),
    ("unetformer", "lsknet"),
    ("manet", "test_efficientnet"),
)


def make(name: str, encoder: str) -> SegmentationModel:
    """A network of five classes."""
    torch.manual_seed(0)
    if encoder == "lsknet":
        size = Size((8, 8, 16, 16), (2, 1, 1, 1))
        return UNetFormer(Encoder(LSKNet(size), size.widths, (0.5,) * 3, (0.25,) * 3), 5)
    return create_model(name, 5, encoder=encoder)
