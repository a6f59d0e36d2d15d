"""The intra-class loss (Eq. 6) over every pair of pixels, and its gradient: class sums for the positive term, log D by
the half matrix, and one pass of the full matrix that writes the gradient once.

For unit rows no wider than a tile it holds, beyond its inputs and the gradient, 16 bytes a pixel: norm, weight, sum and
log D; in the backward a coefficient for the sum. Deterministic sums take 4 more, raw rows 5, wider rows a float32
buffer of the features' size, and features of an odd grid or width a copy of themselves (``as_rows``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from in2nect.kernels.launch import launch
from in2nect.kernels.pair_logsumexp import ELEMENTWISE, PerRow, Positive, as_rows, backward, forward, row_value


def intra_exact(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    anchors: Tensor,
    ignore_index: int,
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """sum_i a_i log D_i and log D (N,) of features (B, d, h, w) under labels (B, h, w), from w (K,) and a (K,)."""
    rows, flat = as_rows(features, wide_loads=True), labels.contiguous().view(-1)
    log_d = weights.new_empty(rows.number)
    forward(rows, PerRow(weights, flat, ignore_index), temperature, log_d, normalize=normalize)
    programs = triton.cdiv(rows.number, ELEMENTWISE)
    partial = log_d.new_empty(programs)
    launch(
        intra_exact_weighted_sum,
        (programs,),
        log_d,
        *PerRow(anchors, flat, ignore_index).arguments,
        partial,
        rows.number,
        BLOCK=ELEMENTWISE,
        warps=4,
        stages=1,
    )
    return partial.sum(), log_d


def intra_exact_backward(
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
    """Gradient of the features, in their dtype and memory format; positive (K, d) and own (K,) as in ``Positive``."""
    flat = labels.contiguous().view(-1)
    gradient = torch.empty_like(features)
    out = as_rows(gradient)
    backward(
        as_rows(features, wide_loads=True),
        PerRow(weights, flat, ignore_index),
        PerRow(anchors, flat, ignore_index),
        log_d,
        temperature,
        out,
        normalize=normalize,
        positive=Positive(positive.contiguous(), own, flat, ignore_index),
    )
    if out.features.shape != gradient.shape or out.features.stride() != gradient.stride():
        gradient.copy_(out.features)  # its pixels have no one stride
    return gradient


@triton.jit
def intra_exact_weighted_sum(log_d, anchors, labels, num_classes, ignore_index, partial, count, BLOCK: tl.constexpr):
    """partial[p] = sum_i a_i log D_i over a program's rows; a row with a_i = 0 may have any D."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    anchor = row_value(anchors, labels, i, inside, num_classes, ignore_index, True)
    term = tl.where(anchor > 0, anchor * tl.load(log_d + i, mask=inside, other=0.0), 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(term, 0))
