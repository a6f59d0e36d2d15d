"""An exponential moving average of the weights (Polyak averaging with a fixed horizon): torch's AveragedModel under
Lightning's callback. It holds a second copy of the weights, and costs one pass over both a step.
"""

from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights(WeightAveraging):
    """Averages all weights after every step of the optimiser; validation and checkpoints take the average, and a
    checkpoint also holds the weights that the training goes on with.

    The first step's weights begin the average. BatchNorm's running statistics are averaged with the weights (they lag
    behind a little, by the same steps); counters and tables of indices, which are whole numbers, are copied.

    Args:
        decay: share of the old average that is kept, 0 to 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=partial(_average, decay=decay))

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":
            pl_module.setup(stage)  # Lightning calls it behind the callbacks' own: without it there is no network yet
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:  # else there is no training, and the module has the averaged weights
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _average(averaged: list[Tensor], current: list[Tensor], _: Tensor | int, *, decay: float) -> None:
    """Of tensors of one dtype, in place. torch's own average takes integers for numbers, and would round indices."""
    if averaged[0].is_floating_point():
        get_ema_multi_avg_fn(decay)(averaged, current, _)
    else:
        torch._foreach_copy_(averaged, current)
