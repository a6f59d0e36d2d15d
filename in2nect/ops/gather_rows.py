"""``in2nect::gather_rows``: the rows at given pixels, interpolated and normalised on the way; O(M d), whatever the
resolution.

The rows of the ``sampled`` estimator: the upsampled features exist at the drawn pixels only. Once differentiable.
Deterministic: cpp and triton always, for any number of threads; the reference under
torch.use_deterministic_algorithms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from in2nect import distributed, reference
from in2nect.ops._registration import accumulation_dtype, define, differentiable, once_differentiable
from in2nect.ops.backend import implementation, kernel, native_operator, select
from in2nect.ops.class_sums import through_normalization


def gather_rows(
    features: Tensor, indices: Tensor, height: int, width: int, *, normalize: bool = False, group: str | None = None
) -> Tensor:
    """Rows of the features, bilinearly brought to (height, width) with align_corners=False, at flat pixel indices.

    Args:
        features: (B, d, h, w) in any memory format.
        indices: (M,) int64 into (B, height, width), row-major; -1 gives a zero row.
        height, width: of the grid that the indices count.
        normalize: return unit rows.
        group: name of a process group over whose ranks the rows are summed: each index is on one, and -1 on others
            (:func:`in2nect.distributed.group_name`).

    Returns:
        (M, d) in float32, or float64 for float64 features.

    Raises:
        ValueError: shapes.
        RuntimeError: an index outside the grid, on cpp.
    """
    if features.dim() != 4 or indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(
            f"features {tuple(features.shape)} and indices {tuple(indices.shape)} {indices.dtype}; "
            "expected (B, d, h, w) and (M,) int64."
        )
    return torch.ops.in2nect.gather_rows(features, indices, height, width, normalize, group)


def _gather_rows(
    features: Tensor, indices: Tensor, height: int, width: int, normalize: bool, group: str | None = None
) -> Tensor:
    rows = select("gather_rows", features.device)(features, indices, height, width, normalize)
    return rows if group is None else distributed.sum_over_ranks(rows, group=group)[0]


def _gather_rows_fake(
    features: Tensor, indices: Tensor, height: int, width: int, normalize: bool, group: str | None = None
) -> Tensor:
    return features.new_empty((indices.shape[0], features.shape[1]), dtype=accumulation_dtype(features.dtype))


def _gather_rows_backward(
    grad: Tensor, features: Tensor, indices: Tensor, height: int, width: int, normalize: bool
) -> Tensor:
    return select("gather_rows_backward", features.device)(grad, features, indices, height, width, normalize)


def _gather_rows_backward_fake(
    grad: Tensor, features: Tensor, indices: Tensor, height: int, width: int, normalize: bool
) -> Tensor:
    return torch.empty_like(features)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    features, indices, *ctx.settings, ctx.group = inputs
    ctx.save_for_backward(features, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    ranks = distributed.number_of_ranks(ctx.group)
    grad = grad if ranks == 1 else ranks * grad
    return torch.ops.in2nect.gather_rows_backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 5


define(
    "gather_rows(Tensor features, Tensor indices, int height, int width, bool normalize, str? group=None) -> Tensor",
    _gather_rows,
    _gather_rows_fake,
)
define(
    "gather_rows_backward(Tensor grad, Tensor features, Tensor indices, int height, int width, bool normalize) "
    "-> Tensor",
    _gather_rows_backward,
    _gather_rows_backward_fake,
)
differentiable("gather_rows", _backward, _setup_context)
once_differentiable("gather_rows_backward")


@implementation("gather_rows", "reference")
def _reference(features: Tensor, indices: Tensor, height: int, width: int, normalize: bool) -> Tensor:
    rows = _interpolated(features, indices, height, width)
    return reference.unit_rows(rows) if normalize else rows


@implementation("gather_rows_backward", "reference")
def _reference_backward(
    grad: Tensor, features: Tensor, indices: Tensor, height: int, width: int, normalize: bool
) -> Tensor:
    if indices.numel() == 0 or features.numel() == 0:
        return torch.zeros_like(features)
    if normalize:
        rows = _interpolated(features, indices, height, width)
        grad = through_normalization(grad, reference.unit_rows(rows), rows)
    batch, dim, h, w = features.shape
    cells, weights = _corners(indices, h, w, height, width, grad.dtype)
    flat = grad.new_zeros(batch * h * w, dim)
    for corner_cells, corner_weights in zip(cells, weights, strict=True):
        flat.index_add_(0, corner_cells, grad * corner_weights[:, None])
    return torch.empty_like(features).copy_(flat.view(batch, h, w, dim).permute(0, 3, 1, 2))


def _interpolated(features: Tensor, indices: Tensor, height: int, width: int) -> Tensor:
    _, dim, h, w = features.shape
    dtype = accumulation_dtype(features.dtype)
    if indices.numel() == 0 or features.numel() == 0:
        return features.new_zeros((len(indices), dim), dtype=dtype)
    cells, weights = _corners(indices, h, w, height, width, dtype)
    image, row, column = cells // (h * w), cells // w % h, cells % w
    corners = features[image, :, row, column].to(dtype)  # [corners, M, d]
    return (corners * weights[:, :, None]).sum(0)


def _corners(indices: Tensor, h: int, w: int, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Flat cells (corners, M) of the (B, h, w) grid around each pixel, and their bilinear weights, 0 for index -1.

    Four corners, or the cell itself where the grids are one.
    """
    pixel = indices.clamp(min=0)
    if (height, width) == (h, w):
        return pixel[None], (indices >= 0)[None].to(dtype)
    image, y, x = pixel // (height * width), pixel // width % height, pixel % width
    top, bottom, y_weight = _neighbours(y, h, height, dtype)
    left, right, x_weight = _neighbours(x, w, width, dtype)
    rows, columns = torch.stack([top, top, bottom, bottom]), torch.stack([left, right, left, right])
    y_weights = torch.stack([1 - y_weight, 1 - y_weight, y_weight, y_weight])
    x_weights = torch.stack([1 - x_weight, x_weight, 1 - x_weight, x_weight])
    return (image * h + rows) * w + columns, y_weights * x_weights * (indices >= 0)


def _neighbours(pixel: Tensor, cells: int, pixels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper cell and the upper one's weight along one axis, as F.interpolate(align_corners=False) has
    them."""
    position = ((pixel.double() + 0.5) * (cells / pixels) - 0.5).clamp(min=0)  # float32 loses pixels from 2^23 on
    lower = position.long().clamp(max=cells - 1)
    return lower, (lower + 1).clamp(max=cells - 1), (position - lower).to(dtype)


for _name in ("gather_rows", "gather_rows_backward"):
    implementation(_name, "cpp")(native_operator("cpp", _name))
implementation("gather_rows", "triton")(kernel("gather_rows"))
implementation("gather_rows_backward", "triton")(kernel("gather_rows", "gather_rows_backward"))
