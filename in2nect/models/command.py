"""`in2nect models list | show | export | import`: the command lines over the registry, `files` and `importing`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from in2nect.models.files import ModelDescription
    from in2nect.models.importing import ImportReport
    from in2nect.models.registry import SegmentationModel

_LISTED_CLASSES = 7  # LoveDA's
_SUMMARY = """usage: in2nect models COMMAND [OPTIONS]

  list    the networks, with their parameters and their representation
  show    what a model file or a checkpoint holds
  export  a checkpoint of a run to a model file, which is enough to predict
  import  a public checkpoint of one of these networks to a model file

in2nect models COMMAND --help explains the options of one; all of them follow. docs/checkpoints.md describes the files.
"""


@dataclass(frozen=True)
class ImportSettings:
    """Makes a model file of a public checkpoint.

    It is told by its keys, which are those of UNetFormer (with any encoder, LSKNet too) or of MANet; every one of them
    is used, or the import fails and lists it. A backbone alone is no model: it is for model.pretrained of
    `in2nect fit`. Nothing in the file is run.

    Attributes:
        network: name of the network that the checkpoint is of; `in2nect models list` shows them.
        classes: class file with the names in the order of the checkpoint's codes, colours and the ignored code.
        output: NAME.safetensors; replaced if it is there.
        encoder: timm name of the checkpoint's encoder; null for the network's own.
        mean: what the checkpoint's training took off each channel, on the scale where an image is 0..1; null for what
            the encoder was trained with. Their number is that of the channels.
        std: what it then divided each channel by.
    """

    network: str
    classes: str
    output: str
    encoder: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def main(arguments: Sequence[str]) -> int:
    """Runs `in2nect models` with its arguments; returns 0, or 2 where no command was given."""
    commands = {"list": _list, "show": _show, "export": _export, "import": _import}
    command, *rest = list(arguments) or [""]
    if command in ("", "-h", "--help"):
        print(_SUMMARY)
        for name in commands:
            _parser(name).print_help()
            print()
        return 0 if command else 2
    if command not in commands:
        raise ValueError(f"in2nect models has no command {command!r}; expected one of {', '.join(commands)}")
    commands[command](_parser(command).parse_args(rest))
    return 0


def _parser(command: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    texts = {
        "list": "Lists the networks that `model.network` takes, each over its own encoder and for 7 classes: their "
        "parameters in evaluation, and in training with the auxiliary head; width and stride of the representation, "
        "which the losses act on.",
        "show": "Shows what a model file, or a checkpoint of a run, holds.",
        "export": "Writes a model file of a checkpoint: the weights of the network, as they are evaluated, without "
        "the auxiliary head, the losses and the state of the training; with a NAME.json beside it, for people.",
        "import": " ".join((ImportSettings.__doc__ or "").split("Attributes:")[0].split()),
    }
    parser = ArgumentParser(prog=f"in2nect models {command}", description=texts[command])
    if command == "show":
        parser.add_argument("file", type=str, help="A .safetensors file of in2nect, or a .ckpt of a run.")
    if command == "export":
        parser.add_argument("checkpoint", type=str, help="A .ckpt of a run.")
        parser.add_argument("--output", type=str, required=True, help="NAME.safetensors; replaced if it is there.")
    if command == "import":
        parser.add_argument("file", type=str, help="A .pth, .pt, .ckpt or .safetensors file.")
        parser.add_class_arguments(ImportSettings)
    return parser


def _list(_: Any) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from in2nect.models.registry import create_model, list_models

    table = Table(box=None, pad_edge=False)
    for column in ("network", "parameters", "in training", "width", "stride"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in list_models():
        with torch.device("meta"):
            plain, full = (create_model(name, _LISTED_CLASSES, auxiliary=auxiliary) for auxiliary in (False, True))
        tapped = plain.representation
        table.add_row(name, _millions(plain), _millions(full), str(tapped.width), str(tapped.stride))
    Console(highlight=False).print(table)


def _show(given: Any) -> None:
    from in2nect.models.files import SUFFIX, outline, read_description

    path = Path(given.file)
    if path.suffix == SUFFIX:
        description = read_description(path)
        print(f"{path}: a model file, written by in2nect {description.in2nect_version}")
    else:
        from in2nect.training.checkpoints import model_of, read_checkpoint

        checkpoint = read_checkpoint(path)
        _, description = model_of(checkpoint)
        print(f"{path}: a checkpoint of epoch {checkpoint['epoch'] + 1}, step {checkpoint['global_step']}")
    _print_description(description)
    network = outline(description)
    tapped = network.representation
    print(f"parameters: {_millions(network)} without auxiliary head")
    print(f"representation: width {tapped.width}, stride {tapped.stride}, the input of {tapped.module}")


def _export(given: Any) -> None:
    from in2nect.models.files import save_model
    from in2nect.training.checkpoints import model_of, read_checkpoint

    save_model(given.output, *model_of(read_checkpoint(Path(given.checkpoint))))
    print(given.output)


def _import(given: Any) -> None:
    from in2nect.data.classes import Classes
    from in2nect.models.files import ModelDescription, named, save_model
    from in2nect.models.importing import import_state_dict
    from in2nect.models.pretrained import read_state
    from in2nect.models.registry import create_model

    if (given.mean is None) != (given.std is None):
        raise ValueError(f"--mean {given.mean} and --std {given.std}: give both, one value a channel, or neither")
    classes = Classes.from_yaml(given.classes)
    in_channels = 3 if given.mean is None else len(given.mean)
    model = create_model(given.network, classes.num_classes, encoder=given.encoder, in_channels=in_channels)
    state = read_state(given.file)
    with named(given.file):
        report = import_state_dict(model, state, strict=False)
        _check_complete(model, report)
    mean, std = given.mean or model.input_mean, given.std or model.input_std
    description = ModelDescription(given.network, classes, tuple(mean), tuple(std), encoder=given.encoder)
    save_model(given.output, model.state_dict(), description)
    print(f"{given.output}: from {len(report.loaded)} tensors in the layout of {report.layout}")


def _check_complete(model: SegmentationModel, report: ImportReport) -> None:
    """Everything that an evaluation needs is there, and nothing without a place; an auxiliary head may be absent."""
    from in2nect.models.pretrained import listing

    if report.untouched:
        raise ValueError(
            f"a backbone alone ({report.layout}), and no decoder to predict with; train one over it: in2nect fit "
            "--model.pretrained=FILE"
        )
    for_training = tuple(f"{name}." for name in model.training_only)
    missing = [name for name in report.missing if not name.startswith(for_training)]
    told = [f"{len(missing)} missing: {listing(missing)}"] if missing else []
    told += [f"{len(report.extra)} of no use there: {listing(report.extra)}"] if report.extra else []
    if told:
        raise ValueError(f"not the weights of this network (layout {report.layout}); {'; '.join(told)}")


def _print_description(description: ModelDescription) -> None:
    bands = "all" if description.bands is None else ", ".join(map(str, description.bands))
    print(f"network: {description.network}, encoder {description.encoder or 'its own'}")
    print(f"input: {description.in_channels} channels, bands {bands}")
    print(f"  mean {_numbers(description.mean)}, std {_numbers(description.std)} (of 0..1)")
    print(f"classes: {description.classes.num_classes}, and {description.classes.ignore_index} is ignored")
    scores = (description.metrics or {}).get("classes", {})
    for code, (name, color) in enumerate(zip(description.classes.names, description.classes.colors)):
        iou = scores.get(name, {}).get("iou")
        print(f"  {code} {name} {color}" + ("" if iou is None else f", IoU {100 * iou:.2f} %"))
    if description.metrics is None:
        print("scores: none; these weights were not validated")
        return
    means = {"mIoU": "mean_iou", "AF": "mean_f1", "OA": "overall_accuracy"}
    found = {name: description.metrics.get(key) for name, key in means.items()}
    print("scores: " + ", ".join(f"{name} {100 * value:.2f} %" for name, value in found.items() if value is not None))
    print(f"  of split {description.metrics.get('split')}, protocol {description.metrics.get('protocol')}")


def _millions(network: Any) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.3f} M"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
