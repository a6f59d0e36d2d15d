"""The segmentation loss L_seg of Eq. 7: cross-entropy averaged over the labelled pixels, with label smoothing and
Dice as options. Finite, and zero, where a batch has no labelled pixel. One pass over the logits. On several processes
the cross-entropy is of the global batch (`in2nect.distributed`), Dice of each process's own.
"""

import torch
from torch import Tensor, nn

from in2nect.distributed import global_mean
from in2nect.training.settings import LossSettings


class SegmentationLoss(nn.Module):
    """Cross-entropy, plus `dice_weight` times the Dice loss of segmentation_models_pytorch.

    Args:
        settings: label smoothing and the weight of Dice.
        ignore_index: the label that is left out.
    """

    def __init__(self, settings: LossSettings, ignore_index: int = 255) -> None:
        super().__init__()
        self.settings = settings
        self.ignore_index = ignore_index
        self.dice = _dice(ignore_index) if settings.dice_weight else None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss of logits (B, K, H, W) under integer labels (B, H, W)."""
        loss = self.cross_entropy(logits, labels)
        if self.dice is None:
            return loss
        return loss + self.settings.dice_weight * self.dice(logits, labels.long())

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy alone, as an auxiliary head takes it."""
        log_probabilities = logits.log_softmax(1)
        # Rows of pixels, because over (B, K, H, W) torch has no deterministic form on CUDA; summed here, because there
        # a single block would add the rows up. The softmax stays over dimension 1: over rows it takes a CPU three
        # times as long. torch's own mean would be 0 / 0 where nothing is labelled.
        total = nn.functional.nll_loss(
            log_probabilities.permute(0, 2, 3, 1).flatten(0, 2),
            labels.long().flatten(),
            ignore_index=self.ignore_index,
            reduction="none",
        ).sum()
        labelled = labels != self.ignore_index
        smoothing = self.settings.label_smoothing
        if smoothing:
            uniform = torch.where(labelled, -log_probabilities.mean(1), 0.0).sum()
            total = (1 - smoothing) * total + smoothing * uniform
        return global_mean(total, torch.count_nonzero(labelled), process_group="world")


def _dice(ignore_index: int) -> nn.Module:
    from segmentation_models_pytorch.losses import DiceLoss  # seconds to import, and needed for this option alone

    return DiceLoss(mode="multiclass", ignore_index=ignore_index)
