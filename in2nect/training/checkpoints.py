"""Checkpoints: which ones a run keeps, and how they reach the disk: under a temporary name beside them, then renamed.

(Lightning's own writer renames out of the system's temporary folder, which on another file system is a copy that a kill
can cut short.)
"""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from in2nect.report.files import replacing


def checkpoints(folder: Path) -> list[Callback]:
    """Two checkpoints: last.ckpt after every epoch, to resume from, and best.ckpt by validation mIoU."""
    common: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "auto_insert_metric_name": False}
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common)
    best = ModelCheckpoint(filename="best", monitor="val/mean_iou", mode="max", **common)
    return [last, best]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(path) as partial:
            torch.save(checkpoint, partial)
