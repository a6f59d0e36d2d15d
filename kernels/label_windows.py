"""Device functions that read labels, and that walk over the label pixels in which cells of the feature grid have a
weight, at label resolution.
"""

from __future__ import annotations

import triton
import triton.language as tl

from in2nect.kernels.interpolation import clamped, share, window


@triton.jit
def load_labels(pointer, mask):
    """Labels as int32 or int64, which hold a negative ignore_index."""
    label = tl.load(pointer, mask=mask, other=0)
    return label.to(tl.int32) if label.dtype == tl.uint8 else label


@triton.jit
def class_of(label, inside):
    """A label as int32; what is no class, or fits no int32, is no class there either."""
    return tl.where(inside, tl.minimum(tl.maximum(label, -1), 0x7FFFFFFF), -1).to(tl.int32)


@triton.jit
def is_wrong(label, num_classes, ignore_index):
    return ((label < 0) | (label >= num_classes)) & (label != ignore_index)


@triton.jit
def wanted_labels(classes, num_classes, ignore_index):
    """The label of each class of a tile; -2, which no :func:`class_of` is, beyond the last and for an ignored one."""
    return tl.where((classes < num_classes) & (classes != ignore_index), classes, -2)


@triton.jit
def class_rows(grad_sums, y, channel, valid, d):
    """g_k of each pixel's class, [BLOCK_D, pixels]; 0 where not valid."""
    place = (y.to(tl.int64) * d)[None, :] + channel[:, None]
    return tl.load(grad_sums + place, mask=valid[None, :] & (channel < d)[:, None], other=0.0)


@triton.jit
def window_sums(
    labels,
    alphas,
    betas,
    cell,
    inside,
    wanted,
    num_classes,
    ignore_index,
    h,
    w,
    height,
    width,
    window_y,
    window_x,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SCALED: tl.constexpr,
    CURVED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
):
    """A_kc, [GROUPS, BLOCK_K, BLOCK_P], and the nine M_cc' of neighbours c' row by row, [BLOCK_P], of a tile of cells.

    Walks over the label pixels which the cells have a weight in, GROUPS label rows at a time. A pixel lies between the
    cell and one neighbour along each axis, to which the rest of the weight goes: before the cell (distance < 0) or
    behind.
    """
    cell, inside = cell[None, :], inside[None, :]  # [1, BLOCK_P]: one layout throughout, so that nothing is exchanged
    if WIDE:
        cell = cell.to(tl.int64)
    cell_y, cell_x = cell // w, cell % w
    first_y, from_y = window(cell_y, h, height, ACC)
    first_x, from_x = window(cell_x, w, width, ACC)
    unit_y, unit_x = tl.full((), 0.5, ACC) / height, tl.full((), 0.5, ACC) / width
    group = tl.arange(0, GROUPS)[:, None]  # [GROUPS, 1]
    # Compared as floats: that gives a number to multiply by, in one instruction.
    wanted = wanted.to(ACC)[None, :, None]  # [1, BLOCK_K, 1]
    weights = tl.zeros((GROUPS, BLOCK_K, BLOCK_P), ACC)
    m00 = tl.zeros((GROUPS, BLOCK_P), ACC)
    m01, m02, m10, m11, m12, m20, m21, m22 = m00, m00, m00, m00, m00, m00, m00, m00
    for dy in range(0, window_y, GROUPS):
        y = first_y + dy + group  # [GROUPS, BLOCK_P]
        down = clamped(from_y + ((dy + group) * (2 * h)).to(ACC), cell_y, h)
        share_y = tl.where((y < height) & inside, share(down, unit_y), 0.0)
        line = y * width + first_x
        before, at, behind = tl.zeros_like(m00), tl.zeros_like(m00), tl.zeros_like(m00)
        # Two steps at a time: the second label is fetched while the first is compared.
        for dx in tl.range(0, window_x, loop_unroll_factor=2):
            across = clamped(from_x + dx * tl.full((), 2.0, ACC) * w, cell_x, w)  # [1, BLOCK_P]
            share_x = tl.where(first_x + dx < width, share(across, unit_x), 0.0)
            weight = share_y * share_x  # [GROUPS, BLOCK_P]
            there = weight != 0.0
            label = load_labels(labels + line + dx, there)
            k = class_of(label, there)
            alpha = weight * tl.load(alphas + line + dx, mask=there, other=0.0) if SCALED else weight
            weights += (k.to(ACC)[:, None, :] == wanted).to(ACC) * alpha[:, None, :]
            if CURVED:
                if SCALED:
                    beta = tl.load(betas + line + dx, mask=there, other=0.0)
                else:
                    valid = (k >= 0) & (k < num_classes) & (label != ignore_index)
                    beta = 2.0 * tl.load(betas + k, mask=valid, other=0.0)
                beta = beta * share_x
                before += tl.where(across < 0, 1.0 - share_x, 0.0) * beta
                at += share_x * beta
                behind += tl.where(across > 0, 1.0 - share_x, 0.0) * beta
        if CURVED:
            above = tl.where(down < 0, 1.0 - share_y, 0.0) * share_y
            below = tl.where(down > 0, 1.0 - share_y, 0.0) * share_y
            level = share_y * share_y
            m00 += above * before
            m01 += above * at
            m02 += above * behind
            m10 += level * before
            m11 += level * at
            m12 += level * behind
            m20 += below * before
            m21 += below * at
            m22 += below * behind
    return (
        weights,
        tl.sum(m00, 0),
        tl.sum(m01, 0),
        tl.sum(m02, 0),
        tl.sum(m10, 0),
        tl.sum(m11, 0),
        tl.sum(m12, 0),
        tl.sum(m20, 0),
        tl.sum(m21, 0),
        tl.sum(m22, 0),
    )


@triton.jit
def window_rows(
    labels,
    alphas,
    grad_sums,
    cell,
    inside,
    channel,
    d,
    num_classes,
    ignore_index,
    h,
    w,
    height,
    width,
    window_y,
    window_x,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
):
    """sum_p a_c(p) alpha_p g_y(p) of a tile of cells, [BLOCK_D, BLOCK_P]: :func:`window_sums` without classes."""
    if WIDE:
        cell = cell.to(tl.int64)
    cell_y, cell_x = cell // w, cell % w
    first_y, from_y = window(cell_y, h, height, ACC)
    first_x, from_x = window(cell_x, w, width, ACC)
    unit_y, unit_x = tl.full((), 0.5, ACC) / height, tl.full((), 0.5, ACC) / width
    total = tl.zeros((BLOCK_D, BLOCK_P), ACC)
    for dy in range(window_y):
        down = clamped(from_y + dy * tl.full((), 2.0, ACC) * h, cell_y, h)
        share_y = tl.where((first_y + dy < height) & inside, share(down, unit_y), 0.0)
        line = (first_y + dy) * width + first_x
        for dx in range(window_x):
            across = clamped(from_x + dx * tl.full((), 2.0, ACC) * w, cell_x, w)
            weight = tl.where(first_x + dx < width, share(across, unit_x), 0.0) * share_y  # [BLOCK_P]
            there = weight != 0.0
            label = load_labels(labels + line + dx, there)
            k = class_of(label, there)
            valid = (k >= 0) & (k < num_classes) & (label != ignore_index)
            if SCALED:
                weight = weight * tl.load(alphas + line + dx, mask=there, other=0.0)
            total += weight[None, :] * class_rows(grad_sums, k, channel, valid, d)
    return total
