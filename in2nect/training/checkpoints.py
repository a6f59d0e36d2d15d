"""Checkpoints: which ones a run keeps, and how they reach the disk: under a temporary name beside them, then renamed.

(Lightning's own writer renames out of the system's temporary folder, which on another file system is a copy that a kill
can cut short.)
"""

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from in2nect.files import replacing

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
    """best.ckpt by validation mIoU; nothing is written where there is no validation."""
    return _checkpoint(folder, "best", monitor="val/mean_iou", mode="max")


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
    """Lightning's checkpoint files, written atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(path) as partial:
            torch.save(checkpoint, partial)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Plain values and tensors alone, whatever is asked for: reading a file must not run what it holds."""
        return super().load_checkpoint(path, map_location, weights_only=True)


def _checkpoint(folder: Path, name: str, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename=name, **_NAMING, **options)
