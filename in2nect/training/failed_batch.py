"""The batch that a training stopped at because something was not finite: a checkpoint of the network as it was before
the step, with the batch in it. `python -m in2nect.training.reproduce FILE` computes it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch

from in2nect.files import replacing

if TYPE_CHECKING:
    from in2nect.training.module import SegmentationModule

_NAMED = 4  # crops of a batch that a message names


def save_failed_batch(
    target: Path,
    module: SegmentationModule,
    batch: Mapping[str, Any],
    batch_idx: int,
    *,
    files: list[str],
    terms: Mapping[str, float],
) -> None:
    """Writes the batch, its files, the loss terms, the weights, and what the random numbers of the step are drawn from;
    tensors and plain values alone, about as large as the weights and the batch.

    Raises:
        OSError, RuntimeError: the file cannot be written.
    """
    trainer = module.trainer
    content: dict[str, Any] = {
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams),
        "failed_batch": {
            **{name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()},
            "files": files,
            "terms": dict(terms),
            "step": module.global_step,
            "epoch": module.current_epoch,
            "batch_idx": batch_idx,
            "rank": module.global_rank,
            "seed": module.batch_seed(batch_idx),
            "precision": str(trainer.precision),
        },
    }
    module.on_save_checkpoint(content)
    with replacing(target) as partial, open(partial, "wb") as file:
        torch.save(content, file)


def crops_in_words(files: list[str], windows: torch.Tensor) -> str:
    """Where the crops of a batch were taken: the image, and its rows and columns of `windows` (B, 4)."""
    places = [
        f"{file} rows {row}-{row + height - 1}, columns {col}-{col + width - 1}"
        for file, (row, col, height, width) in zip(files, windows.tolist(), strict=True)
    ]
    more = f"; and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return "; ".join(places[:_NAMED]) + more
