"""Device functions that kernels share: bilinear interpolation without materialising it (align_corners=False, as
F.interpolate), in both directions, and the length of a row.

A label pixel Y of H lies at ``(Y + 1/2) h / H - 1/2`` of the h cells. Twice H times that is an integer, so that cells
and weights come from integers: exact for every size, where float32 positions are off by 1e-4 of a cell at h = 1024.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A row whose squared length is at most this counts as zero: ``reference.ZERO_ROW_NORM`` squared.
ZERO_ROW_SQUARE = tl.constexpr(1e-24)
INVERSE_OF_ZERO_ROW = tl.constexpr(1e12)


@triton.jit
def inverse_norm(square):
    """``1 / max(sqrt(square), 1e-12)``: the hardware's reciprocal root, one Newton step better."""
    is_zero = square <= ZERO_ROW_SQUARE
    safe = tl.where(is_zero, 1.0, square)
    approximate = tl.rsqrt(safe)
    refined = approximate * (1.5 - 0.5 * safe * approximate * approximate)
    return tl.where(is_zero, INVERSE_OF_ZERO_ROW, refined)


@triton.jit
def neighbours(pixel, cells, pixels, ACC: tl.constexpr):
    """The two cells around a label pixel along one axis and the upper one's weight."""
    place = tl.maximum((2 * pixel + 1) * cells - pixels, 0)  # 2 H times the position
    lower = place // (2 * pixels)
    weight = (place - lower * (2 * pixels)).to(ACC) / (2 * pixels)
    return lower, tl.minimum(lower + 1, cells - 1), weight


@triton.jit
def interpolated(
    image,
    pixel,
    channel,
    valid,
    d,
    h,
    w,
    height,
    width,
    stride_channel,
    stride_pixel,
    SAME: tl.constexpr,
    ACC: tl.constexpr,
):
    """Rows at label pixels of an image, or each of its own ([1, BLOCK_P]); [BLOCK_D, BLOCK_P], and 0 where not valid.

    What has weight 0 is not read.

    Pixels are along the last axis, so that, where no axis is contiguous neighbouring threads take neighbouring pixels,
    which share their cells.
    """
    channels = image + (channel.to(tl.int64) * stride_channel)[:, None]  # [BLOCK_D, 1]
    there = (channel < d)[:, None] & valid[None, :]
    if SAME:
        offset = pixel.to(tl.int64) * stride_pixel
        return tl.load(channels + offset[None, :], mask=there, other=0.0).to(ACC)
    top, bottom, down = neighbours(pixel // width, h, height, ACC)
    left, right, across = neighbours(pixel % width, w, width, ACC)
    rows = _corner(channels, top * w + left, (1 - down) * (1 - across), there, stride_pixel, ACC)
    rows += _corner(channels, top * w + right, (1 - down) * across, there, stride_pixel, ACC)
    rows += _corner(channels, bottom * w + left, down * (1 - across), there, stride_pixel, ACC)
    rows += _corner(channels, bottom * w + right, down * across, there, stride_pixel, ACC)
    return rows


@triton.jit
def window(cell, cells, pixels, ACC: tl.constexpr):
    """The first label pixel that a cell has a weight in along one axis, and 2 H times its distance from the cell.

    At most ceil(2 H / h) pixels do, one after the other; from one to the next the distance grows by 2 h.
    """
    bound = (2 * cell - 1) * pixels - cells  # pixels with 2 h Y > bound lie less than one cell before the cell
    first = tl.where(bound < 0, 0, tl.maximum(bound, 0) // (2 * cells) + 1)
    distance = (2 * first + 1) * cells - (2 * cell + 1) * pixels
    return first, distance.to(ACC)


@triton.jit
def clamped(distance, cell, cells):
    """A distance of :func:`window`, 0 beyond the centres of the first and the last cell, which own the border."""
    distance = tl.where(cell == 0, tl.maximum(distance, 0.0), distance)
    return tl.where(cell == cells - 1, tl.minimum(distance, 0.0), distance)


@triton.jit
def share(distance, unit):
    """The weight that a cell has in a label pixel at a :func:`clamped` distance; unit = 1 / (2 H)."""
    return tl.maximum(1.0 - tl.abs(distance) * unit, 0.0)


@triton.jit
def _corner(channels, cell, weight, there, stride_pixel, ACC: tl.constexpr):
    mask = there & (weight != 0.0)[None, :]
    return weight[None, :] * tl.load(channels + (cell.to(tl.int64) * stride_pixel)[None, :], mask=mask, other=0.0).to(
        ACC
    )
