"""Model files: weights as safetensors, with all that is needed to use them as JSON in the file's header, so that one
file is enough to predict, anywhere. Reading one runs no code of the file. docs/checkpoints.md tells the format.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from in2nect import __version__
from in2nect.data.classes import Classes
from in2nect.files import replacing, write_json
from in2nect.models.pretrained import listing
from in2nect.models.registry import SegmentationModel, create_model, list_models

SUFFIX = ".safetensors"
FORMAT_VERSION = 1
_HEADER = "in2nect"  # key of the JSON among the header's metadata


@dataclass(frozen=True)
class ModelDescription:
    """What a network's weights need beside them.

    Attributes:
        network: name of the network, one of ``list_models()``.
        classes: names, colours and the ignored code.
        mean, std: one value a channel of the image, on the scale where it is 0..1; the input is (x - mean) / std.
        encoder: timm name of its encoder; None for the network's own.
        bands: of a raster, counted from 1, in the order of the channels; None for all.
        metrics: scores of these very weights in a validation, as plain values; None where there was none.
        in2nect_version: which in2nect wrote the file.

    Raises:
        ValueError: mean and std of no channel or of unequal numbers of them, or an std that is not above 0.
    """

    network: str
    classes: Classes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encoder: str | None = None
    bands: tuple[int, ...] | None = None
    metrics: Mapping[str, Any] | None = None
    in2nect_version: str = __version__

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.std or min(self.std) <= 0:
            raise ValueError(
                f"mean: {list(self.mean)}, std: {list(self.std)}; expected one value a channel of each, and an std "
                "above 0"
            )

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of a header, as plain values: what `from_dict` reads back."""
        return {
            "format_version": FORMAT_VERSION,
            "in2nect_version": self.in2nect_version,
            "network": self.network,
            "encoder": self.encoder,
            "in_channels": self.in_channels,
            "bands": None if self.bands is None else list(self.bands),
            "mean": list(self.mean),
            "std": list(self.std),
            **self.classes.to_dict(),
            "metrics": None if self.metrics is None else dict(self.metrics),
        }

    @classmethod
    def from_dict(cls, content: Any) -> "ModelDescription":
        """Reads the JSON of a header; fields that it does not know are left aside.

        Raises:
            ValueError: a newer format, or a field that is missing or holds something else; it is named.
        """
        _check_version(content)
        get = content.get
        in_channels = _checked("in_channels", get("in_channels"), _is_count, "a whole number, 1 or more")
        numbers = f"{in_channels} numbers, one a channel"

        def one_a_channel(values: Any) -> bool:
            return _is_list_of(_is_number, values) and len(values) == in_channels

        mean = _checked("mean", get("mean"), one_a_channel, numbers)
        std = _checked("std", get("std"), one_a_channel, numbers)
        bands = _checked("bands", get("bands"), _is_bands, "numbers of bands counted from 1, or null")
        return cls(
            network=_checked("network", get("network"), _is_text, "the name of a network"),
            classes=Classes.from_dict({name: content[name] for name in ("ignore_index", "classes") if name in content}),
            mean=tuple(mean),
            std=tuple(std),
            encoder=_checked("encoder", get("encoder"), lambda v: v is None or _is_text(v), "a timm name, or null"),
            bands=None if bands is None else tuple(bands),
            metrics=_checked("metrics", get("metrics"), lambda v: v is None or isinstance(v, Mapping), "an object"),
            in2nect_version=_checked("in2nect_version", get("in2nect_version"), _is_text, "a version"),
        )


def make_network(description: ModelDescription, *, auxiliary: bool = False) -> SegmentationModel:
    """The described network with random weights.

    Raises:
        ValueError: a network or an encoder that is not known here.
    """
    if description.network not in list_models():
        raise ValueError(
            f"network {description.network!r} is not known to in2nect {__version__} ({', '.join(list_models())} are); "
            f"the file was written by in2nect {description.in2nect_version}. Upgrade, or, where the network is your "
            "own, register it first (in2nect.models.register_model)"
        )
    return create_model(
        description.network,
        description.classes.num_classes,
        encoder=description.encoder,
        in_channels=description.in_channels,
        auxiliary=auxiliary,
    )


def outline(description: ModelDescription, *, auxiliary: bool = False) -> SegmentationModel:
    """The described network on the meta device: names, shapes and representation at no cost; errors as
    `make_network`.
    """
    with torch.device("meta"):
        return make_network(description, auxiliary=auxiliary)


def save_model(path: str | PathLike[str], state: Mapping[str, Tensor], description: ModelDescription) -> None:
    """Writes a model file, and its description beside it as NAME.json, for people; both atomically.

    Args:
        path: NAME.safetensors.
        state: ``model.state_dict()`` of the described network. What only training needs, its auxiliary head, is left
            out.
        description: what the weights need beside them.

    Raises:
        ValueError: another suffix, or a state that is not the described network's; the message lists what is missing,
            too much or of another shape.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: the name of a model file ends in {SUFFIX}; give it such a name")
    expected = outline(description).state_dict()
    for_training = outline(description, auxiliary=True).state_dict().keys() - expected.keys()
    kept = {name: value.detach() for name, value in state.items() if name not in for_training}
    _check_fit(kept, expected, description)
    # The format wants tensors that are contiguous and share no memory.
    copies = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in kept.items()}
    content = description.to_dict()
    metadata = {"format": "pt", _HEADER: json.dumps(content, allow_nan=False)}  # "pt": Hugging Face's libraries ask
    with replacing(path) as partial:
        partial.write_bytes(save(copies, metadata))  # save_file would make a file that its owner alone may read
    write_json(path.with_suffix(".json"), content)


def load_model(path: str | PathLike[str]) -> tuple[SegmentationModel, ModelDescription]:
    """The network of a model file, on the CPU, in eval mode, without auxiliary head; and its description.

    It takes images (B, C, H, W) that were normalised by the description's mean and std, which are also its
    ``input_mean`` and ``input_std``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a model file, a newer format, a network that is not known here, or weights that do not fit it;
            the message lists them.
    """
    description = read_description(path)
    state = load_file(path)
    with named(path):
        _check_fit(state, outline(description).state_dict(), description)
        model = make_network(description)
    model.load_state_dict(state)
    model.input_mean, model.input_std = description.mean, description.std
    return model.eval(), description


def read_description(path: str | PathLike[str]) -> ModelDescription:
    """The description in the header of a model file; the weights are not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a model file, or a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes): no {SUFFIX} file, or one that was cut short or damaged "
            f"({error}); copy it or write it again"
        ) from error
    if _HEADER not in metadata:
        raise ValueError(
            f"{path}: a {SUFFIX} file, but no model file of in2nect: it does not say what network and classes its "
            "weights are of. `in2nect models import` makes model files of public checkpoints"
        )
    with named(path):
        return ModelDescription.from_dict(json.loads(metadata[_HEADER]))


@contextmanager
def named(path: str | PathLike[str]) -> Iterator[None]:
    """Puts the path of a file before the message of a ValueError about what is in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], description: ModelDescription) -> None:
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "of no use there": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)}, expected {tuple(value.shape)}"
            for name, value in expected.items()
            if name in found and found[name].shape != value.shape
        ],
    }
    told = [f"{len(names)} {what}: {listing(names)}" for what, names in problems.items() if names]
    if told:
        encoder = f" with encoder {description.encoder!r}" if description.encoder else ""
        raise ValueError(f"not the weights of network {description.network!r}{encoder}; {'; '.join(told)}")


def _check_version(content: Any) -> None:
    version = content.get("format_version") if isinstance(content, Mapping) else None
    if not isinstance(version, int):
        raise ValueError(f"format_version: {version!r}; expected a whole number, such as {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version: {version}, and in2nect {__version__} reads up to {FORMAT_VERSION}; the file was written "
            f"by in2nect {content.get('in2nect_version')}: upgrade to that"
        )


def _checked(field: str, value: Any, is_right: Callable[[Any], bool], expected: str) -> Any:
    if not is_right(value):
        raise ValueError(f"{field}: {value!r}; expected {expected}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list_of(is_right: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, list) and all(map(is_right, values))


def _is_bands(values: Any) -> bool:
    return values is None or (_is_list_of(_is_count, values) and len(values) > 0)
