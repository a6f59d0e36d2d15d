"""Checkpoints: which ones a run keeps, how they reach the disk (under a temporary name beside them, then renamed), and
the model files that are made of them.

(Lightning's own writer renames out of the system's temporary folder, which on another file system is a copy that a kill
can cut short.)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from in2nect.data.classes import Classes
from in2nect.files import replacing
from in2nect.models.files import SUFFIX, ModelDescription, save_model
from in2nect.models.pretrained import UNREADABLE

_BEST = "best"
_NAMING: dict[str, Any] = {"enable_version_counter": False, "auto_insert_metric_name": False}


def checkpoints(folder: Path, every: int = 0) -> list[Callback]:
    """Both checkpoints of a run. best.ckpt comes first: last.ckpt then holds what is known of the best one after the
    same epoch, and not of the epoch before.

    Args:
        every: steps after which last.ckpt is also written within an epoch; 0 for never.
    """
    within = [StepCheckpoint(dirpath=folder, filename="last", every_n_train_steps=every, **_NAMING)] if every else []
    return [best_checkpoint(folder), last_checkpoint(folder), *within]


def best_checkpoint(folder: Path) -> Callback:
    """best.ckpt by validation mIoU, and of it best.safetensors; nothing is written where there is no validation."""
    return _checkpoint(folder, _BEST, monitor="val/mean_iou", mode="max")


def last_checkpoint(folder: Path) -> Callback:
    """last.ckpt after every epoch, to resume from."""
    return _checkpoint(folder, "last", save_on_train_epoch_end=True)


class StepCheckpoint(ModelCheckpoint):
    """A checkpoint after every so many steps, but the last of an epoch: it is still to be validated, and a run that
    went on from there would leave that out.
    """

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any, **options: Any) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            super().on_train_batch_end(trainer, *arguments, **options)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically; with best.ckpt the model file best.safetensors."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(path) as partial:
            torch.save(checkpoint, partial)
        # A kill in between leaves the earlier model file; last.ckpt is then older too, so that a resume writes both.
        if Path(path).name == f"{_BEST}.ckpt":
            save_model(Path(path).with_suffix(SUFFIX), *model_of(checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Plain values and tensors alone, whatever is asked for: reading a file must not run what it holds."""
        return super().load_checkpoint(path, map_location, weights_only=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run; its tensors are read from the disk when they are used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of in2nect, or one that was cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; a run writes them to OUTPUT/checkpoints")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes): another kind of file than the checkpoint of a run, or one that "
            "was cut short or damaged"
        ) from error
    if not isinstance(checkpoint, dict) or not {"classes", "hyper_parameters", "state_dict"} <= checkpoint.keys():
        raise ValueError(f"{path}: holds no classes and settings; it is no checkpoint that `in2nect fit` wrote")
    return checkpoint


def model_of(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], ModelDescription]:
    """What a model file holds of a checkpoint: the weights of the network, as evaluated, and their description."""
    settings, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    prefix = "model."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    bands = checkpoint.get("bands")
    description = ModelDescription(
        network=settings["network"],
        classes=classes_of(checkpoint),
        mean=_decimals(state["input_mean"]),
        std=_decimals(state["input_std"]),
        encoder=settings["encoder"],
        bands=None if bands is None else tuple(bands),
        metrics=checkpoint.get("metrics"),
    )
    return weights, description


def classes_of(checkpoint: Mapping[str, Any]) -> Classes:
    """The classes that the network of a checkpoint tells apart."""
    stored = checkpoint["classes"]
    colors = tuple((red, green, blue) for red, green, blue in stored["colors"])
    return Classes(tuple(stored["names"]), colors, stored["ignore_index"])


def _decimals(values: Tensor) -> tuple[float, ...]:
    """float32 values as the shortest decimals that become the same float32 again: 0.485, not 0.48500001430511475."""
    return tuple(float(str(value)) for value in values.flatten().cpu().numpy())


def _checkpoint(folder: Path, name: str, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename=name, **_NAMING, **options)
