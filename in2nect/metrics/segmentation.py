"""Segmentation scores from one streamed confusion matrix: per-class IoU, F1, precision and recall, their means under
an evaluation protocol, and overall accuracy.

Every score is a ratio of integers of the same matrix, so they agree with one another, and a sum of matrices over
batches and ranks is the matrix of all pixels. Cost: one integer histogram of K^2 bins an update; K^2 numbers of
state.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from in2nect.metrics.protocols import Protocol, averaged_classes


class SegmentationScores(NamedTuple):
    """Scores of a confusion matrix.

    A ratio with a zero denominator says nothing and is NaN. So a class that is neither labelled nor predicted is out
    of every mean, while one that is predicted and never labelled has an IoU and an F1 of 0 and counts in them.

    Attributes:
        confusion: int64 (K, K); row: labelled class, column: predicted class.
        iou: float64 (K,), TP / (TP + FP + FN).
        f1: float64 (K,), 2 TP / (2 TP + FP + FN).
        precision: float64 (K,), TP / (TP + FP).
        recall: float64 (K,), TP / (TP + FN).
        mean_iou: float64 scalar, the mean of `iou` over the averaged classes that are not NaN.
        mean_f1: float64 scalar, likewise of `f1` (the field's "AF").
        overall_accuracy: float64 scalar, correct pixels / scored pixels, of all classes.
        averaged: bool (K,), the classes that the protocol takes its means over.
        mean_iou_all: float64 scalar, as `mean_iou` over every class.
        mean_f1_all: float64 scalar, as `mean_f1` over every class.
    """

    confusion: Tensor
    iou: Tensor
    f1: Tensor
    precision: Tensor
    recall: Tensor
    mean_iou: Tensor
    mean_f1: Tensor
    overall_accuracy: Tensor
    averaged: Tensor
    mean_iou_all: Tensor
    mean_f1_all: Tensor

    @classmethod
    def from_confusion(cls, confusion: Tensor, averaged: Sequence[bool] | None = None) -> "SegmentationScores":
        """Computes every score from a matrix of pixel counts.

        Args:
            confusion: int64 (K, K), row: label, column: prediction.
            averaged: whether each class is part of the means, `protocols.averaged_classes`; None for all of them.
        """
        counts = confusion.double()
        correct, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        # A zero denominator means 0 / 0 in every ratio below, hence NaN.
        iou = correct / (labelled + predicted - correct)
        f1 = 2 * correct / (labelled + predicted)
        accuracy = correct.sum() / counts.sum()
        chosen = torch.tensor([True] * len(iou) if averaged is None else list(averaged), device=confusion.device)
        return cls(
            confusion=confusion,
            iou=iou,
            f1=f1,
            precision=correct / predicted,
            recall=correct / labelled,
            mean_iou=iou[chosen].nanmean(),
            mean_f1=f1[chosen].nanmean(),
            overall_accuracy=accuracy,
            averaged=chosen,
            mean_iou_all=iou.nanmean(),
            mean_f1_all=f1.nanmean(),
        )

    def to_dict(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """The scores as plain numbers, ready for JSON (NaN becomes None).

        Args:
            names: a name for each class; None for "0", "1", ...
        """
        labels = _class_names(names, len(self.iou))
        averaged, pixels = self.averaged.tolist(), self.confusion.sum(1).tolist()
        columns = [_plain(self.iou), _plain(self.f1), _plain(self.precision), _plain(self.recall), pixels]
        keys = ("iou", "f1", "precision", "recall", "pixels")
        return {
            "mean_iou": _plain(self.mean_iou),
            "mean_f1": _plain(self.mean_f1),
            "overall_accuracy": _plain(self.overall_accuracy),
            "averaged": [name for name, part in zip(labels, averaged, strict=True) if part],
            "mean_iou_all": _plain(self.mean_iou_all),
            "mean_f1_all": _plain(self.mean_f1_all),
            "classes": {name: dict(zip(keys, row, strict=True)) for name, *row in zip(labels, *columns, strict=True)},
            "confusion": self.confusion.tolist(),
        }


class SegmentationMetrics(Metric):
    """Accumulates a confusion matrix over batches (and, under torch.distributed, over ranks).

    Args:
        num_classes: K, at least 2.
        names: a name for each class, for tables; None for "0", "1", ...
        ignore_index: the label that is not scored.
        protocol: which classes the means are taken over: all, loveda (all, of its 7 classes) or isprs (all but
            clutter, of its 6).

    Raises:
        ValueError: fewer than 2 classes, another number of names, or classes that are not those of the protocol.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    confusion: Tensor

    def __init__(
        self,
        num_classes: int,
        names: Sequence[str] | None = None,
        ignore_index: int = 255,
        protocol: Protocol = "all",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; segmentation scores need at least 2 classes")
        self.num_classes = num_classes
        self.names = _class_names(names, num_classes)
        self.ignore_index = ignore_index
        self.protocol = protocol
        self.averaged = averaged_classes(protocol, self.names)
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            predictions: (B, H, W) integer class codes.
            labels: (B, H, W) integer class codes or `ignore_index`.

        Raises:
            ValueError: shapes differ, a tensor is not of an integer type, or a scored pixel carries a code outside
                0..K-1.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions have shape {tuple(predictions.shape)} and labels {tuple(labels.shape)}; both must be "
                "(B, H, W): take logits.argmax(1) first, at the size of the labels"
            )
        if predictions.is_floating_point() or labels.is_floating_point():
            raise ValueError(
                f"predictions are {predictions.dtype} and labels {labels.dtype}; both must be integer class codes"
            )
        scored = labels != self.ignore_index
        predicted, labelled = predictions[scored].long(), labels[scored].long()
        self._check_range(predicted, "prediction")
        self._check_range(labelled, "label")
        pairs = labelled * self.num_classes + predicted
        self.confusion += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.confusion)

    def compute(self) -> SegmentationScores:
        """The scores of everything accumulated so far."""
        return SegmentationScores.from_confusion(self.confusion, self.averaged)

    def _check_range(self, codes: Tensor, what: str) -> None:
        outside = codes[(codes < 0) | (codes >= self.num_classes)]
        if outside.numel():
            raise ValueError(
                f"{outside.numel()} pixels carry the {what} {int(outside[0])}; expected 0..{self.num_classes - 1}"
                + (f" or ignore_index {self.ignore_index}" if what == "label" else "")
            )


def _class_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(code) for code in range(num_classes))
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} class names were given ({', '.join(names)}) for {num_classes} classes")
    return tuple(names)


def _plain(values: Tensor) -> Any:
    """Numbers for JSON, which has no NaN."""
    if values.ndim:
        return [_plain(value) for value in values]
    return None if values.isnan() else values.item()
