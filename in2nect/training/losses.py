"""The segmentation loss L_seg of Eq. 7: cross-entropy averaged over the labelled pixels, with label smoothing, class
weights, hard example mining (Shrivastava et al., CVPR 2016) and Dice as options. Finite, and zero, where a batch has no
labelled pixel. One pass over the logits; mining also sorts one number a pixel. Nothing waits for the device. On several
processes the cross-entropy is of the global batch (`in2nect.distributed`); which pixels are hard, and Dice, are of each
process's own.
"""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from in2nect.distributed import global_mean
from in2nect.training.settings import LossSettings


class SegmentationLoss(nn.Module):
    """Cross-entropy, plus `dice_weight` times the Dice loss of segmentation_models_pytorch.

    Args:
        settings: what is added to the cross-entropy.
        ignore_index: the label that is left out.
        class_weights: (K,) of the cross-entropy; it is part of the state, so that a checkpoint brings it.
    """

    class_weights: Tensor | None

    def __init__(self, settings: LossSettings, ignore_index: int = 255, *, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.ignore_index = ignore_index
        self.dice = _dice(ignore_index) if settings.dice_weight else None
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss of logits (B, K, H, W) under integer labels (B, H, W)."""
        loss = self.cross_entropy(logits, labels)
        if self.dice is None:
            return loss
        return loss + self.settings.dice_weight * self.dice(logits, labels.long())

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy alone, as an auxiliary head takes it: smoothed, weighted, and over the head's own hard pixels.

        Class weights act as in torch: the mean is over their sum.
        """
        log_probabilities = logits.log_softmax(1)
        # Rows of pixels, because over (B, K, H, W) torch has no deterministic form on CUDA; summed here, because there
        # a single block would add the rows up. The softmax stays over dimension 1: over rows it takes a CPU three
        # times as long. torch's own mean would be 0 / 0 where nothing is labelled.
        losses = nn.functional.nll_loss(
            log_probabilities.permute(0, 2, 3, 1).flatten(0, 2),
            labels.long().flatten(),
            ignore_index=self.ignore_index,
            reduction="none",
        )
        labels = labels.flatten()
        kept = labels != self.ignore_index
        if self.settings.ohem_threshold is not None:
            kept = _hard(losses.detach(), kept, self.settings.ohem_threshold, self.settings.ohem_min_kept)
        shares = None if self.class_weights is None else self.class_weights[torch.where(kept, labels, 0).long()]
        if shares is not None:
            losses = losses * shares
        smoothing = self.settings.label_smoothing
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * self._uniform(log_probabilities)
        if smoothing or self.settings.ohem_threshold is not None:
            losses = torch.where(kept, losses, 0.0)
        weight = torch.count_nonzero(kept) if shares is None else torch.where(kept, shares, 0.0).sum()
        return global_mean(losses.sum(), weight, process_group="world")

    def _uniform(self, log_probabilities: Tensor) -> Tensor:
        """Each pixel's cross-entropy against all classes alike, (N,), each with its weight."""
        if self.class_weights is not None:
            log_probabilities = log_probabilities * self.class_weights[:, None, None]
        return -log_probabilities.mean(1).flatten()


def balancing_weights(how: Literal["balanced", "median_frequency"], pixels: NDArray[np.integer]) -> Tensor:
    """Class weights (K,) from the labelled pixels (images, K) of each class in each image.

    `balanced`: n / (K' n_k), of which the mean over the pixels is 1. `median_frequency` (Eigen & Fergus, ICCV 2015):
    median(f) / f_k, f_k being the share of class k in the images that show it. The K' classes that occur are counted;
    another has the weight 1.
    """
    of_class = pixels.sum(0, dtype=np.float64)
    present = of_class > 0
    if how == "balanced":
        ratios = of_class.sum() / (present.sum() * np.maximum(of_class, 1))
    else:
        around = (pixels.sum(1, dtype=np.float64)[:, None] * (pixels > 0)).sum(0)
        frequencies = of_class / np.maximum(around, 1)
        ratios = np.median(frequencies[present]) / np.where(present, frequencies, 1.0)
    return torch.from_numpy(np.where(present, ratios, 1.0)).float()


def _hard(losses: Tensor, labelled: Tensor, threshold: float, least: float) -> Tensor:
    """Which of the labelled pixels (N,) have a true class of a probability below the threshold, or are of the `least`
    share with the lowest one; as the last of these are all that have the same.

    What is sorted are values alone, so that the result is the same every time; the place of the last one is looked up
    on the device.
    """
    descending = torch.where(labelled, losses, -1.0).sort(descending=True).values
    rank = (torch.count_nonzero(labelled) * least).ceil().long()
    # Not by [...]: an index of no dimension is a number, for which torch waits.
    last = torch.where(rank > 0, descending.gather(0, (rank - 1).clamp(min=0)[None]), math.inf)
    return labelled & (~(losses <= -math.log(threshold)) | (losses >= last))  # a loss that is no number is kept


def _dice(ignore_index: int) -> nn.Module:
    from segmentation_models_pytorch.losses import DiceLoss  # seconds to import, and needed for this option alone

    return DiceLoss(mode="multiclass", ignore_index=ignore_index)
