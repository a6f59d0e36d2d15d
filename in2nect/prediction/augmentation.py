"""Test-time augmentation: the network sees several views of an image, and the class probabilities of all views,
brought back onto the image's pixels, are averaged.

A view is the image at a scale, mirrored or not. Cost: `cost(views)` forward passes at the image's own size: 4 for
`flips`, 22.5 for `paper`; its largest view holds 2.25 times the pixels. Of the results, one is held beside their sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

from torch import Tensor
from torch.nn import functional

Model = Callable[[Tensor], Tensor]
"""(B, C, H, W) uint8 images to (B, K, H, W) logits."""

AugmentationName = Literal["none", "flips", "paper"]
"""none: the image as it is. flips: it and its horizontal, vertical and double mirror images. paper: the four at scales
0.5, 0.75, 1, 1.25 and 1.5, twenty views."""


@dataclass(frozen=True)
class View:
    """An image at a scale, mirrored along none, one or both of its axes."""

    scale: float = 1.0
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def axes(self) -> list[int]:
        """Dimensions of (B, C, H, W) that are mirrored."""
        return [-2] * self.flip_rows + [-1] * self.flip_columns


def views(name: AugmentationName) -> tuple[View, ...]:
    """The views of a named set.

    Raises:
        ValueError: there is no such set.
    """
    if name not in _SCALES:
        raise ValueError(f"test-time augmentation {name!r}; expected one of {', '.join(_SCALES)}")
    if name == "none":
        return (View(),)
    return tuple(View(scale, *flips) for scale, *flips in product(_SCALES[name], (False, True), (False, True)))


def cost(name: AugmentationName) -> float:
    """Pixels that the network sees, as a multiple of the image's own."""
    return sum(view.scale**2 for view in views(name))


def class_probabilities(model: Model, images: Tensor, num_classes: int, name: AugmentationName = "none") -> Tensor:
    """Class probabilities of images, averaged over the views of a set.

    Images are scaled as training crops are (bilinear, antialiased, rounded to uint8), logits bilinearly back, as
    networks bring theirs to the image's size.

    Args:
        model: called with every view; the sides of a view are those of the image times its scale, rounded: a network
            that takes certain sizes alone is wrapped in `sizes.any_size`.
        images: (B, C, H, W) uint8.
        num_classes: K.
        name: the set of views.

    Returns:
        (B, K, H, W) float32, which add up to 1 over the classes.

    Raises:
        ValueError: there is no such set, or logits of another shape than the view that they are of.
    """
    chosen = views(name)
    total = _of_view(model, images, num_classes, chosen[0])
    for view in chosen[1:]:
        total += _of_view(model, images, num_classes, view)
    return total / len(chosen) if len(chosen) > 1 else total


_SCALES: dict[str, tuple[float, ...]] = {"none": (1.0,), "flips": (1.0,), "paper": (0.5, 0.75, 1.0, 1.25, 1.5)}


def _of_view(model: Model, images: Tensor, num_classes: int, view: View) -> Tensor:
    height, width = images.shape[2:]
    size = (max(1, round(height * view.scale)), max(1, round(width * view.scale)))
    seen = _mirrored(_scaled(images, size), view)
    logits = model(seen)
    expected = (len(images), num_classes, *size)
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"the model returned {tuple(logits.shape)} for images of shape {tuple(seen.shape)}; expected logits "
            f"{expected}"
        )
    return _resized(_mirrored(logits.float(), view), (height, width)).softmax(1)


def _mirrored(values: Tensor, view: View) -> Tensor:
    return values.flip(view.axes) if view.axes else values


def _scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[2:] == size:
        return images
    return _resized(images.float(), size).round_().clamp_(0, 255).to(images.dtype)


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    if values.shape[2:] == size:
        return values
    return functional.interpolate(values, size, mode="bilinear", align_corners=False, antialias=True)
