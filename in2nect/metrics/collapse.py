"""Collapse degrees (the paper's Table 2, repaired) and the neural-collapse measures NC1 to NC4 (Papyan, Han and Donoho
2020).

Streaming: sums over batches in float64, O(K d + d^2) memory; no pixel is kept. On several processes each adds up its
own batches, and :meth:`CollapseMetrics.all_reduce` adds these.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from in2nect import distributed, ops, reference
from in2nect.labels import Resolution, valid_mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_STATE = ("_counts", "_sums", "_unit_sums", "_unit_squares", "_second_moment", "_agreeing", "_compared")


class CollapseMetrics:
    """How far representations have collapsed onto their class means, and these onto a simplex ETF; 0 is full collapse.

    Args:
        num_classes: K.
        dim: d.
        ignore_index: label of pixels that belong to no class.
        resolution: where rows are compared: at the feature grid (default) or the labels'.
    """

    def __init__(
        self, num_classes: int, dim: int, *, ignore_index: int = 255, resolution: Resolution = "feature"
    ) -> None:
        self.num_classes = num_classes
        self.dim = dim
        self.ignore_index = ignore_index
        self.resolution: Resolution = resolution
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._counts = torch.zeros(self.num_classes, dtype=torch.int64)
        self._sums = torch.zeros(self.num_classes, self.dim, dtype=torch.float64)
        self._unit_sums = torch.zeros_like(self._sums)
        self._unit_squares = torch.zeros(self.num_classes, dtype=torch.float64)
        self._second_moment = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        self._agreeing, self._compared = torch.zeros(2, dtype=torch.int64).unbind()
        self._of_all = [torch.zeros_like(getattr(self, name)) for name in _STATE]

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features (B, d, h, w) or (N, d), labels (B, H, W) or (N,)."""
        features = features.detach().double()
        class_sums = functools.partial(
            ops.class_sums,
            features,
            labels,
            self.num_classes,
            ignore_index=self.ignore_index,
            resolution=self.resolution,
        )
        sums, counts, _ = class_sums()
        unit_sums, _, unit_squares = class_sums(normalize=True, squares=True)
        rows = self._rows(features, labels)
        self._counts += counts.cpu()
        self._sums += sums.cpu()
        self._unit_sums += unit_sums.cpu()
        self._unit_squares += unit_squares.cpu()
        self._second_moment += (rows.T @ rows).cpu()

    def compute(
        self, classifier: Tensor | None = None, *, global_mean: Literal["classes", "pixels"] = "classes"
    ) -> dict[str, float]:
        """The measures over every batch so far; NaN where there is nothing to measure: those between classes need two.

        Args:
            classifier: (K, d) weights of the classifier; adds "nc3".
            global_mean: mu_G of delta_inter: the mean of the class means (balanced) or of the pixels (as the paper
                defines it).

        Returns:
            delta_inter: ``mean_{k != k'} | cos(mu_k - mu_G, mu_k' - mu_G) + 1/(K'-1) |``, see ``global_mean``.
            delta_intra: ``mean_i ||u_i - mean u of its class||^2`` over unit rows u.
            nc1: ``tr(Sigma_W Sigma_B^+) / K'``, Sigma_W averaged over pixels.
            nc2_equinorm: standard deviation over mean of ``||mu_k - mu_G||``.
            nc2_equiangular: standard deviation of the cosines between centred class means.
            nc3: ``|| W / ||W|| - M / ||M|| ||`` (Frobenius), M the centred class means.
            nc4: share of pixels whose prediction is not their nearest class mean, if :meth:`update_agreement` was
                called.
        """
        present = self._counts > 0
        classes = int(present.sum())
        counts = self._counts[present].double()[:, None]
        means = self._sums[present] / counts
        centred = means - means.mean(0)
        off_diagonal = _cosines(centred)
        origin = means.mean(0) if global_mean == "classes" else self._sums.sum(0) / self._counts.sum()
        norms = centred.norm(dim=1)

        unit_means = self._unit_sums[present] / counts
        scatter = self._unit_squares[present].sum() - (counts * unit_means.square()).sum()
        within = (self._second_moment - (counts * means).T @ means) / counts.sum()
        between = centred.T @ centred / classes
        nan = torch.tensor(float("nan"))
        measures = {
            "delta_inter": (_cosines(means - origin) + 1.0 / max(classes - 1, 1)).abs().mean(),
            "delta_intra": scatter.clamp(min=0.0) / counts.sum(),
            "nc1": torch.trace(within @ torch.linalg.pinv(between, hermitian=True)) / classes if classes > 1 else nan,
            "nc2_equinorm": norms.std(correction=0) / norms.mean() if classes > 1 else nan,
            "nc2_equiangular": off_diagonal.std(correction=0) if classes > 1 else nan,
        }
        if classifier is not None:
            weights = classifier.detach().double().cpu().flatten(1)[present]
            measures["nc3"] = (weights / weights.norm() - centred / centred.norm()).norm()
        if self._compared:
            measures["nc4"] = 1.0 - self._agreeing / self._compared
        return {name: float(value) for name, value in measures.items()}

    def all_reduce(self, process_group: ProcessGroup | Literal["world"] | None = "world") -> None:
        """Add what each rank of a group has added since the last call; then all of them have the same, and go on from
        there. Every rank must call: behind the last :meth:`update`, and once more behind the last
        :meth:`update_agreement`, which needs the means of all.

        Args:
            process_group: "world" for all ranks (nothing is done where torch.distributed is not initialised).
        """
        group = distributed.group_name(process_group)
        if group is None:
            return
        device = "cuda" if dist.get_backend(None if process_group == "world" else process_group) == "nccl" else "cpu"
        added = [(getattr(self, name) - old).to(device) for name, old in zip(_STATE, self._of_all)]
        summed = distributed.sum_over_ranks(*added, group=group)
        self._of_all = [old + new.cpu() for old, new in zip(self._of_all, summed)]
        for name, value in zip(_STATE, self._of_all):
            setattr(self, name, value.clone())

    @torch.no_grad()
    def update_agreement(self, features: Tensor, labels: Tensor, predictions: Tensor) -> None:
        """Second pass, for nc4: compare predictions with the nearest of the class means collected so far.

        Args:
            features: (B, d, h, w) or (N, d).
            labels: (B, H, W) or (N,): which pixels count.
            predictions: the labels' shape: the network's classes.

        Raises:
            RuntimeError: no batch has been added by :meth:`update` yet.
        """
        if not self._counts.any():
            raise RuntimeError("There are no class means to compare with: call update on every batch first.")
        rows = self._rows(features.detach().double(), labels)
        _, flat_labels = reference.all_rows(features, labels, resolution=self.resolution)
        _, flat_predictions = reference.all_rows(features, predictions, resolution=self.resolution)
        mask = valid_mask(flat_labels, self.num_classes, self.ignore_index)
        means = self._sums / self._counts.clamp(min=1)[:, None]
        distances = torch.cdist(rows.cpu(), means).masked_fill(self._counts == 0, float("inf"))
        self._agreeing += (distances.argmin(1) == flat_predictions[mask].cpu()).sum()
        self._compared += len(rows)

    def _rows(self, features: Tensor, labels: Tensor) -> Tensor:
        rows, _ = reference.labelled_rows(
            features, labels, self.num_classes, ignore_index=self.ignore_index, resolution=self.resolution
        )
        return rows


def _cosines(rows: Tensor) -> Tensor:
    """Cosines between different rows, (n (n - 1),)."""
    unit = F.normalize(rows)
    return (unit @ unit.T)[~torch.eye(len(rows), dtype=torch.bool)]
