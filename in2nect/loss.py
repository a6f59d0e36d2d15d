"""The losses as modules: inter-class, intra-class, and both as the paper adds them (Eq. 7). Training only: nothing of
them is needed to predict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from in2nect import functional
from in2nect.etf import EtfClassifier
from in2nect.labels import Resolution, check_inputs
from in2nect.reference import Covariance, Denominator, Estimator, check_settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class In2NeCTTerms(NamedTuple):
    """What :class:`In2NeCTLoss` returns; scalars, all part of the graph."""

    total: Tensor  # weight * (inter + intra): add it to the segmentation loss
    inter: Tensor
    intra: Tensor


class InterClassLoss(nn.Module):
    """Class means against the vertices of a fixed simplex ETF: :func:`in2nect.functional.inter_class_loss`.

    Args:
        num_classes: K.
        dim: d of the features, at least K - 1.
        denominator: "vertices" (Eq. 10) or "means" (Eq. 5 as printed).
        resolution: "label" or "feature", see :func:`in2nect.functional.class_means`.
        ignore_index: label of pixels that belong to no class.
        seed: of the ETF's rotation.
        process_group: over whose ranks the class means are taken, see :class:`In2NeCTLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        denominator: Denominator = "vertices",
        resolution: Resolution = "label",
        ignore_index: int = 255,
        seed: int = 0,
        process_group: ProcessGroup | Literal["world"] | None = "world",
    ) -> None:
        super().__init__()
        self.classifier = EtfClassifier(num_classes, dim, seed=seed)
        self.num_classes = num_classes
        self.denominator: Denominator = denominator
        self.resolution: Resolution = resolution
        self.ignore_index = ignore_index
        self.process_group: ProcessGroup | Literal["world"] | None = process_group

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of features (B, d, h, w) or (N, d) under labels (B, H, W) or (N,)."""
        check_inputs(features, labels, self.num_classes, self.resolution)
        _check_width(features, self.classifier.weight.shape[1])
        means, counts = functional.class_means(
            features,
            labels,
            self.num_classes,
            ignore_index=self.ignore_index,
            resolution=self.resolution,
            process_group=self.process_group,
        )
        return functional.inter_class_loss(means, counts, self.classifier.weight, denominator=self.denominator)


class IntraClassLoss(nn.Module):
    """Class-averaged pairwise loss: :func:`in2nect.functional.intra_class_loss`, which documents every argument but for
    the process group, whose default is that of :class:`In2NeCTLoss`."""

    def __init__(
        self,
        num_classes: int,
        *,
        estimator: Estimator = "moments",
        covariance: Covariance = "pooled",
        per_class: int = 256,
        temperature: float = 1.0,
        normalize: bool = True,
        resolution: Resolution = "label",
        ignore_index: int = 255,
        process_group: ProcessGroup | Literal["world"] | None = "world",
    ) -> None:
        super().__init__()
        check_settings(estimator, covariance, temperature, normalize)
        self.num_classes = num_classes
        self.estimator: Estimator = estimator
        self.covariance: Covariance = covariance
        self.per_class = per_class
        self.temperature = temperature
        self.normalize = normalize
        self.resolution: Resolution = resolution
        self.ignore_index = ignore_index
        self.process_group: ProcessGroup | Literal["world"] | None = process_group

    def forward(self, features: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Scalar loss of features (B, d, h, w) or (N, d) under labels (B, H, W) or (N,)."""
        return functional.intra_class_loss(
            features,
            labels,
            self.num_classes,
            estimator=self.estimator,
            covariance=self.covariance,
            per_class=self.per_class,
            temperature=self.temperature,
            normalize=self.normalize,
            ignore_index=self.ignore_index,
            resolution=self.resolution,
            generator=generator,
            process_group=self.process_group,
        )

    @property
    def floor(self) -> float:
        """Its value on a perfect simplex ETF of all classes (unit rows): subtract it in plots."""
        return functional.intra_class_floor(self.num_classes, self.temperature)


class In2NeCTLoss(nn.Module):
    """``weight * (inter + intra)`` of Eq. 7, to be added to the segmentation loss::

        tap = RepresentationTap(model)
        criterion = In2NeCTLoss(num_classes, tap.dim)
        loss = cross_entropy(model(x), y) + criterion(tap.features, y).total

    Args:
        num_classes: K, at least 2.
        dim: d of the features, at least K - 1.
        weight: w of Eq. 7; 0.2 is the paper's.
        estimator: of the intra-class loss: "moments" (default), "exact" or "sampled".
        covariance: of "moments": "pooled" or "class".
        per_class: anchors and keys a class of "sampled".
        temperature: of the intra-class loss.
        normalize: whether the intra-class loss compares unit rows (the paper's cosine).
        denominator: of the inter-class loss: "vertices" (Eq. 10) or "means" (Eq. 5 as printed).
        resolution: "label" (the paper's: features upsampled to the labels) or "feature" (labels picked at the grid).
        projection: width d' of a training-only 1x1 convolution and BatchNorm between features and losses. It lets
            features that end in a ReLU meet vertices with negative inner products. Its parameters are this module's:
            give them to the optimiser. None applies the losses to the features themselves, as the paper does.
        ignore_index: label of pixels that belong to no class.
        seed: of the ETF's rotation.
        process_group: of torch.distributed, whose ranks' batches are one batch. "world": all ranks where
            torch.distributed is initialised with more than one, else the batch at hand. Every rank of the group must
            then call at every step; each gets the loss of the global batch, and a gradient which
            DistributedDataParallel's average over ranks makes that of the global batch (:mod:`in2nect.distributed`).
            A ProcessGroup: its ranks. None: the batch at hand, whatever other ranks do.

    Raises:
        ValueError: sizes or settings that cannot work together; the message says which.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        weight: float = 0.2,
        estimator: Estimator = "moments",
        covariance: Covariance = "pooled",
        per_class: int = 256,
        temperature: float = 1.0,
        normalize: bool = True,
        denominator: Denominator = "vertices",
        resolution: Resolution = "label",
        projection: int | None = None,
        ignore_index: int = 255,
        seed: int = 0,
        process_group: ProcessGroup | Literal["world"] | None = "world",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.weight = weight
        self.projection: nn.Module | None = None
        if projection is not None:
            self.projection = nn.Sequential(nn.Conv2d(dim, projection, 1, bias=False), nn.BatchNorm2d(projection))
        self.inter = InterClassLoss(
            num_classes,
            dim if projection is None else projection,
            denominator=denominator,
            resolution=resolution,
            ignore_index=ignore_index,
            seed=seed,
            process_group=process_group,
        )
        self.intra = IntraClassLoss(
            num_classes,
            estimator=estimator,
            covariance=covariance,
            per_class=per_class,
            temperature=temperature,
            normalize=normalize,
            resolution=resolution,
            ignore_index=ignore_index,
            process_group=process_group,
        )

    def forward(self, features: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> In2NeCTTerms:
        """Terms of features (B, d, h, w) or (N, d) under labels (B, H, W) or (N,)."""
        if self.projection is not None:
            check_inputs(features, labels, self.inter.num_classes, self.inter.resolution)
            _check_width(features, self.dim)
            features = self._project(features)
        if self.intra.estimator == "moments":
            inter, intra = self._in_the_same_passes(features, labels)
        else:
            inter = self.inter(features, labels)
            intra = self.intra(features, labels, generator=generator)
        return In2NeCTTerms(self.weight * (inter + intra), inter, intra)

    @property
    def intra_floor(self) -> float:
        """The intra-class loss on a perfect simplex ETF of all classes: subtract it in plots."""
        return self.intra.floor

    def _in_the_same_passes(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both losses from one operator's moments."""
        inter, intra = self.inter, self.intra
        check_inputs(features, labels, inter.num_classes, inter.resolution)
        _check_width(features, inter.classifier.weight.shape[1])
        means, counts, loss = functional.class_means_and_intra_class_loss(
            features,
            labels,
            inter.num_classes,
            covariance=intra.covariance,
            temperature=intra.temperature,
            ignore_index=inter.ignore_index,
            resolution=inter.resolution,
            process_group=inter.process_group,
        )
        return functional.inter_class_loss(means, counts, inter.classifier.weight, denominator=inter.denominator), loss

    def _project(self, features: Tensor) -> Tensor:
        assert self.projection is not None
        features = features.to(next(self.projection.parameters()).dtype)  # autocast, where it is on, casts again
        if features.dim() == 4:
            return self.projection(features)
        return self.projection(features[:, :, None, None]).flatten(1)


def _check_width(features: Tensor, dim: int) -> None:
    if features.shape[1] != dim:
        raise ValueError(
            f"features have {features.shape[1]} channels (shape {tuple(features.shape)}) and the loss was "
            f"built for dim={dim}; build it with dim={features.shape[1]}, or tap the layer of that width."
        )
