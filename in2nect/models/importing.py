"""Public checkpoints into the host networks: three layouts of keys, told by the keys alone, and no key left unsaid.

- ``UNetFormer``: ``backbone.*`` (timm's names) and ``decoder.*`` with ``pre_conv``, ``b4``, ``b3``, ``b2``, ``p3``,
  ``p2``, ``p1``, ``aux_head`` and ``segmentation_head``: 289 entries over resnet18; also a whole LSKNet network that is
  named so. Two things are from memory: the heads may be numbered (``segmentation_head.{0,2}``,
  ``aux_head.{conv,conv_out}``), and a bare convolution may lie in a container of its own (``qkv.0.weight``). The
  network's own names are taken too.
- ``LSKNet backbone``: ``patch_embed1..4``, ``block1..4``, ``norm1..4``, beside an ImageNet classifier ``head``: the
  network's ``backbone``.
- ``MANet``: ``attention1..4``, ``decoder1..4``, ``final*``, with the encoder as ``backbone.*`` or as torchvision's
  ResNet in LinkNet's names, ``firstconv``, ``firstbn``, ``encoder1..4``. The names within are assumed: in the decoder
  those of torchvision-style LinkNet code (``conv1``, ``norm1``, ``deconv2``, ``norm2``, ``conv3``, ``norm3``;
  ``finaldeconv1``, ``finalconv2``, ``finalconv3``), in the attention ``query_conv``, ``key_conv``, ``value_conv`` and
  ``gamma``.

No public file was at hand: one that names a part otherwise is an error that lists what it has and what it lacks.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from in2nect.models.pretrained import listing

_PREFIXES = re.compile(r"((module|net|model)\.)+")  # of DistributedDataParallel, and of the usual LightningModules
_UNETFORMER_HEADS = {
    "decoder.segmentation_head.0.": "decoder.segmentation_head.body.",
    "decoder.segmentation_head.2.": "decoder.segmentation_head.classifier.",
    "decoder.aux_head.conv.": "decoder.aux_head.body.",
    "decoder.aux_head.conv_out.": "decoder.aux_head.classifier.",
}
_LINKNET_TO_TIMM = {"firstconv": "conv1", "firstbn": "bn1"} | {f"encoder{n}": f"layer{n}" for n in range(1, 5)}


@dataclass(frozen=True)
class ImportReport:
    """What became of every key of a file and of every entry of the network that its layout covers.

    Attributes:
        layout: name of the layout, one of ``LAYOUTS``.
        loaded: key of the file -> the network's entry that it filled.
        dropped: keys of the file that belong to the layout and to no segmentation: an ImageNet classifier.
        extra: keys of the file that the network has no place for.
        missing: entries of the network, within the layout, that the file lacks.
        untouched: entries of the network that the layout does not cover: a decoder, where the file is a backbone.
    """

    layout: str
    loaded: dict[str, str]
    dropped: tuple[str, ...]
    extra: tuple[str, ...]
    missing: tuple[str, ...]
    untouched: tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    signature: str  # what a key of every file of this layout matches, and of no other layout's
    rename: Callable[[str], str]  # a key without prefixes -> the network's entry
    covers: str = ""  # prefix of the network's entries
    dropped: str = r"$^"  # nothing

    def needs(self, entry: str) -> bool:
        return entry.startswith(self.covers) and not entry.endswith("num_batches_tracked")


def import_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> ImportReport:
    """Fill a network of ``create_model`` with a public checkpoint's tensors.

    The counters of batch norm (``num_batches_tracked``) may be absent: evaluation does not use them, and old files lack
    them.

    Args:
        model: the network, made with the number of classes and the encoder of the file. It is changed only if all is
            well.
        state: the tensors by key, as ``pretrained.read_state`` reads them from a file. Prefixes ``module.``, ``net.``
            and ``model.`` are taken off.
        strict: whether a missing or an extra key is an error; if not, the report lists them.

    Raises:
        ValueError: keys in no known layout; a tensor of another shape than the network's; with ``strict``, missing or
            extra keys. The message lists them.
    """
    stripped = _without_prefixes(state)
    name, layout = _recognise(stripped.values())
    target = model.state_dict()
    entries = {key: _unwrapped(layout.rename(bare), target) for key, bare in stripped.items()}
    dropped = [key for key, bare in stripped.items() if re.match(layout.dropped, bare)]
    loaded = {key: entry for key, entry in entries.items() if entry in target and key not in dropped}
    filled = set(loaded.values())
    report = ImportReport(
        layout=name,
        loaded=loaded,
        dropped=tuple(dropped),
        extra=tuple(key for key in state if key not in loaded and key not in dropped),
        missing=tuple(entry for entry in target if layout.needs(entry) and entry not in filled),
        untouched=tuple(entry for entry in target if not entry.startswith(layout.covers)),
    )
    _check_once(loaded)
    _check_shapes(state, target, report)
    if strict and (report.missing or report.extra):
        raise ValueError(_mismatch(model, report))
    model.load_state_dict({entry: state[key] for key, entry in loaded.items()}, strict=False)
    return report


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Key of the file -> key without prefixes."""
    return {key: key[found.end() :] if (found := _PREFIXES.match(key)) else key for key in state}


def _unwrapped(entry: str, target: Mapping[str, Tensor]) -> str:
    """The entry of a bare convolution that lies in a container of its own in the file: qkv.0.weight is qkv.weight."""
    bare = re.sub(r"\.0\.(\w+)$", r".\1", entry)
    return bare if entry not in target and bare in target else entry


def _recognise(keys: Iterable[str]) -> tuple[str, _Layout]:
    keys = list(keys)
    for name, layout in _LAYOUTS.items():
        if any(re.match(layout.signature, key) for key in keys):
            return name, layout
    shown = ", ".join(keys[:5]) or "none at all"
    raise ValueError(
        f"the keys are in no known layout (first keys: {shown}); known are {', '.join(_LAYOUTS)}: "
        "see in2nect.models.importing. An encoder's own weights are not imported: give their path as `pretrained`"
    )


def _check_once(loaded: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for key, entry in loaded.items():
        if first.setdefault(entry, key) != key:
            raise ValueError(f"{first[entry]!r} and {key!r} both stand for {entry!r}; keep one of the two in the file")


def _check_shapes(state: Mapping[str, Tensor], target: Mapping[str, Tensor], report: ImportReport) -> None:
    wrong = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(target[entry].shape)}"
        for key, entry in report.loaded.items()
        if state[key].shape != target[entry].shape
    ]
    if wrong:
        raise ValueError(
            f"the shapes of {len(wrong)} tensors do not fit: {listing(wrong)}. Make the network with the number of "
            "classes, the encoder and the in_channels of the file"
        )


def _mismatch(model: nn.Module, report: ImportReport) -> str:
    parts = [f"the {report.layout} checkpoint does not fit {type(model).__name__}"]
    if report.missing:
        parts.append(f"it lacks {len(report.missing)}: {listing(report.missing)}")
    if report.extra:
        parts.append(f"it has {len(report.extra)} with no place: {listing(report.extra)}")
    mend = "Make the network that the file is of, with auxiliary=False where it has no auxiliary head; or strict=False"
    return "; ".join(parts) + ". " + mend


def _unetformer_entry(key: str) -> str:
    for name, entry in _UNETFORMER_HEADS.items():
        if key.startswith(name):
            return entry + key.removeprefix(name)
    return key


def _manet_entry(key: str) -> str:
    first, _, rest = key.partition(".")
    return f"backbone.{_LINKNET_TO_TIMM[first]}.{rest}" if first in _LINKNET_TO_TIMM else key


_LAYOUTS = {
    "MANet": _Layout(r"attention\d\.(PAM|CAM)\.", _manet_entry),
    "LSKNet backbone": _Layout(
        r"patch_embed\d\.", lambda key: f"backbone.{key}", covers="backbone.", dropped=r"head\."
    ),
    "UNetFormer": _Layout(r"decoder\.(pre_conv|segmentation_head)\.", _unetformer_entry),
}
LAYOUTS = tuple(_LAYOUTS)
