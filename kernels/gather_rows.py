"""The rows at given pixels, interpolated from four cells and normalised on the way, and the gradient of the cells: the
anchors and keys of the ``sampled`` estimator of Eq. 6. O(M d) for M rows, and zeros for the rest of the gradient.

Deterministic without atomics: every (row, corner) is an entry, entries are sorted by cell, and the program at the first
entry of a cell adds them all and writes the cell once, in the features' own dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from in2nect.kernels.interpolation import ZERO_ROW_SQUARE, interpolated, inverse_norm, neighbours
from in2nect.kernels.launch import choose, launch, next_power_of_2, pixel_strides

INT32 = 2**31 - 1


def gather_rows(features: Tensor, indices: Tensor, height: int, width: int, normalize: bool) -> Tensor:
    """Rows (M, d) in float32 or float64 at indices (M,) into (B, height, width); zeros at -1."""
    dim = features.shape[1]
    rows = torch.empty((indices.shape[0], dim), dtype=_accumulator(features), device=features.device)
    if features.numel() == 0:
        return rows.zero_()
    features, *strides = pixel_strides(features)
    entry = choose("gather_rows_forward", features.device, features.dtype, dim)
    block_p = entry.blocks["BLOCK_P"]
    launch(
        gather_rows_forward,
        (triton.cdiv(indices.shape[0], block_p),),
        features,
        indices.contiguous(),
        rows,
        indices.shape[0],
        dim,
        *features.shape[2:],
        height,
        width,
        *strides,
        BLOCK_P=block_p,
        BLOCK_D=min(next_power_of_2(dim), entry.blocks["BLOCK_D"]),
        SAME=tuple(features.shape[2:]) == (height, width),
        NORMALIZE=normalize,
        warps=entry.warps,
        stages=entry.stages,
    )
    return rows


def gather_rows_backward(
    grad: Tensor, features: Tensor, indices: Tensor, height: int, width: int, normalize: bool
) -> Tensor:
    """Gradient of features (B, d, h, w), in their dtype and memory format, from that of the rows (M, d)."""
    gradient = torch.zeros_like(features)
    if features.numel() == 0 or indices.numel() == 0:
        return gradient
    grad, indices = grad.contiguous(), indices.contiguous()
    if normalize:
        grad = _through_norms(grad, features, indices, height, width)
    cells, order, weights = _sorted_entries(features, indices, height, width, grad.dtype)
    target, *strides = pixel_strides(gradient)
    dim = features.shape[1]
    entry = choose("gather_rows_add", features.device, features.dtype, dim)
    launch(
        gather_rows_add,
        (cells.numel(), triton.cdiv(dim, min(next_power_of_2(dim), entry.blocks["BLOCK_D"]))),
        grad,
        cells,
        order,
        weights,
        target,
        cells.numel(),
        indices.numel(),
        dim,
        features.shape[2] * features.shape[3],
        _cells(features),
        *strides,
        BLOCK_D=min(next_power_of_2(dim), entry.blocks["BLOCK_D"]),
        warps=entry.warps,
        stages=entry.stages,
    )
    return gradient if target is gradient else gradient.copy_(target)


def _accumulator(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _cells(features: Tensor) -> int:
    """How many cells there are, which is also the number that stands for none."""
    return features.shape[0] * features.shape[2] * features.shape[3]


def _through_norms(grad: Tensor, features: Tensor, indices: Tensor, height: int, width: int) -> Tensor:
    """Gradient (M, d) of the raw rows from that of the unit rows."""
    raw = torch.empty_like(grad)
    features, *strides = pixel_strides(features)
    dim = features.shape[1]
    entry = choose("gather_rows_through_norms", features.device, features.dtype, dim)
    block_p = entry.blocks["BLOCK_P"]
    launch(
        gather_rows_through_norms,
        (triton.cdiv(indices.shape[0], block_p),),
        grad,
        features,
        indices,
        raw,
        indices.shape[0],
        dim,
        *features.shape[2:],
        height,
        width,
        *strides,
        BLOCK_P=block_p,
        BLOCK_D=min(next_power_of_2(dim), entry.blocks["BLOCK_D"]),
        SAME=tuple(features.shape[2:]) == (height, width),
        warps=entry.warps,
        stages=entry.stages,
    )
    return raw


def _sorted_entries(
    features: Tensor, indices: Tensor, height: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of the entries in ascending order, which entry each is, and the entries' weights (corners, M)."""
    _, _, h, w = features.shape
    corners = 1 if (h, w) == (height, width) else 4
    small = _cells(features) <= INT32  # a shorter number is a shorter sort
    shape = (corners, indices.numel())
    cells = torch.empty(shape, dtype=torch.int32 if small else torch.int64, device=features.device)
    weights = torch.empty(shape, dtype=dtype, device=features.device)
    entry = choose("gather_rows_entries", features.device, features.dtype, features.shape[1])
    block_p = entry.blocks["BLOCK_P"]
    launch(
        gather_rows_entries,
        (triton.cdiv(indices.numel(), block_p),),
        indices,
        cells,
        weights,
        indices.numel(),
        _cells(features),
        h,
        w,
        height,
        width,
        BLOCK_P=block_p,
        SAME=corners == 1,
        warps=entry.warps,
        stages=entry.stages,
    )
    ascending, order = torch.sort(cells.view(-1), stable=True)
    return ascending, order, weights


@triton.jit
def gather_rows_forward(
    features,
    indices,
    rows,
    count,
    d,
    h,
    w,
    height,
    width,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SAME: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """rows[m] = sum over corners of a z, divided by its length for unit rows: a second walk over the channels."""
    ACC: tl.constexpr = rows.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    base, pixel, valid = _find(features, indices, m, count, height, width, stride_image)
    scale = tl.full((BLOCK_P,), 1.0, ACC)
    if NORMALIZE:
        square = tl.zeros((BLOCK_P,), ACC)
        for start in range(0, d, BLOCK_D):
            channel = start + tl.arange(0, BLOCK_D)
            z = interpolated(
                base, pixel, channel, valid, d, h, w, height, width, stride_channel, stride_pixel, SAME, ACC
            )
            square += tl.sum(z * z, 0)
        scale = inverse_norm(square)
    for start in range(0, d, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        z = interpolated(base, pixel, channel, valid, d, h, w, height, width, stride_channel, stride_pixel, SAME, ACC)
        inside = (channel < d)[:, None] & (m < count)[None, :]  # [BLOCK_D, BLOCK_P]
        tl.store(rows + (m * d)[None, :] + channel[:, None], z * scale[None, :], mask=inside)


@triton.jit
def gather_rows_through_norms(
    grad,
    features,
    indices,
    raw,
    count,
    d,
    h,
    w,
    height,
    width,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SAME: tl.constexpr,
):
    """raw[m] = (g - (g . u) u) / ||z||, 0 for zero rows: two walks over the channels."""
    ACC: tl.constexpr = raw.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    base, pixel, valid = _find(features, indices, m, count, height, width, stride_image)
    square = tl.zeros((BLOCK_P,), ACC)
    along = tl.zeros((BLOCK_P,), ACC)  # g . z
    for start in range(0, d, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        z = interpolated(base, pixel, channel, valid, d, h, w, height, width, stride_channel, stride_pixel, SAME, ACC)
        g = tl.load(grad + (m * d)[None, :] + channel[:, None], mask=(channel < d)[:, None] & valid[None, :], other=0.0)
        square += tl.sum(z * z, 0)
        along += tl.sum(z * g, 0)
    scale = tl.where(square <= ZERO_ROW_SQUARE, 0.0, inverse_norm(square))
    for start in range(0, d, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        inside = (channel < d)[:, None] & (m < count)[None, :]  # [BLOCK_D, BLOCK_P]
        place = (m * d)[None, :] + channel[:, None]
        z = interpolated(base, pixel, channel, valid, d, h, w, height, width, stride_channel, stride_pixel, SAME, ACC)
        g = tl.load(grad + place, mask=inside, other=0.0)
        tangent = g - ((scale * along) * scale)[None, :] * z
        tl.store(raw + place, scale[None, :] * tangent, mask=inside)


@triton.jit
def gather_rows_entries(
    indices,
    cells,
    weights,
    count,
    no_cell,
    h,
    w,
    height,
    width,
    BLOCK_P: tl.constexpr,
    SAME: tl.constexpr,
):
    """The cell and the weight of every (corner, row); no cell at index -1 and where the weight is 0."""
    ACC: tl.constexpr = weights.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inside = m < count
    index = tl.load(indices + m, mask=inside, other=-1)
    valid = index >= 0
    index = tl.maximum(index, 0)
    if SAME:
        _store_entry(cells, weights, m, inside, index, tl.full((BLOCK_P,), 1.0, ACC), valid, no_cell)
    else:
        image, pixel = index // (height * width), index % (height * width)
        top, bottom, down = neighbours(pixel // width, h, height, ACC)
        left, right, across = neighbours(pixel % width, w, width, ACC)
        top, bottom = (image * h + top) * w, (image * h + bottom) * w
        up, back = 1 - down, 1 - across
        _store_entry(cells, weights, m, inside, top + left, up * back, valid, no_cell)
        _store_entry(cells, weights, m + count, inside, top + right, up * across, valid, no_cell)
        _store_entry(cells, weights, m + 2 * count, inside, bottom + left, down * back, valid, no_cell)
        _store_entry(cells, weights, m + 3 * count, inside, bottom + right, down * across, valid, no_cell)


@triton.jit
def gather_rows_add(
    grad,
    cells,
    order,
    weights,
    gradient,
    entries,
    count,
    d,
    pixels,
    no_cell,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_D: tl.constexpr,
):
    """dz of one cell: the sum of weight times gradient over its run of entries, by the program at the run's start."""
    ACC: tl.constexpr = grad.dtype.element_ty
    entry = tl.program_id(0)
    cell = tl.load(cells + entry)
    before = tl.load(cells + entry - 1, mask=entry > 0, other=-1)
    if (cell != before) & (cell < no_cell):
        channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = channel < d
        total = tl.zeros((BLOCK_D,), ACC)
        here = cell
        while here == cell:
            which = tl.load(order + entry)
            row = tl.load(grad + (which % count) * d + channel, mask=in_row, other=0.0)  # [BLOCK_D]
            total += tl.load(weights + which) * row
            entry += 1
            here = tl.load(cells + entry, mask=entry < entries, other=-1)
        place = (cell // pixels).to(tl.int64) * stride_image + (cell % pixels).to(tl.int64) * stride_pixel
        place += channel.to(tl.int64) * stride_channel
        tl.store(gradient + place, total.to(gradient.dtype.element_ty), mask=in_row)


@triton.jit
def _find(features, indices, m, count, height, width, stride_image):
    """The image of each row as pointers [1, BLOCK_P], its pixel there, and whether there is one."""
    index = tl.load(indices + m, mask=m < count, other=-1)
    valid = index >= 0
    index = tl.maximum(index, 0)
    pixels = height * width
    return (features + (index // pixels) * stride_image)[None, :], index % pixels, valid


@triton.jit
def _store_entry(cells, weights, entry, inside, cell, weight, valid, no_cell):
    cell = tl.where(valid & (weight != 0.0), cell, no_cell)
    tl.store(cells + entry, cell.to(cells.dtype.element_ty), mask=inside)
    tl.store(weights + entry, weight, mask=inside)
