"""Images of any size for networks that take multiples of some number alone: mirrored at the lower and the right edge
up to the next multiple, and the logits of what was added thrown away.
"""

import torch
from torch import Tensor

from in2nect.prediction.augmentation import Model


def any_size(model: Model, multiple: int) -> Model:
    """`model`, which takes sides that are multiples of `multiple`, as one that takes every size.

    Raises:
        ValueError: `multiple` is below 1.
    """
    if multiple < 1:
        raise ValueError(f"the sides of an image are to be a multiple of {multiple}; expected 1 or more")

    def resizing(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        return model(mirrored(images, multiple))[:, :, :height, :width]

    return resizing


def mirrored(images: Tensor, multiple: int) -> Tensor:
    """Images (B, C, H, W) with sides raised to a multiple by reflection about their last row and column, over and over
    where they are smaller than what is added; as they are where nothing is to be added.
    """
    for axis in (2, 3):
        size = images.shape[axis]
        wanted = -(-size // multiple) * multiple
        if wanted != size:
            images = images.index_select(axis, _reflected(size, wanted).to(images.device))
    return images


def _reflected(size: int, wanted: int) -> Tensor:
    """0, 1, ..., size - 1, size - 2, ..., 1, 0, 1, ..."""
    period = max(2 * (size - 1), 1)
    position = torch.arange(wanted) % period
    return torch.minimum(position, period - position) if size > 1 else torch.zeros_like(position)
