"""The segmentation loss L_seg of Eq. 7: cross-entropy averaged over the labelled pixels, with label smoothing and
Dice as options. Finite, and zero, where a batch has no labelled pixel. One pass over the logits.
"""

import torch
from torch import Tensor, nn

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
        # torch's own mean would be 0 / 0 where nothing is labelled.
        total = nn.functional.cross_entropy(
            logits,
            labels.long(),
            ignore_index=self.ignore_index,
            label_smoothing=self.settings.label_smoothing,
            reduction="sum",
        )
        return total / torch.count_nonzero(labels != self.ignore_index).clamp(min=1)


def _dice(ignore_index: int) -> nn.Module:
    from segmentation_models_pytorch.losses import DiceLoss  # seconds to import, and needed for this option alone

    return DiceLoss(mode="multiclass", ignore_index=ignore_index)
