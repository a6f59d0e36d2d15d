"""The losses as functions: class means, inter-class loss (Eqs. 5, 10) and intra-class loss (Eq. 6), over the operators.

Time: ``exact`` O(N^2 d), ``sampled`` O(N d + (K m)^2 d), ``moments`` O(N d (K + d)), or O(N K d^2) with a covariance a
class; at label resolution N of ``moments`` is the cells, and a label pixel costs O(K). None keeps an N x N matrix, but
``exact`` holds the rows of every pixel in float32 off the Triton kernels (in C++ the labelled rows, twice), and with
them at label resolution.
Signatures, and results to rounding, are those of :mod:`in2nect.reference`. They are once differentiable, but for
``class_means`` and ``inter_class_loss``, which are any number of times; for second derivatives of the intra-class loss
use :func:`in2nect.reference.intra_class_loss`. Beyond the reference they take a ``process_group``, whose ranks' batches
are one batch; the scale of the gradient is that of :mod:`in2nect.distributed`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from in2nect import distributed, ops, reference
from in2nect.labels import Resolution, as_grid, check_inputs, to_feature_grid
from in2nect.reference import Covariance, Denominator, Estimator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def class_means(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    resolution: Resolution = "label",
    process_group: ProcessGroup | Literal["world"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean representation of each class's pixels (Eq. 3).

    Args:
        features: (B, d, h, w) in any memory format, or (N, d); float32, float64, bfloat16 or float16.
        labels: (B, H, W) or (N,); uint8, int32 or int64.
        num_classes: K, at least 2.
        ignore_index: label of pixels that belong to no class.
        resolution: "label": features are bilinearly brought to the labels (align_corners=False); "feature": labels are
            brought to the feature grid by nearest neighbour.
        process_group: of torch.distributed, over whose ranks the pixels are taken: a group, "world" for all ranks
            (nothing, where torch.distributed is not initialised), or None for the pixels given here. Every rank of the
            group must call, and gets the same means.

    Returns:
        Means (K, d), 0 for absent classes, and counts (K,) int64. Means are float32, or float64 for float64 features.

    Raises:
        ValueError: shapes, K < 2, or (on the CPU; a device-side assertion on CUDA) labels that are neither a class nor
            ``ignore_index``.
        TypeError: dtypes.
    """
    sums, counts, _ = ops.class_sums(
        features,
        labels,
        num_classes,
        ignore_index=ignore_index,
        resolution=resolution,
        group=distributed.group_name(process_group),
    )
    return sums / counts.clamp(min=1)[:, None].to(sums.dtype), counts


def inter_class_loss(means: Tensor, counts: Tensor, etf: Tensor, *, denominator: Denominator = "vertices") -> Tensor:
    """Cross-entropy of the present classes' means against the vertices of a simplex ETF, summed over these classes.

    Args:
        means: (K, d), of :func:`class_means`.
        counts: (K,); a class of count 0 contributes nothing.
        etf: (K, d) vertices, of :func:`in2nect.simplex_etf`.
        denominator: "vertices" (Eq. 10) or "means" (Eq. 5 as printed, which all-zero features satisfy as well as a
            perfect ETF does; there to reproduce the paper).

    Returns:
        Scalar; a zero connected to the graph where no class is present.

    Raises:
        ValueError: shapes that do not fit, or an unknown denominator.
    """
    if means.dim() != 2 or means.shape != etf.shape or counts.shape != means.shape[:1]:
        raise ValueError(
            f"means {tuple(means.shape)}, counts {tuple(counts.shape)}, etf {tuple(etf.shape)}; "
            "expected (K, d), (K,) and (K, d)."
        )
    with _full_precision(means):
        present = counts > 0
        logits = means @ etf.to(means.dtype).T  # (K, K): class mean, vertex
        own = logits.diagonal()
        if denominator == "vertices":
            competitors = torch.logsumexp(logits, dim=1)
        elif denominator == "means":
            lowest = torch.finfo(own.dtype).min
            competitors = torch.logsumexp(own.masked_fill(~present, lowest), dim=0).expand_as(own)
        else:
            raise ValueError(f'denominator is {denominator!r}; expected "vertices" (Eq. 10) or "means" (Eq. 5).')
        return torch.where(present, competitors - own, 0.0).sum()


def intra_class_loss(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    estimator: Estimator = "moments",
    covariance: Covariance = "pooled",
    per_class: int = 256,
    temperature: float = 1.0,
    normalize: bool = True,
    ignore_index: int = 255,
    resolution: Resolution = "label",
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | Literal["world"] | None = None,
) -> Tensor:
    """Class-averaged pairwise loss (Eq. 6): it pulls the pixels of a class together and away from all others'.

    Args:
        features: (B, d, h, w) in any memory format, or (N, d); float32, float64, bfloat16 or float16.
        labels: (B, H, W) or (N,); uint8, int32 or int64.
        num_classes: K, at least 2.
        estimator: of the term log D, the exponentials: "exact" takes every pair, "sampled" draws ``per_class`` anchors
            and keys a class, "moments" expands each class's mean exponential to second order. The positive term is
            exact.
        covariance: of "moments": one for all classes ("pooled", temperature >= 0.5) or each its own ("class", >= 0.2).
        per_class: of "sampled".
        temperature: tau > 0, divides the similarities.
        normalize: compare directions (cosine similarity); False compares raw rows, which "moments" cannot.
        ignore_index: label of pixels that belong to no class.
        resolution: see :func:`class_means`.
        generator: of "sampled"; None takes torch's default one. Of a process group, the first rank's counts.
        process_group: see :func:`class_means`; the loss is the same on every rank.

    Returns:
        Scalar, float32 or float64 for float64 features. Classes with a single pixel are negatives only; where no class
        has two, the result is a zero connected to the graph.

    Raises:
        ValueError: shapes, K < 2, labels (see :func:`class_means`), an unknown name, or a temperature out of the range.
        TypeError: dtypes.
    """
    reference.check_settings(estimator, covariance, temperature, normalize)
    check_inputs(features, labels, num_classes, resolution)
    group = distributed.group_name(process_group)
    with _full_precision(features):
        if estimator == "exact":
            grid, grid_labels = _one_grid(features, labels, resolution)
            return ops.intra_exact(
                grid,
                grid_labels,
                num_classes,
                ignore_index=ignore_index,
                temperature=temperature,
                normalize=normalize,
                group=group,
            )
        if estimator == "moments":
            return ops.class_moments(
                features,
                labels,
                num_classes,
                ignore_index=ignore_index,
                resolution=resolution,
                temperature=temperature,
                covariance=covariance,
                group=group,
            ).loss
        # The features are differentiated along several ways, whose sum is to be rounded to their dtype once.
        features = features.to(ops.accumulation_dtype(features.dtype))
        sums, counts, squares = ops.class_sums(
            features,
            labels,
            num_classes,
            ignore_index=ignore_index,
            resolution=resolution,
            normalize=normalize,
            squares=True,
            group=group,
        )
        n = counts.to(sums.dtype)
        paired = counts >= 2
        pairs = torch.where(paired, n * (n - 1), 1.0)
        positive = torch.where(paired, (sums.square().sum(1) - squares) / (pairs * temperature), 0.0).sum()
        log_d = _sampled(
            features,
            labels,
            num_classes,
            per_class,
            temperature,
            normalize,
            ignore_index,
            resolution,
            counts,
            generator,
            group,
        )
        return log_d - positive


def class_means_and_intra_class_loss(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    covariance: Covariance = "pooled",
    temperature: float = 1.0,
    ignore_index: int = 255,
    resolution: Resolution = "label",
    process_group: ProcessGroup | Literal["world"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`class_means` and :func:`intra_class_loss` by "moments" in the same passes over the features, which also
    write one gradient in place of two; arguments and errors are theirs.

    Returns:
        Means (K, d), counts (K,) int64 and the loss, scalar.
    """
    reference.check_settings("moments", covariance, temperature, normalize=True)
    loss, sums, counts = ops.class_moments(
        features,
        labels,
        num_classes,
        ignore_index=ignore_index,
        resolution=resolution,
        temperature=temperature,
        covariance=covariance,
        sums=True,
        group=distributed.group_name(process_group),
    )
    return sums / counts.clamp(min=1)[:, None].to(sums.dtype), counts, loss


def intra_class_floor(num_classes: int, temperature: float = 1.0) -> float:
    """The intra-class loss of unit rows that sit on a perfect simplex ETF of K classes: what a plot should subtract."""
    own, other = 1.0 / temperature, -1.0 / ((num_classes - 1) * temperature)
    return num_classes * (math.log(math.exp(own) + (num_classes - 1) * math.exp(other)) - own)


def _one_grid(features: Tensor, labels: Tensor, resolution: Resolution) -> tuple[Tensor, Tensor]:
    """Features (B, d, h, w) and labels (B, h, w) on one grid: labels picked at the features', or features upsampled.

    Pairs of upsampled pixels are quadratically many, so beside them the upsampled features are nothing.
    """
    grid, grid_labels = as_grid(features, labels)
    if resolution == "feature":
        return grid, to_feature_grid(grid_labels, *grid.shape[2:])
    height, width = grid_labels.shape[1:]
    if grid.shape[2:] != (height, width):
        grid = grid.to(ops.accumulation_dtype(grid.dtype))
    return reference.label_resolution_rows(grid, height, width), grid_labels


def _weighted(weights: Tensor, log_d: Tensor) -> Tensor:
    """``sum_i weights_i log D_i``, where a row of weight 0 may have log D = -inf."""
    return torch.where(weights > 0, weights * log_d, 0.0).sum()


def _sampled(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    per_class: int,
    temperature: float,
    normalize: bool,
    ignore_index: int,
    resolution: Resolution,
    counts: Tensor,
    generator: torch.Generator | None,
    group: str | None,
) -> Tensor:
    """``sum_k mean_{i in I_k} log D_i`` with log D over keys J, both drawn per class."""
    grid, grid_labels = as_grid(features, labels)
    if resolution == "feature":
        grid_labels = to_feature_grid(grid_labels, *grid.shape[2:])
    height, width = grid_labels.shape[1:]
    seeds = reference.draw_seeds(generator, features.device)
    if group is None:
        drawn = [ops.sample_pixels(grid_labels, num_classes, per_class, s, ignore_index=ignore_index) for s in seeds]
        anchors, keys = (ops.gather_rows(grid, i.flatten(), height, width, normalize=normalize) for i in drawn)
    else:
        indices = ops.sample_global_pixels(grid_labels, num_classes, per_class, seeds, group, ignore_index=ignore_index)
        rows = ops.gather_rows(grid, indices.flatten(), height, width, normalize=normalize, group=group)
        anchors, keys = rows.chunk(2)
    there = torch.arange(per_class, device=counts.device) < counts[:, None]  # (K, m)
    weights = there / counts.clamp(min=1, max=per_class)[:, None].to(anchors.dtype)
    anchor_weights = torch.where(counts[:, None] >= 2, weights, 0.0).flatten()
    return _weighted(anchor_weights, ops.pair_logsumexp(anchors, weights.flatten(), temperature, keys=keys))


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast off: the losses accumulate in float32 or float64 whatever the model runs in."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)
