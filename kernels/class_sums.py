"""Per-class sums, counts and sums of squared norms of the rows under a label map, and their gradient: the numerators of
Eq. 3 and the S_k of the positive term of Eq. 6. Each feature is read once, and bound by memory: O(N d).

On the features' own grid a tile of pixels is one product, one-hot labels times rows. At label resolution no upsampled
row is kept: interpolation is linear, so that

    sums_k = sum_c A_kc z_c,      A_kc = sum over the label pixels p of class k of a_c(p) alpha_p

over cells c, with bilinear weights a_c(p), and alpha_p = 1, or 1 / ||z_p|| where rows are normalised: one number a
label pixel. The gradient of a row is alpha_p g_k + beta_p z_p, hence that of a cell

    dz_c = sum_k A_kc g_k + sum_c' M_cc' z_c',      M_cc' = sum_p a_c(p) beta_p a_c'(p),

where c' runs over the cell and its eight neighbours.

Deterministic without atomics: programs write partial sums, which a last kernel adds in a fixed order; each cell of a
gradient is written once. Ignored pixels may hold NaN or Inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from in2nect.kernels.interpolation import ZERO_ROW_SQUARE, interpolated, inverse_norm
from in2nect.kernels.label_windows import (
    class_of,
    class_rows,
    is_wrong,
    load_labels,
    wanted_labels,
    window_rows,
    window_sums,
)
from in2nect.kernels.launch import choose, input_precision, launch, next_power_of_2, pixel_strides, processors
from in2nect.kernels.table import Entry

DOT_ROWS = 16  # classes of a tile at least: the height of a tensor-core product
MOST_CLASSES = 64  # of a tile; more classes are several tiles, which run side by side and share their reads in L2
CLASS_NUMBERS = 16  # a thread of a tile of classes and pixels at most: a few such arrays are held in registers
FEW_LABELS = 8  # classes of a tile at least where a thread holds more than sums, so that it takes few labels at a time
WIDE_PROGRAMS = 2  # a multiprocessor holds, of 128 threads, where a tile of more than 16 classes takes 255 registers
INT32 = 2**31 - 1


def class_sums(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (K, d), counts (K,) int64 and squares (K,) or (0,) of features (B, d, h, w) under labels (B, H, W).

    On CUDA, a label that is neither a class nor ``ignore_index`` raises a device-side assertion.
    """
    dim, device = features.shape[1], features.device
    sums = torch.empty((num_classes, dim), dtype=_accumulator(features), device=device)
    counts = torch.empty(num_classes, dtype=torch.int64, device=device)
    squared = torch.empty(num_classes if squares else 0, dtype=sums.dtype, device=device)
    if labels.numel() == 0:
        return sums.zero_(), counts.zero_(), squared.zero_()
    all_right = torch.empty((), dtype=torch.bool, device=device)
    at = _Place(*pixel_strides(features))
    classes = _Classes(labels.contiguous(), num_classes, ignore_index)
    walk = _same_grid if features.shape[2:] == labels.shape[1:] else _label_resolution
    _add(walk(at, classes, normalize, squares), sums, counts, squared, all_right)
    if device.type == "cuda":
        expected = f"in 0..{num_classes - 1} nor ignore_index={ignore_index}"
        torch._assert_async(all_right, f"in2nect: a label is neither {expected}")
    return sums, counts, squared


def class_sums_backward(
    grad_sums: Tensor,
    grad_squares: Tensor | None,
    features: Tensor,
    labels: Tensor,
    ignore_index: int,
    normalize: bool,
) -> Tensor:
    """Gradient of features (B, d, h, w), in their dtype and memory format, from those of sums and squares."""
    gradient = torch.empty_like(features)
    if features.numel() == 0:
        return gradient
    if labels.numel() == 0:
        return gradient.zero_()
    grad_sums = grad_sums.contiguous()
    # The squares of unit rows are 1: they have no gradient.
    grad_squares = None if grad_squares is None or normalize else grad_squares.contiguous()
    at, to = _Place(*pixel_strides(features)), _Place(*pixel_strides(gradient))
    classes = _Classes(labels.contiguous(), grad_sums.shape[0], ignore_index)
    walk = _same_grid_backward if features.shape[2:] == labels.shape[1:] else _cells_backward
    walk(grad_sums, grad_squares, at, classes, normalize, to)
    return gradient if to.features is gradient else gradient.copy_(to.features)


class _Place(NamedTuple):
    """Features (B, d, h, w) and where they lie; one stride walks through the pixels of an image."""

    features: Tensor
    image: int
    channel: int
    pixel: int

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.image, self.channel, self.pixel

    @property
    def is_one_walk(self) -> bool:
        """Whether one stride walks through the pixels of all images, in 32 bits."""
        batch, _, h, w = self.features.shape
        return (batch == 1 or self.image == h * w * self.pixel) and batch * h * w <= INT32

    @property
    def loads_are_wide(self) -> bool:
        """Whether 16 bytes may be loaded at once; else the addresses of a tile take many times the registers."""
        return all(stride == 1 or stride % 16 == 0 for stride in self.strides) and 1 in self.strides[1:]

    def is_near(self, block_p: int, block_d: int) -> bool:
        """Whether 32 bits hold the offsets within a tile."""
        return block_p * self.pixel + block_d * self.channel <= INT32


class _Classes(NamedTuple):
    """Contiguous labels (B, H, W), and which of them are classes."""

    labels: Tensor
    num_classes: int
    ignore_index: int


class _Partial(NamedTuple):
    """What programs write, a slot each: sums (slots, K, d), counts (slots, K), squares (slots, K), wrong (slots,)."""

    sums: Tensor
    counts: Tensor
    squares: Tensor
    wrong: Tensor


def _accumulator(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _most_classes(features: Tensor, loads_are_wide: bool = True) -> int:
    """Of a tile; numbers of 64 bits, and addresses of single numbers, take twice the registers."""
    return MOST_CLASSES if loads_are_wide and features.dtype != torch.float64 else MOST_CLASSES // 2


def _pixels_of_tile(entry: Entry, classes: int) -> int:
    return min(entry.blocks["BLOCK_P"], CLASS_NUMBERS * 32 * entry.warps // classes)


def _same_grid(at: _Place, classes: _Classes, normalize: bool, squares: bool) -> _Partial:
    features, labels = at.features, classes.labels
    batch, dim, h, w = features.shape
    images, pixels = (1, batch * h * w) if at.is_one_walk else (batch, h * w)
    accumulator, device = _accumulator(features), features.device
    # Unit rows are float32 in the tile, whatever the features are.
    entry = choose("class_sums_same_grid", device, accumulator if normalize else features.dtype, dim)
    block_k = min(next_power_of_2(classes.num_classes), _most_classes(features, at.loads_are_wide))
    block_d = min(next_power_of_2(dim), entry.blocks["BLOCK_D"])
    block_p = _pixels_of_tile(entry, block_k) if at.loads_are_wide else DOT_ROWS
    k_blocks, d_blocks = triton.cdiv(classes.num_classes, block_k), triton.cdiv(dim, block_d)
    resident = entry.blocks["PROGRAMS"] if block_k == DOT_ROWS else min(entry.blocks["PROGRAMS"], WIDE_PROGRAMS)
    slots = max(1, min(images * triton.cdiv(pixels, block_p), resident * processors(device) // (k_blocks * d_blocks)))

    # Unit rows need the whole row: in one tile where it fits, else a pass for the norms comes first.
    scaled = normalize and d_blocks > 1
    scales = _norms(at, classes, normalize=True, squares=False)[0] if scaled else features
    partial = _Partial(
        torch.empty((slots, classes.num_classes, dim), dtype=accumulator, device=device),
        torch.empty((slots, classes.num_classes), dtype=torch.int32, device=device),
        torch.empty((slots * d_blocks if squares else 0, classes.num_classes), dtype=accumulator, device=device),
        torch.empty(slots, dtype=torch.int32, device=device),
    )
    arguments = (features, labels, scales, *partial, images, pixels, dim, *classes[1:], *at.strides)
    launch(
        class_sums_same_grid,
        (k_blocks, slots, d_blocks),
        *arguments,
        BLOCK_K=block_k,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        NORMALIZE=normalize and not scaled,
        SCALED=scaled,
        SQUARES=squares,
        PRECISION=input_precision(accumulator if normalize else features.dtype),
        NEAR=at.is_near(block_p, block_d),
        warps=entry.warps,
        stages=entry.stages,
    )
    return partial


def _label_resolution(at: _Place, classes: _Classes, normalize: bool, squares: bool) -> _Partial:
    features, labels = at.features, classes.labels
    batch, dim, h, w = features.shape
    accumulator, device = _accumulator(features), features.device
    counts, wrong = _counts(classes)
    scales, squared = features, torch.empty((0, classes.num_classes), dtype=accumulator, device=device)
    if normalize or squares:
        scales, squared = _norms(at, classes, normalize=normalize, squares=squares)

    entry = choose("class_sums_cells", device, features.dtype, dim)
    few = FEW_LABELS if accumulator == torch.float64 else 1
    block_k = min(max(triton.next_power_of_2(classes.num_classes), few), _most_classes(features, at.loads_are_wide))
    groups = max(1, DOT_ROWS // block_k)
    block_d = min(next_power_of_2(dim), entry.blocks["BLOCK_D"])
    block_p = _pixels_of_tile(entry, block_k * groups) if at.loads_are_wide else DOT_ROWS
    k_blocks, d_blocks = triton.cdiv(classes.num_classes, block_k), triton.cdiv(dim, block_d)
    programs = entry.blocks["PROGRAMS"] * processors(device) // (k_blocks * d_blocks)
    slots = max(1, min(batch * triton.cdiv(h * w, block_p), programs))
    sums = torch.empty((slots * groups, classes.num_classes, dim), dtype=accumulator, device=device)
    arguments = (features, labels, scales, sums, batch, *_grids(at, classes), dim, *classes[1:], *at.strides)
    launch(
        class_sums_cells,
        (k_blocks, slots, d_blocks),
        *arguments,
        BLOCK_K=block_k,
        GROUPS=groups,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        SCALED=normalize,
        PRECISION=input_precision(accumulator),
        NEAR=at.is_near(block_p, block_d),
        WIDE=_is_wide(at, classes),
        warps=entry.warps,
        stages=entry.stages,
    )
    return _Partial(sums, counts, squared, wrong)


def _counts(classes: _Classes) -> tuple[Tensor, Tensor]:
    """Partial counts (slots, K) of the classes and (slots,) of the wrong labels."""
    labels, device = classes.labels, classes.labels.device
    entry = choose("class_sums_counts", device, torch.float32, 1)
    block_p = entry.blocks["BLOCK_P"]
    slots = min(triton.cdiv(labels.numel(), block_p), entry.blocks["PROGRAMS"] * processors(device))
    counts = torch.empty((slots, classes.num_classes), dtype=torch.int32, device=device)
    wrong = torch.empty(slots, dtype=torch.int32, device=device)
    launch(
        class_sums_counts,
        (slots,),
        *(labels, counts, wrong, labels.numel(), *classes[1:]),
        BLOCK_K=next_power_of_2(classes.num_classes),
        BLOCK_P=block_p,
        warps=entry.warps,
        stages=entry.stages,
    )
    return counts, wrong


def _norms(
    at: _Place, classes: _Classes, *, normalize: bool, squares: bool, grad_sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """1 / ||z_p|| of each label pixel, and partial squares (slots, K); or, given grad_sums, alpha and beta."""
    features, labels = at.features, classes.labels
    batch, dim = features.shape[:2]
    accumulator, device = _accumulator(features), features.device
    entry = choose("class_sums_norms", device, features.dtype, dim)
    block_p = entry.blocks["BLOCK_P"]
    tiles = batch * triton.cdiv(labels.shape[1] * labels.shape[2], block_p)
    slots = min(tiles, entry.blocks["PROGRAMS"] * processors(device))
    alphas = torch.empty(labels.shape if normalize else (0,), dtype=accumulator, device=device)
    betas = torch.empty(labels.shape if grad_sums is not None else (0,), dtype=accumulator, device=device)
    squared = torch.empty((slots if squares else 0, classes.num_classes), dtype=accumulator, device=device)
    pointers = (features, labels, features if grad_sums is None else grad_sums, alphas, betas, squared)
    launch(
        class_sums_norms,
        (slots,),
        *(*pointers, batch, *_grids(at, classes)[:4], dim, *classes[1:], *at.strides),
        BLOCK_K=triton.next_power_of_2(classes.num_classes),
        BLOCK_P=block_p,
        BLOCK_D=min(next_power_of_2(dim), entry.blocks["BLOCK_D"]),
        SAME=features.shape[2:] == labels.shape[1:],
        NORMALIZE=normalize,
        SQUARES=squares,
        BACKWARD=grad_sums is not None,
        WIDE=_is_wide(at, classes),
        warps=entry.warps,
        stages=entry.stages,
    )
    return alphas, squared if grad_sums is None else betas


def _add(partial: _Partial, sums: Tensor, counts: Tensor, squares: Tensor, all_right: Tensor) -> None:
    entry = choose("class_sums_add", sums.device, sums.dtype, sums.shape[1])
    block_e = entry.blocks["BLOCK_E"]
    slots = [part.shape[0] for part in partial[:3]]
    launch(
        class_sums_add,
        (triton.cdiv(sums.numel(), block_e) + triton.cdiv(counts.numel(), block_e),),
        *(*partial, sums, counts, squares, all_right, *slots, sums.numel(), counts.numel()),
        BLOCK_S=min(next_power_of_2(max(slots)), entry.blocks["BLOCK_S"]),
        BLOCK_E=block_e,
        warps=entry.warps,
        stages=entry.stages,
    )


def _same_grid_backward(
    grad_sums: Tensor, grad_squares: Tensor | None, at: _Place, classes: _Classes, normalize: bool, to: _Place
) -> None:
    features = at.features
    batch, dim, h, w = features.shape
    images, pixels = (1, batch * h * w) if at.is_one_walk and to.is_one_walk else (batch, h * w)
    entry = choose("class_sums_backward_same_grid", features.device, features.dtype, dim)
    block_p = entry.blocks["BLOCK_P"]
    upstream = (grad_sums, grad_sums if grad_squares is None else grad_squares)
    launch(
        class_sums_backward_same_grid,
        (images * triton.cdiv(pixels, block_p),),
        *(*upstream, features, classes.labels, to.features, pixels, dim, *classes[1:], *at.strides, *to.strides),
        BLOCK_P=block_p,
        BLOCK_D=min(next_power_of_2(dim), entry.blocks["BLOCK_D"]),
        NORMALIZE=normalize,
        SQUARES=grad_squares is not None,
        warps=entry.warps,
        stages=entry.stages,
    )


def _cells_backward(
    grad_sums: Tensor, grad_squares: Tensor | None, at: _Place, classes: _Classes, normalize: bool, to: _Place
) -> None:
    features = at.features
    batch, dim, h, w = features.shape
    scales = (grad_sums, grad_sums)
    if normalize:
        scales = _norms(at, classes, normalize=True, squares=False, grad_sums=grad_sums)
    curved = normalize or grad_squares is not None
    name = "class_sums_backward_cells_curved" if curved else "class_sums_backward_cells"
    entry = choose(name, features.device, features.dtype, dim)
    many = classes.num_classes > _most_classes(features)
    few = FEW_LABELS if curved else 1
    block_k = 1 if many else max(triton.next_power_of_2(classes.num_classes), few)
    groups = 1 if many else max(1, DOT_ROWS // block_k)
    block_p = _pixels_of_tile(entry, max(DOT_ROWS, block_k * groups))
    upstream = (grad_sums, grad_sums if grad_squares is None else grad_squares)
    places = (*_grids(at, classes), dim, *classes[1:], *at.strides, *to.strides)
    launch(
        class_sums_backward_cells,
        (batch * triton.cdiv(h * w, block_p),),
        *(*upstream, features, classes.labels, *scales, to.features, *places),
        BLOCK_K=block_k,
        GROUPS=groups,
        BLOCK_P=block_p,
        BLOCK_D=min(next_power_of_2(dim), entry.blocks["BLOCK_D"]),
        NORMALIZE=normalize,
        SQUARES=grad_squares is not None,
        MANY=many,
        PRECISION=input_precision(grad_sums.dtype),
        WIDE=_is_wide(at, classes),
        warps=entry.warps,
        stages=entry.stages,
    )


def _grids(at: _Place, classes: _Classes) -> tuple[int, ...]:
    """h, w, H, W, and how many label pixels a cell has a weight in at most, along each axis."""
    (h, w), (height, width) = at.features.shape[2:], classes.labels.shape[1:]
    return h, w, height, width, triton.cdiv(2 * height, h), triton.cdiv(2 * width, w)


def _is_wide(at: _Place, classes: _Classes) -> bool:
    """Whether places on the grids need 64-bit integers."""
    h, w, height, width, _, _ = _grids(at, classes)
    return max(4 * h * height, 4 * w * width, height * width) > INT32


@triton.jit
def class_sums_same_grid(
    features,
    labels,
    scales,
    sums,
    counts,
    squares,
    wrong,
    images,
    pixels,
    d,
    num_classes,
    ignore_index,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALED: tl.constexpr,
    SQUARES: tl.constexpr,
    PRECISION: tl.constexpr,
    NEAR: tl.constexpr,
):
    """sums[slot, k, c] = sum_p [y_p = k] z_pc over every slots-th tile of pixels, as a product of one-hot labels and
    rows; likewise counts, squares, and the number of wrong labels.

    The rows of ignored pixels are read and multiplied by 0, which goes wrong only where one is not finite, and then
    shows as NaN in every sum; a second walk then leaves them out. To mask each row in the first would double its
    instructions. Labels are fetched one tile ahead, so that nothing waits for them.
    """
    ACC: tl.constexpr = sums.dtype.element_ty
    slot, slots = tl.program_id(1), tl.num_programs(1)
    classes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    wanted = wanted_labels(classes, num_classes, ignore_index)  # [BLOCK_K]
    p = tl.arange(0, BLOCK_P)
    channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (channel < d)[None, :]
    features += (tl.program_id(2) * BLOCK_D).to(tl.int64) * stride_channel
    offsets = _offsets(stride_pixel, stride_channel, BLOCK_P, BLOCK_D, NEAR)  # [BLOCK_P, BLOCK_D]
    per_image = tl.cdiv(pixels, BLOCK_P)
    tiles = images * per_image

    total = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    count = tl.zeros((BLOCK_K, BLOCK_P), tl.int32)  # a program sees far fewer than 2^31 tiles
    squared = tl.zeros((BLOCK_K, BLOCK_P), ACC)
    bad = tl.zeros((BLOCK_P,), tl.int32)
    # The place of a tile is carried along: the slots-th next is so many images and tiles further.
    image, within = slot // per_image, slot % per_image
    more_images, more_within = slots // per_image, slots % per_image
    ahead = load_labels(
        labels + image.to(tl.int64) * pixels + within.to(tl.int64) * BLOCK_P + p, p < pixels - within * BLOCK_P
    )
    for _ in tl.range(slot, tiles, slots):
        inside = p < pixels - within * BLOCK_P
        start = image.to(tl.int64) * stride_image + within.to(tl.int64) * BLOCK_P * stride_pixel
        rows = tl.load(features + start + offsets, mask=inside[:, None] & in_row, other=0.0)  # [BLOCK_P, BLOCK_D]
        y = class_of(ahead, inside)
        bad += (inside & is_wrong(ahead, num_classes, ignore_index)).to(tl.int32)
        if SCALED:
            scale = tl.load(
                scales + image.to(tl.int64) * pixels + within.to(tl.int64) * BLOCK_P + p, mask=inside, other=0.0
            )
        within += more_within
        image += more_images + (within >= per_image).to(tl.int32)
        within = tl.where(within >= per_image, within - per_image, within)
        there = p < tl.where(image < images, pixels - within * BLOCK_P, 0)
        ahead = load_labels(labels + image.to(tl.int64) * pixels + within.to(tl.int64) * BLOCK_P + p, there)

        hit = y[None, :] == wanted[:, None]  # [BLOCK_K, BLOCK_P]
        if NORMALIZE or SCALED or SQUARES:
            wide = rows.to(ACC)
        if NORMALIZE or SQUARES:
            square = tl.sum(wide * wide, 1)  # [BLOCK_P]
        if NORMALIZE:
            scale = inverse_norm(square)
        if NORMALIZE or SCALED:
            rows = wide * scale[:, None]
        if SQUARES:
            square = square * scale * scale if NORMALIZE or SCALED else square
            squared += tl.where(hit, square[None, :], 0.0)
        count += hit.to(tl.int32)
        total -= _minus_one_hot_times(hit, rows, PRECISION, ACC)

    not_finite = tl.max(tl.max((total != total).to(tl.int32), 1), 0)
    if not_finite > 0:
        total = tl.zeros((BLOCK_K, BLOCK_D), ACC)
        for tile in tl.range(slot, tiles, slots, num_stages=1):
            image, within = tile // per_image, tile % per_image
            inside = p < pixels - within * BLOCK_P
            place = image.to(tl.int64) * pixels + within.to(tl.int64) * BLOCK_P + p
            label = load_labels(labels + place, inside)
            y = class_of(label, inside)
            valid = (y >= 0) & (y < num_classes) & (label != ignore_index)
            start = image.to(tl.int64) * stride_image + within.to(tl.int64) * BLOCK_P * stride_pixel
            rows = tl.load(features + start + offsets, mask=valid[:, None] & in_row, other=0.0)
            if NORMALIZE:
                rows = rows.to(ACC)
                rows = rows * inverse_norm(tl.sum(rows * rows, 1))[:, None]
            if SCALED:
                rows = rows.to(ACC) * tl.load(scales + place, mask=inside, other=0.0)[:, None]
            total -= _minus_one_hot_times(y[None, :] == wanted[:, None], rows, PRECISION, ACC)

    known = classes < num_classes
    row = slot.to(tl.int64) * num_classes + classes
    tl.store(sums + row[:, None] * d + channel[None, :], total, mask=known[:, None] & in_row)
    if SQUARES:
        part = (slot * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * num_classes
        tl.store(squares + part + classes, tl.sum(squared, 1), mask=known)
    if tl.program_id(2) == 0:
        tl.store(counts + row, tl.sum(count, 1), mask=known)
        if tl.program_id(0) == 0:
            tl.store(wrong + slot, tl.sum(bad))


@triton.jit
def class_sums_counts(
    labels, counts, wrong, pixels, num_classes, ignore_index, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr
):
    """counts[slot, k] = sum_p [y_p = k], and the number of wrong labels, over every slots-th block of label pixels."""
    slot = tl.program_id(0)
    classes = tl.arange(0, BLOCK_K)
    count = tl.zeros((BLOCK_K,), tl.int32)
    bad = tl.zeros((BLOCK_P,), tl.int32)
    for start in range(slot.to(tl.int64) * BLOCK_P, pixels, tl.num_programs(0).to(tl.int64) * BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        inside = place < pixels
        label = load_labels(labels + place, inside)
        y = class_of(label, inside)
        valid = (y >= 0) & (y < num_classes) & (label != ignore_index)
        count += tl.histogram(tl.where(valid, y, 0), BLOCK_K, mask=valid)
        bad += (inside & is_wrong(label, num_classes, ignore_index)).to(tl.int32)
    tl.store(counts + slot.to(tl.int64) * num_classes + classes, count, mask=classes < num_classes)
    tl.store(wrong + slot, tl.sum(bad))


@triton.jit
def class_sums_norms(
    features,
    labels,
    grad_sums,
    alphas,
    betas,
    squares,
    images,
    h,
    w,
    height,
    width,
    d,
    num_classes,
    ignore_index,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SAME: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SQUARES: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What the norm of the row at each label pixel p gives; rows are interpolated on the fly, some channels at a time.

    alpha_p = 1 / ||z_p||, 0 where ignored; squares[slot, k] = sum_p [y_p = k] ||z_p||^2, of unit rows alpha_p^2 times
    it; BACKWARD: beta_p = -alpha_p^3 (g . z_p), and both 0 for zero rows, so that dz_p = alpha_p g + beta_p z_p.
    """
    ACC: tl.constexpr = alphas.dtype.element_ty
    classes = tl.arange(0, BLOCK_K)
    wanted = wanted_labels(classes, num_classes, ignore_index)
    squared = tl.zeros((BLOCK_K, BLOCK_P), ACC)
    pixels = height * width
    per_image = tl.cdiv(pixels, BLOCK_P)
    for tile in range(tl.program_id(0), images * per_image, tl.num_programs(0)):
        image = (tile // per_image).to(tl.int64)
        p = (tile % per_image) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        if WIDE:
            p = p.to(tl.int64)
        inside = p < pixels
        label = load_labels(labels + image * pixels + p, inside)
        y = class_of(label, inside)
        valid = (y >= 0) & (y < num_classes) & (label != ignore_index)
        square = tl.zeros((BLOCK_P,), ACC)
        along = tl.zeros((BLOCK_P,), ACC)  # g . z
        for start in range(0, d, BLOCK_D):
            channel = start + tl.arange(0, BLOCK_D)
            base = features + image * stride_image
            rows = interpolated(
                base, p, channel, valid, d, h, w, height, width, stride_channel, stride_pixel, SAME, ACC
            )  # [BLOCK_D, BLOCK_P]
            square += tl.sum(rows * rows, 0)
            if BACKWARD:
                along += tl.sum(rows * class_rows(grad_sums, y, channel, valid, d), 0)
        if NORMALIZE:
            alpha = inverse_norm(square)
            if SQUARES:
                square = square * alpha * alpha
            if BACKWARD:
                alpha = tl.where(square <= ZERO_ROW_SQUARE, 0.0, alpha)
                tl.store(betas + image * pixels + p, -(alpha * along) * (alpha * alpha), mask=inside)
            tl.store(alphas + image * pixels + p, tl.where(valid, alpha, 0.0), mask=inside)
        if SQUARES:
            squared += tl.where(y[None, :] == wanted[:, None], square[None, :], 0.0)
    if SQUARES:
        place = tl.program_id(0).to(tl.int64) * num_classes + classes
        tl.store(squares + place, tl.sum(squared, 1), mask=classes < num_classes)


@triton.jit
def class_sums_cells(
    features,
    labels,
    scales,
    sums,
    images,
    h,
    w,
    height,
    width,
    window_y,
    window_x,
    d,
    num_classes,
    ignore_index,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    NEAR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """sums[slot, group, k, c] = sum over cells of A_kc z_c, over every slots-th tile of cells; a group holds the label
    rows of one remainder (few classes would leave rows of the product idle, so several label rows share it).

    The rows are fetched first, and arrive while A is built.
    """
    ACC: tl.constexpr = sums.dtype.element_ty
    slot = tl.program_id(1)
    classes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    wanted = wanted_labels(classes, num_classes, ignore_index)
    p = tl.arange(0, BLOCK_P)
    channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (channel < d)[None, :]
    features += (tl.program_id(2) * BLOCK_D).to(tl.int64) * stride_channel
    offsets = _offsets(stride_pixel, stride_channel, BLOCK_P, BLOCK_D, NEAR)  # [BLOCK_P, BLOCK_D]
    pixels = h * w
    per_image = tl.cdiv(pixels, BLOCK_P)
    total = tl.zeros((GROUPS * BLOCK_K, BLOCK_D), ACC)
    for tile in range(slot, images * per_image, tl.num_programs(1)):
        image = (tile // per_image).to(tl.int64)
        first = (tile % per_image) * BLOCK_P
        inside = p < pixels - first
        start = image * stride_image + first.to(tl.int64) * stride_pixel
        rows = tl.load(features + start + offsets, mask=inside[:, None] & in_row, other=0.0)  # [BLOCK_P, BLOCK_D]
        here = image * height * width
        weights, _0, _1, _2, _3, _4, _5, _6, _7, _8 = window_sums(
            labels + here,
            scales + here if SCALED else scales,
            scales,
            first + p,
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
            BLOCK_K,
            GROUPS,
            BLOCK_P,
            SCALED,
            False,
            WIDE,
            ACC,
        )
        weights = tl.reshape(weights, (GROUPS * BLOCK_K, BLOCK_P))
        rows = tl.where((tl.sum(weights, 0) > 0)[:, None], rows, 0.0)  # a cell that no pixel touches may hold NaN
        total -= _times(-weights, rows, PRECISION, ACC)
    line = tl.arange(0, GROUPS * BLOCK_K)
    group, k = line // BLOCK_K, tl.program_id(0) * BLOCK_K + line % BLOCK_K
    row = (slot * GROUPS + group).to(tl.int64) * num_classes + k
    tl.store(sums + row[:, None] * d + channel[None, :], total, mask=(k < num_classes)[:, None] & in_row)


@triton.jit
def class_sums_add(
    partial_sums,
    partial_counts,
    partial_squares,
    partial_wrong,
    sums,
    counts,
    squares,
    all_right,
    sum_slots,
    count_slots,
    square_slots,
    entries,
    num_classes,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Adds the slots: some entries of the sums a program, and then some classes a program."""
    ACC: tl.constexpr = sums.dtype.element_ty
    s = tl.arange(0, BLOCK_S)
    sum_programs = tl.cdiv(entries, BLOCK_E)
    if tl.program_id(0) < sum_programs:
        entry = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
        total = _add_slots(partial_sums, sum_slots, entry, entries, s, tl.zeros((BLOCK_S, BLOCK_E), ACC))
        tl.store(sums + entry, total, mask=entry < entries)
    else:
        k = (tl.program_id(0) - sum_programs) * BLOCK_E + tl.arange(0, BLOCK_E)
        known = k < num_classes
        count = _add_slots(partial_counts, count_slots, k, num_classes, s, tl.zeros((BLOCK_S, BLOCK_E), tl.int64))
        tl.store(counts + k, count, mask=known)
        if square_slots > 0:
            square = _add_slots(partial_squares, square_slots, k, num_classes, s, tl.zeros((BLOCK_S, BLOCK_E), ACC))
            tl.store(squares + k, square, mask=known)
        if tl.program_id(0) == sum_programs:
            wrong = tl.zeros((BLOCK_S,), tl.int32)
            for start in range(0, count_slots, BLOCK_S):
                wrong += tl.load(partial_wrong + start + s, mask=s < count_slots - start, other=0)
            tl.store(all_right, tl.max(wrong, 0) == 0)


@triton.jit
def class_sums_backward_same_grid(
    grad_sums,
    grad_squares,
    features,
    labels,
    gradient,
    pixels,
    d,
    num_classes,
    ignore_index,
    stride_image,
    stride_channel,
    stride_pixel,
    grad_image,
    grad_channel,
    grad_pixel,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """dz = g_k + 2 q_k z of raw rows, (g_k - (g_k . u) u) / ||z|| of unit rows, 0 of ignored pixels and of zero rows.

    A tile of pixels; unit rows take two walks over the channels, of which the second finds them in the cache.
    """
    ACC: tl.constexpr = grad_sums.dtype.element_ty
    per_image = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // per_image).to(tl.int64)
    p = (tl.program_id(0) % per_image).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inside = p < pixels
    label = load_labels(labels + image * pixels + p, inside)
    y = class_of(label, inside)
    valid = (y >= 0) & (y < num_classes) & (label != ignore_index)
    base = features + image * stride_image
    alpha = tl.zeros((BLOCK_P,), ACC)
    beta = tl.zeros((BLOCK_P,), ACC)
    if NORMALIZE:
        square = tl.zeros((BLOCK_P,), ACC)
        along = tl.zeros((BLOCK_P,), ACC)
        for start in range(0, d, BLOCK_D):
            channel = start + tl.arange(0, BLOCK_D)
            rows = interpolated(base, p, channel, valid, d, 1, 1, 1, 1, stride_channel, stride_pixel, True, ACC)
            square += tl.sum(rows * rows, 0)
            along += tl.sum(rows * class_rows(grad_sums, y, channel, valid, d), 0)
        alpha = tl.where(square <= ZERO_ROW_SQUARE, 0.0, inverse_norm(square))
        beta = -(alpha * along) * (alpha * alpha)
    if SQUARES:
        beta = 2.0 * tl.load(grad_squares + y, mask=valid, other=0.0)
    for start in range(0, d, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        grad = class_rows(grad_sums, y, channel, valid, d)  # [BLOCK_D, BLOCK_P]
        if NORMALIZE:
            grad = alpha[None, :] * grad
        if NORMALIZE or SQUARES:
            rows = interpolated(base, p, channel, valid, d, 1, 1, 1, 1, stride_channel, stride_pixel, True, ACC)
            grad += beta[None, :] * rows
        place = image * grad_image + (channel.to(tl.int64) * grad_channel)[:, None] + (p * grad_pixel)[None, :]
        tl.store(gradient + place, grad.to(gradient.dtype.element_ty), mask=(channel < d)[:, None] & inside[None, :])


@triton.jit
def class_sums_backward_cells(
    grad_sums,
    grad_squares,
    features,
    labels,
    alphas,
    betas,
    gradient,
    h,
    w,
    height,
    width,
    window_y,
    window_x,
    d,
    num_classes,
    ignore_index,
    stride_image,
    stride_channel,
    stride_pixel,
    grad_image,
    grad_channel,
    grad_pixel,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SQUARES: tl.constexpr,
    MANY: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dz_c = sum_k A_kc g_k + sum_c' M_cc' z_c', a tile of cells; A and M once for all channels. beta_p is given for a
    label pixel (NORMALIZE), 2 q_k (SQUARES), or 0, and then there is no M.

    Of MANY classes A would not fit into registers: each label pixel then fetches the g_k of its class, whatever K is.
    """
    ACC: tl.constexpr = grad_sums.dtype.element_ty
    CURVED: tl.constexpr = NORMALIZE or SQUARES
    pixels = h * w
    per_image = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // per_image).to(tl.int64)
    cell = (tl.program_id(0) % per_image) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inside = cell < pixels
    here = image * height * width
    wanted = wanted_labels(tl.arange(0, BLOCK_K), num_classes, ignore_index)
    weights, m00, m01, m02, m10, m11, m12, m20, m21, m22 = window_sums(
        labels + here,
        alphas + here if NORMALIZE else alphas,
        betas + here if NORMALIZE else grad_squares,
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
        BLOCK_K,
        GROUPS,
        BLOCK_P,
        NORMALIZE,
        CURVED,
        WIDE,
        ACC,
    )
    weights = tl.reshape(weights, (GROUPS * BLOCK_K, BLOCK_P))
    k = tl.arange(0, GROUPS * BLOCK_K) % BLOCK_K
    place = cell.to(tl.int64)
    for start in range(0, d, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        in_row = (channel < d)[:, None]
        if MANY:
            grad = window_rows(
                labels + here,
                alphas + here if NORMALIZE else alphas,
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
                BLOCK_P,
                BLOCK_D,
                NORMALIZE,
                WIDE,
                ACC,
            )
        else:
            grads = class_rows(grad_sums, k, channel, k < num_classes, d)  # [BLOCK_D, GROUPS * BLOCK_K]
            grad = tl.dot(grads, weights, input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_D, BLOCK_P]
        if CURVED:
            base = features + image * stride_image + (channel.to(tl.int64) * stride_channel)[:, None]
            # A row of three neighbours at a time, the cell's own first: all nine would not fit into registers.
            bent = tl.zeros((BLOCK_D, BLOCK_P), ACC)
            for i in range(1 + 2 * tl.minimum(h - 1, 1)):
                own, above = i == 0, i == 1
                row = place + tl.where(own, 0, tl.where(above, -w, w))
                left = tl.where(own, m10, tl.where(above, m00, m20))
                middle = tl.where(own, m11, tl.where(above, m01, m21))
                right = tl.where(own, m12, tl.where(above, m02, m22))
                bent = _add_neighbour(bent, base, row - 1, left, in_row, stride_pixel, ACC)
                bent = _add_neighbour(bent, base, row, middle, in_row, stride_pixel, ACC)
                bent = _add_neighbour(bent, base, row + 1, right, in_row, stride_pixel, ACC)
            grad += bent
        offset = image * grad_image + (channel.to(tl.int64) * grad_channel)[:, None] + (place * grad_pixel)[None, :]
        tl.store(gradient + offset, grad.to(gradient.dtype.element_ty), mask=in_row & inside[None, :])


@triton.jit
def _offsets(stride_pixel, stride_channel, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, NEAR: tl.constexpr):
    """Of each number of a tile [BLOCK_P, BLOCK_D] from its first; held in registers, in 32 bits where they are NEAR."""
    pixel, channel = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_D)[None, :]
    if not NEAR:
        pixel, channel = pixel.to(tl.int64), channel.to(tl.int64)
    return pixel * stride_pixel + channel * stride_channel


@triton.jit
def _minus_one_hot_times(hit, rows, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """-one_hot @ rows. Exact but for the sum: a one-hot number is exact in every dtype, and float32 rows are two TF32
    numbers, together within 2^-24.

    To be subtracted from the total: an addition the compiler would fold into the product's accumulator, which tensor
    cores round towards zero each time, 1e-5 of the sum after a thousand times; so there are as many as a tile has.
    """
    minus = tl.where(hit, -1.0, 0.0).to(rows.dtype)
    if PRECISION == "tf32x3":
        high = _rounded_to_tf32(rows)
        low = tl.dot(minus, rows - high, input_precision="tf32", out_dtype=ACC)
        return tl.dot(minus, high, low, input_precision="tf32", out_dtype=ACC)
    return tl.dot(minus, rows, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _times(weights, rows, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """weights @ rows, float32 or float64 weights; bfloat16 and float16 rows are exact in TF32."""
    if PRECISION == "tf32x3" and rows.dtype.primitive_bitwidth == 16:
        high = _rounded_to_tf32(weights)
        low = tl.dot(weights - high, rows.to(ACC), input_precision="tf32", out_dtype=ACC)
        return tl.dot(high, rows.to(ACC), low, input_precision="tf32", out_dtype=ACC)
    return tl.dot(weights, rows.to(ACC), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _rounded_to_tf32(x):
    """To the nearest float32 whose last 13 bits are 0, so that the rest, of either sign, has 12 bits."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _add_slots(partial, slots, entry, entries, s, total):
    """The sum over slots of partial[slot, entry], in a fixed order; total holds zeros, [BLOCK_S, BLOCK_E]."""
    for start in range(0, slots, total.shape[0]):
        place = (start + s).to(tl.int64)[:, None] * entries + entry[None, :]
        there = (s < slots - start)[:, None] & (entry < entries)[None, :]
        total += tl.load(partial + place, mask=there, other=0)
    return tl.sum(total, 0)


@triton.jit
def _add_neighbour(bent, base, cell, m, in_row, stride_pixel, ACC: tl.constexpr):
    """bent + m z of another cell; where m is 0 it may lie outside the grid and is not read."""
    rows = tl.load(base + (cell * stride_pixel)[None, :], mask=in_row & (m != 0.0)[None, :], other=0.0)
    return bent + m[None, :] * rows.to(ACC)
