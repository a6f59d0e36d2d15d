"""``in2nect::intra_exact``: the intra-class loss (Eq. 6) over every pair of pixels, in one operator.

One operator, because its gradient has two parts that largely cancel, of log D and of the positive term: here they are
added before they are rounded to the features' dtype, and no second gradient is ever allocated. O(N^2 d) time; memory
beyond the gradient: with ``triton`` 16 bytes a pixel (unit rows no wider than a tile: see kernels/intra_exact.py), else
the rows in float32 and, with ``reference``, a tile of similarities.
With a process group the anchors are this rank's pixels and the keys those of all ranks: O(N_rank N d), and the rows of
all ranks in memory, in the features' dtype and in float32; they are gathered anew in the backward.
Once differentiable.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from in2nect import distributed, reference
from in2nect.labels import as_grid, check_inputs, valid_mask
from in2nect.ops._registration import accumulation_dtype, define, differentiable, once_differentiable
from in2nect.ops.backend import implementation, kernel, select
from in2nect.ops.class_sums import check_unless_checked, through_normalization, to_features
from in2nect.ops.pair_logsumexp import native_pairs


def intra_exact(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    temperature: float = 1.0,
    normalize: bool = True,
    group: str | None = None,
) -> Tensor:
    """The loss of features under labels on the same grid.

    Args:
        features: (B, d, h, w) in any memory format, or (N, d).
        labels: (B, h, w) or (N,), uint8, int32 or int64.
        num_classes: K.
        ignore_index: label of pixels that belong to no class.
        temperature: tau > 0.
        normalize: compare directions.
        group: name of a process group whose ranks' batches are one (:func:`in2nect.distributed.group_name`); on CUDA
            the host then waits for the device.

    Returns:
        Scalar, float32 or float64 for float64 features.

    Raises:
        ValueError, TypeError: see :func:`in2nect.labels.check_inputs` and :func:`in2nect.labels.check_values`; labels
            on another grid; a temperature that is not positive.
    """
    check_inputs(features, labels, num_classes, "feature")
    grid, grid_labels = as_grid(features, labels)
    if grid.shape[2:] != grid_labels.shape[1:]:
        raise ValueError(
            f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; expected one grid. "
            "Bring one to the other first, as intra_class_loss does."
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number.")
    settings = num_classes, ignore_index, temperature, normalize, group
    return torch.ops.in2nect.intra_exact(grid, grid_labels, *settings)[0]


def _intra_exact(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sum_classes = select("class_sums", features.device)
    check_unless_checked(sum_classes, labels, num_classes, ignore_index)
    sums, counts, squares = sum_classes(features, labels, num_classes, ignore_index, normalize, True)
    if group is not None:
        sums, counts, squares = distributed.sum_over_ranks(sums, counts, squares, group=group)
    weights, pairs = _class_coefficients(counts, sums.dtype)
    anchors = torch.where(pairs > 0, weights, 0.0)
    run = select("intra_exact", features.device) if group is None else partial(_of_all_ranks, group)
    total, log_d = run(features, labels, weights, anchors, ignore_index, temperature, normalize)
    positive = ((sums.square().sum(1) - squares) * pairs).sum() / temperature
    return total - positive, log_d, sums, counts


def _intra_exact_fake(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty((), dtype=dtype),
        features.new_empty((labels.numel(),), dtype=dtype),
        features.new_empty((num_classes, features.shape[1]), dtype=dtype),
        features.new_empty((num_classes,), dtype=torch.int64),
    )


def _intra_exact_backward(
    grad: Tensor,
    features: Tensor,
    labels: Tensor,
    log_d: Tensor,
    sums: Tensor,
    counts: Tensor,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    group: str | None = None,
) -> Tensor:
    ranks = distributed.number_of_ranks(group)  # why, is in in2nect/distributed.py
    grad = grad if ranks == 1 else ranks * grad
    weights, pairs = _class_coefficients(counts, sums.dtype)
    anchors = torch.where(pairs > 0, weights * grad, 0.0)
    own = 2 * grad * pairs / temperature
    run = select("intra_exact_backward", features.device) if group is None else partial(_of_all_ranks_backward, group)
    return run(
        features, labels, log_d, weights, anchors, own[:, None] * sums, own, ignore_index, temperature, normalize
    )


def _intra_exact_backward_fake(
    grad: Tensor,
    features: Tensor,
    labels: Tensor,
    log_d: Tensor,
    sums: Tensor,
    counts: Tensor,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    group: str | None = None,
) -> Tensor:
    return torch.empty_like(features)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    features, labels, _, *ctx.settings = inputs
    _, log_d, sums, counts = output
    ctx.mark_non_differentiable(log_d, sums, counts)
    ctx.save_for_backward(features, labels, log_d, sums, counts)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    return torch.ops.in2nect.intra_exact_backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 6


define(
    "intra_exact(Tensor features, Tensor labels, int num_classes, int ignore_index, float temperature, "
    "bool normalize, str? group=None) -> (Tensor loss, Tensor log_d, Tensor sums, Tensor counts)",
    _intra_exact,
    _intra_exact_fake,
)
define(
    "intra_exact_backward(Tensor grad, Tensor features, Tensor labels, Tensor log_d, Tensor sums, Tensor counts, "
    "int ignore_index, float temperature, bool normalize, str? group=None) -> Tensor",
    _intra_exact_backward,
    _intra_exact_backward_fake,
)
differentiable("intra_exact", _backward, _setup_context)
once_differentiable("intra_exact_backward")


def _class_coefficients(counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each class, (K,) and (K,): w = 1 / n, and 1 / (n (n - 1)); 0 where the class has no pixel, or no pair."""
    n = counts.to(dtype)
    weights = torch.where(counts >= 1, 1 / n.clamp(min=1), 0.0)
    pairs = torch.where(counts >= 2, 1 / (n * (n - 1)).clamp(min=1), 0.0)
    return weights, pairs


@implementation("intra_exact", "reference")
def _reference(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    anchors: Tensor,
    ignore_index: int,
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """``sum_i a_i log D_i`` and log D (N,), from w and a of each class."""
    _, rows, valid, classes = _rows(features, labels, len(weights), ignore_index, normalize)
    row_weights, row_anchors = (torch.where(valid, values[classes], 0.0) for values in (weights, anchors))
    log_d = select("pair_logsumexp", features.device)(rows, None, row_weights, temperature)
    return torch.where(row_anchors > 0, row_anchors * log_d, 0.0).sum(), log_d


@implementation("intra_exact_backward", "reference")
def _reference_backward(
    features: Tensor,
    labels: Tensor,
    log_d: Tensor,
    weights: Tensor,
    anchors: Tensor,
    positive: Tensor,
    own: Tensor,
    ignore_index: int,
    temperature: float,
    normalize: bool,
) -> Tensor:
    """Gradient of the features: of ``sum_i a_i log D_i``, less the positive term's, ``positive[y] - own[y] u``."""
    raw, rows, valid, classes = _rows(features, labels, len(weights), ignore_index, normalize)
    row_weights, row_anchors = (torch.where(valid, values[classes], 0.0) for values in (weights, anchors))
    pair_backward = select("pair_logsumexp_backward", features.device)
    grad_rows, _ = pair_backward(row_anchors, log_d, rows, None, row_weights, temperature)
    grad_rows = _to_raw(grad_rows, raw, rows, classes, positive, own, normalize)
    return to_features(torch.where(valid[:, None], grad_rows, 0.0), features, *labels.shape[1:])


def _to_raw(
    grad_rows: Tensor, raw: Tensor, rows: Tensor, classes: Tensor, positive: Tensor, own: Tensor, normalize: bool
) -> Tensor:
    """Gradient (N, d) of the raw rows, from that of the log D part by what is compared of them."""
    grad_rows = grad_rows - positive[classes] + own[classes, None] * rows
    return through_normalization(grad_rows, rows, raw) if normalize else grad_rows


def _of_all_ranks(
    group: str,
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    anchors: Tensor,
    ignore_index: int,
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`_reference`, with the pixels of all ranks for keys; the first result is of all ranks, the second of
    this one's."""
    of_rank = _AmongRanks.of(features, labels, len(weights), ignore_index, normalize, group)
    log_d = of_rank.rows.new_zeros(labels.numel())
    if len(of_rank.rows):
        run = select("pair_logsumexp", features.device)
        log_d[of_rank.pixels] = run(of_rank.rows, of_rank.keys, weights[of_rank.key_classes], temperature)
    row_anchors = anchors[of_rank.classes]
    total = torch.where(row_anchors > 0, row_anchors * log_d[of_rank.pixels], 0.0).sum()
    return distributed.sum_over_ranks(total, group=group)[0], log_d


def _of_all_ranks_backward(
    group: str,
    features: Tensor,
    labels: Tensor,
    log_d: Tensor,
    weights: Tensor,
    anchors: Tensor,
    positive: Tensor,
    own: Tensor,
    ignore_index: int,
    temperature: float,
    normalize: bool,
) -> Tensor:
    """As :func:`_reference_backward`. What other ranks' anchors send back to their keys, this rank's pixels, comes by a
    sum over ranks."""
    of_rank = _AmongRanks.of(features, labels, len(weights), ignore_index, normalize, group)
    rows, keys, pixels, classes = of_rank.rows, of_rank.keys, of_rank.pixels, of_rank.classes
    grad_rows, grad_keys = torch.zeros_like(rows), torch.zeros_like(keys)
    if len(rows):
        run = select("pair_logsumexp_backward", features.device)
        key_weights = weights[of_rank.key_classes]
        grad_rows, grad_keys = run(anchors[classes], log_d[pixels], rows, keys, key_weights, temperature)
    grad_rows = grad_rows + of_rank.blocks.sum_of_own(grad_keys)
    grad = rows.new_zeros((labels.numel(), rows.shape[1]))
    grad[pixels] = _to_raw(grad_rows, of_rank.raw, rows, classes, positive, own, normalize)
    return to_features(grad, features, *labels.shape[1:])


class _AmongRanks(NamedTuple):
    """The labelled pixels of this rank, n of them, and of all ranks, M."""

    pixels: Tensor  # (n,), flat indices
    raw: Tensor  # (n, d)
    rows: Tensor  # (n, d): what is compared
    classes: Tensor  # (n,)
    keys: Tensor  # (M, d): what is compared of all
    key_classes: Tensor  # (M,)
    blocks: distributed.RowBlocks

    @classmethod
    def of(
        cls, features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool, group: str
    ) -> _AmongRanks:
        raw, flat = reference.all_rows(features, labels, resolution="feature")
        pixels = valid_mask(flat, num_classes, ignore_index).nonzero()[:, 0]
        raw, codes = raw[pixels], flat[pixels]
        blocks = distributed.RowBlocks.of(raw, group)
        # sent as narrow as they are
        keys, key_classes = blocks.gather(raw.to(features.dtype)).to(raw.dtype), blocks.gather(codes).long()
        classes = codes.long()
        if normalize:
            return cls(pixels, raw, reference.unit_rows(raw), classes, reference.unit_rows(keys), key_classes, blocks)
        return cls(pixels, raw, raw, classes, keys, key_classes, blocks)


def _rows(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw rows (N, d), 0 where ignored, and what is compared of them; which are valid (N,), and their classes (N,)."""
    raw, flat = reference.all_rows(features, labels, resolution="feature")
    valid = valid_mask(flat, num_classes, ignore_index)
    raw = torch.where(valid[:, None], raw, 0.0)  # weight 0 alone would let a NaN of an ignored pixel through
    return raw, reference.unit_rows(raw) if normalize else raw, valid, torch.where(valid, flat, 0).long()


for _name in ("intra_exact", "intra_exact_backward"):
    implementation(_name, "cpp")(native_pairs(_name))
# The pairs are pair_logsumexp's, which has kernels there; what is left for torch is O(N d).
implementation("intra_exact", "cuda")(_reference)
implementation("intra_exact_backward", "cuda")(_reference_backward)
implementation("intra_exact", "triton")(kernel("intra_exact"))
implementation("intra_exact_backward", "triton")(kernel("intra_exact", "intra_exact_backward"))
