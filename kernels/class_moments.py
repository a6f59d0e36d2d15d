"""The three passes of the moments operator (Eq. 6 by each class's first two moments, and the class sums of Eq. 3): the
moments, the log-sum-exps, and the gradient; O(N d (K + d)), or O(N K d^2) with a covariance a class.

At label resolution no interpolated row and no number a label pixel is kept. The row of a label pixel p is
``z_p = sum_c b_pc z_c`` over the four cells around it, so that what is linear in it is interpolated, and what is
quadratic comes from products of neighbouring cells:

    z_p . v = sum_c b_pc (z_c . v),      z_p^T M z_p = sum_cc' b_pc b_pc' (z_c^T M z_c').

1. ``grams``, ``forms``: these products of each cell, with itself and with the four neighbours behind it (right, lower
   left, lower, lower right): five numbers a cell and matrix, and a number a vector.
2. ``gather``: each cell walks over the label pixels that it has a weight in, O(K) each, and sums up with what weight
   its row goes into each result: W_kc of what is linear, M_cc' of what is quadratic. The losses are sums on the way.
3. ``linear``, ``quadratic``, ``gradient``: sum_c W_kc z_c, sum_cc' M_cc' z_c z_c'^T, and what a cell's gradient is.

Between the steps lie some numbers a cell, of a few images at a time (WORKSPACE). The features are read by grams, linear
and quadratic for the moments, by grams and linear for the log-sum-exps, by grams, forms and gradient for the gradient,
each of these once from memory (the neighbours come out of the cache), and written once; the images of one round are
few enough to stay in the cache of a large chip. A covariance a class adds quadratic to the log-sum-exps, and reads the
features once a class in forms and quadratic, but for tiles without the class.

Labels on the features' own grid, pooled, rows of at most ``SAME_GRID_DIM``: each pass reads the features once, and
holds nothing between (``same_grid_*``). All else takes the steps above, there with weights of 1.

Deterministic without atomics: programs add up their own sums, which a last kernel adds in a fixed order; each cell of
the gradient is written once. Ignored pixels may hold NaN or Inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from in2nect.kernels.class_sums import (
    _accumulator,
    _add,
    _add_slots,
    _Classes,
    _counts,
    _is_wide,
    _minus_one_hot_times,
    _Partial,
    _Place,
    _times,
)
from in2nect.kernels.interpolation import ZERO_ROW_SQUARE, clamped, inverse_norm, share, window
from in2nect.kernels.label_windows import class_of, load_labels, wanted_labels
from in2nect.kernels.launch import choose, input_precision, launch, next_power_of_2, pixel_strides, processors
from in2nect.kernels.table import Entry

WORKSPACE = 32 * 2**20  # bytes of numbers between the steps; but one image's at least
SAME_GRID_DIM = 128  # channels of a tile, which holds whole rows
SAME_GRID_CLASSES = 64  # of such a tile
PAIRS = 5  # numbers a cell and matrix: with itself, right, lower left, lower and lower right neighbour
DOT_ROWS = 16  # the height of a tensor-core product
MOST_ROWS = 32  # vectors of a tile of a product
MOMENTS, MIXTURES, BACKWARD = (tl.constexpr(i) for i in range(3))  # what a gather is for


def class_moments(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    sums: bool,
    by_class: bool,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Counts (K,) int64, raw sums (K, d) or (0, d), sums (K, d) and squares (K,) of unit rows, second moments (d, d) or
    (K, d, d) of features (B, d, h, w) under labels (B, H, W), weighted by weights (K,), or else by ``1 / counts``.

    On CUDA, a label that is neither a class nor ``ignore_index`` raises a device-side assertion.
    """
    dim, device, dtype = features.shape[1], features.device, _accumulator(features)
    counts = torch.empty(num_classes, dtype=torch.int64, device=device)
    classes = _Classes(labels.contiguous(), num_classes, ignore_index)
    if labels.numel() == 0 or features.numel() == 0:
        raw = torch.zeros((num_classes if sums else 0, dim), dtype=dtype, device=device)
        unit = torch.zeros((num_classes, dim), dtype=dtype, device=device)
        second = torch.zeros((num_classes, dim, dim) if by_class else (dim, dim), dtype=dtype, device=device)
        return counts.zero_(), raw, unit, unit.new_zeros(num_classes), second
    _count(classes, counts)
    shares = torch.where(counts > 0, 1.0 / counts.clamp(min=1).to(dtype), 0.0) if weights is None else weights
    if _whole_rows(features, classes) and not by_class:
        return counts, *_same_grid_moments(features, classes, shares, sums)
    matrices = num_classes if by_class else 1
    cells = _Cells.of(features, classes, numbers=PAIRS, weights=(1 + sums) * num_classes + PAIRS * matrices)
    linear = torch.zeros((cells.slots, (1 + sums) * num_classes, dim), dtype=dtype, device=device)
    squares = torch.zeros((cells.slots, num_classes), dtype=dtype, device=device)
    second = _quadratic_sums(cells, matrices)
    for part in cells.parts():
        part.grams(None)
        part.gather(MOMENTS, squares, anchors=shares, raw=sums, by_class=by_class)
        part.linear(linear)
        part.quadratic(second, first=linear.shape[1], sparse=by_class)
    both = torch.empty(linear.shape[1:], dtype=dtype, device=device)
    squared = torch.empty(num_classes, dtype=dtype, device=device)
    moments = torch.empty((matrices, dim, dim), dtype=dtype, device=device)
    _add_up(linear, both)
    _add_up(squares, squared)
    _add_up(second, moments, transposed=True)
    raw = both[num_classes:].clone()  # results of an operator share no memory
    return counts, raw, both[:num_classes], squared, moments if by_class else moments[0]


def class_moments_mixtures(
    features: Tensor,
    labels: Tensor,
    centres: Tensor,
    curvatures: Tensor | None,
    present: Tensor,
    anchors: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i a_i LSE_i``, ``G_k = sum_i a_i p_ik u_i`` (K, d), and with curvatures ``B_k = sum_i a_i p_ik u_i u_i^T``
    (K, d, d), else (0, d, d)."""
    num_classes, dim = centres.shape
    by_class = curvatures is not None
    mixed = torch.empty_like(centres, memory_format=torch.contiguous_format)
    shape = (num_classes if by_class else 0, dim, dim)
    second = torch.empty(shape, dtype=centres.dtype, device=centres.device)
    if labels.numel() == 0 or features.numel() == 0:
        return centres.new_zeros(()), mixed.zero_(), second.zero_()
    classes = _Classes(labels.contiguous(), num_classes, ignore_index)
    if _whole_rows(features, classes) and not by_class:
        log_d = _same_grid_mixtures(features, classes, centres.contiguous(), _floors(present, centres), anchors, mixed)
        return log_d, mixed, second
    forms = PAIRS * num_classes if by_class else 0
    cells = _Cells.of(features, classes, numbers=PAIRS + num_classes + forms, weights=num_classes + forms)
    linear = torch.zeros((cells.slots, num_classes, dim), dtype=centres.dtype, device=centres.device)
    losses = torch.zeros((cells.slots, 1), dtype=centres.dtype, device=centres.device)
    quadratic = _quadratic_sums(cells, num_classes) if by_class else None
    for part in cells.parts():
        part.grams(centres.contiguous())
        if curvatures is not None:
            part.forms(curvatures.contiguous(), first=PAIRS + num_classes)
        part.gather(MIXTURES, losses, anchors=anchors, floors=_floors(present, centres), by_class=by_class)
        part.linear(linear)
        if quadratic is not None:
            part.quadratic(quadratic, first=num_classes, sparse=False)
    log_d = torch.empty(1, dtype=centres.dtype, device=centres.device)
    _add_up(losses, log_d)
    _add_up(linear, mixed)
    if quadratic is not None:
        _add_up(quadratic, second, transposed=True)
    return log_d[0], mixed, second


def class_moments_backward(
    features: Tensor,
    labels: Tensor,
    centres: Tensor,
    curvatures: Tensor | None,
    present: Tensor,
    anchors: Tensor,
    matrices: Tensor,
    scales: Tensor,
    constant: Tensor,
    own: Tensor,
    grad_sums: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Gradient of features (B, d, h, w), in their dtype and memory format, from ``du_i = a_y sum_k p_ik (centres_k + 2
    curvatures_k u_i) + scales_y matrices_y u_i + constant_y + own_y u_i``, and ``grad_sums_y`` of raw rows."""
    gradient = torch.empty_like(features)
    if features.numel() == 0:
        return gradient
    if labels.numel() == 0:
        return gradient.zero_()
    num_classes, raw, by_class = centres.shape[0], grad_sums is not None, curvatures is not None
    classes = _Classes(labels.contiguous(), num_classes, ignore_index)
    to = _Place(*pixel_strides(gradient))
    if _whole_rows(features, classes) and not by_class:
        per_class = _floors(present, centres), anchors, scales, own
        vectors = centres.contiguous(), constant.contiguous(), grad_sums
        _same_grid_backward(features, classes, vectors, matrices.contiguous(), per_class, to)
        return gradient if to.features is gradient else gradient.copy_(to.features)
    upstream = torch.cat([centres, constant] if grad_sums is None else [centres, constant, grad_sums])
    bends = matrices.contiguous() if curvatures is None else torch.cat([matrices, curvatures])
    forms = PAIRS * len(bends)
    cells = _Cells.of(
        features,
        classes,
        numbers=PAIRS + 2 * num_classes + forms,
        weights=len(upstream) + PAIRS + forms,
    )
    for part in cells.parts():
        part.grams(upstream[: 2 * num_classes])
        part.forms(bends, first=PAIRS + 2 * num_classes)
        part.gather(
            BACKWARD,
            None,
            anchors=anchors,
            floors=_floors(present, centres),
            scales=scales,
            own=own,
            raw=raw,
            by_class=by_class,
        )
        part.gradient(upstream, bends, to)
    return gradient if to.features is gradient else gradient.copy_(to.features)


def _whole_rows(features: Tensor, classes: _Classes) -> bool:
    """Whether a tile holds whole rows of features on their labels' grid."""
    same = features.shape[2:] == classes.labels.shape[1:]
    return same and features.shape[1] <= SAME_GRID_DIM and classes.num_classes <= SAME_GRID_CLASSES


class _Tiles(NamedTuple):
    """Tiles of whole rows on the labels' grid, how they are launched, and how many programs share them."""

    at: _Place
    entry: Entry
    images: int
    pixels: int
    blocks: dict[str, int]
    slots: int

    @classmethod
    def of(cls, kernel: str, features: Tensor, classes: _Classes, to: _Place | None = None) -> _Tiles:
        batch, dim, h, w = features.shape
        at = _Place(*pixel_strides(features))
        one_walk = at.is_one_walk and (to is None or to.is_one_walk)
        images, pixels = (1, batch * h * w) if one_walk else (batch, h * w)
        entry = choose(kernel, features.device, features.dtype, dim)
        block_d, block_k = next_power_of_2(dim), next_power_of_2(classes.num_classes)
        blocks = {"BLOCK_K": block_k, "BLOCK_P": entry.blocks["BLOCK_P"], "BLOCK_D": block_d}
        tiles = images * triton.cdiv(pixels, blocks["BLOCK_P"])
        slots = min(tiles, entry.blocks.get("PROGRAMS", tiles) * processors(features.device))
        return cls(at, entry, images, pixels, blocks, slots)

    def launch(self, kernel: object, *arguments: object, beside: int = 1, **constants: object) -> None:
        constants |= {"PRECISION": input_precision(_accumulator(self.at.features)), **self.blocks}
        grid = self.slots, beside
        launch(kernel, grid, *arguments, **constants, warps=self.entry.warps, stages=self.entry.stages)

    @property
    def part(self) -> int:
        """Channels of a part of a row."""
        return min(self.blocks["BLOCK_D"], self.entry.blocks["BLOCK_J"])


def _same_grid_moments(
    features: Tensor, classes: _Classes, shares: Tensor, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw sums, unit sums, squares and second moments, in one pass."""
    tiles = _Tiles.of("class_moments_same_grid", features, classes)
    dim, number, slots = features.shape[1], classes.num_classes, tiles.slots
    shapes = (slots, (1 + sums) * number, dim), (slots, number), (slots, dim, dim)
    linear, squares, second = (torch.empty(shape, dtype=shares.dtype, device=shares.device) for shape in shapes)
    tiles.launch(
        class_moments_same_grid,
        *(tiles.at.features, classes.labels, shares, linear, squares, second),
        *(tiles.images, tiles.pixels, dim, *classes[1:], *tiles.at.strides),
        beside=triton.cdiv(dim, tiles.part),
        BLOCK_J=tiles.part,
        RAW=sums,
    )
    both, squared, moments = (torch.empty_like(partial[0]) for partial in (linear, squares, second))
    _add_up(linear, both)
    _add_up(squares, squared)
    _add_up(second, moments, transposed=True)
    return both[number:].clone(), both[:number], squared, moments  # results of an operator share no memory


def _same_grid_mixtures(
    features: Tensor, classes: _Classes, centres: Tensor, floors: Tensor, anchors: Tensor, mixed: Tensor
) -> Tensor:
    """The loss; the mixed rows into mixed."""
    tiles = _Tiles.of("class_moments_same_grid_mixtures", features, classes)
    shapes = (tiles.slots, *centres.shape), (tiles.slots, 1)
    linear, losses = (torch.empty(shape, dtype=centres.dtype, device=centres.device) for shape in shapes)
    tiles.launch(
        class_moments_same_grid_mixtures,
        *(tiles.at.features, classes.labels, centres, floors, anchors, linear, losses),
        *(tiles.images, tiles.pixels, features.shape[1], *classes[1:], *tiles.at.strides),
    )
    log_d = torch.empty_like(losses[0])
    _add_up(linear, mixed)
    _add_up(losses, log_d)
    return log_d[0]


def _same_grid_backward(
    features: Tensor,
    classes: _Classes,
    vectors: tuple[Tensor, Tensor, Tensor | None],
    matrix: Tensor,
    per_class: tuple[Tensor, Tensor, Tensor, Tensor],
    to: _Place,
) -> None:
    tiles = _Tiles.of("class_moments_same_grid_backward", features, classes, to)
    centres, constant, grad_sums = vectors
    tiles.launch(
        class_moments_same_grid_backward,
        *(tiles.at.features, classes.labels, centres, constant, constant if grad_sums is None else grad_sums),
        *(matrix, *per_class, to.features, tiles.images, tiles.pixels, features.shape[1], *classes[1:]),
        *(*tiles.at.strides, *to.strides),
        BLOCK_J=tiles.part,
        RAW=grad_sums is not None,
    )


class _Cells(NamedTuple):
    """Cells of the feature grid under labels, and how many planes of numbers and of weights each of them has."""

    at: _Place
    classes: _Classes
    numbers: int
    weights: int
    images: int  # of a part, which the workspace holds

    @classmethod
    def of(cls, features: Tensor, classes: _Classes, *, numbers: int, weights: int) -> _Cells:
        batch, _, h, w = features.shape
        bytes_an_image = (numbers + weights) * h * w * _accumulator(features).itemsize
        images = max(1, min(batch, WORKSPACE // bytes_an_image))
        images = triton.cdiv(batch, triton.cdiv(batch, images))  # parts of one size, as nearly as they can be
        return cls(_Place(*pixel_strides(features)), classes, numbers, weights, images)

    @property
    def slots(self) -> int:
        """Programs of gather and linear, each of which holds its own sums."""
        entry = choose("class_moments_linear", self.device, self.at.features.dtype, self.dim)
        return entry.blocks["PROGRAMS"] * processors(self.device)

    @property
    def device(self) -> torch.device:
        return self.at.features.device

    @property
    def dim(self) -> int:
        return self.at.features.shape[1]

    @property
    def grids(self) -> tuple[int, int, int, int]:
        (h, w), (height, width) = self.at.features.shape[2:], self.classes.labels.shape[1:]
        return h, w, height, width

    def parts(self) -> list[_Part]:
        """Some images at a time; all write into the same workspace, one after the other."""
        batch, _, h, w = self.at.features.shape
        room = torch.empty(
            (self.numbers + self.weights) * self.images * h * w,
            dtype=_accumulator(self.at.features),
            device=self.device,
        )
        parts = []
        for first in range(0, batch, self.images):
            images = min(self.images, batch - first)
            numbers = room[: self.numbers * images * h * w].view(self.numbers, images, h * w)
            weights = room[self.numbers * images * h * w :][: self.weights * images * h * w]
            parts.append(_Part(self, first, images, numbers, weights.view(self.weights, images, h * w)))
        return parts


class _Part(NamedTuple):
    """The steps over some images: numbers (planes, images, h w) and weights likewise lie between them."""

    cells: _Cells
    first: int
    images: int
    numbers: Tensor
    weights: Tensor

    @property
    def features(self) -> Tensor:
        return self.cells.at.features[self.first :]

    def choose(self, kernel: str) -> Entry:
        return choose(kernel, self.cells.device, self.features.dtype, self.cells.dim)

    @property
    def precision(self) -> str:
        return input_precision(self.numbers.dtype)

    def block_p(self, entry: Entry, rows: int = DOT_ROWS) -> int:
        """Cells of a tile: fewer for many vectors, and where numbers come one by one, with an address each."""
        if not self.cells.at.loads_are_wide:
            return DOT_ROWS
        return max(DOT_ROWS, min(entry.blocks["BLOCK_P"], entry.blocks["BLOCK_P"] * DOT_ROWS // rows))

    def grams(self, vectors: Tensor | None) -> None:
        """Products of the cells with their neighbours, then with vectors (R, d)."""
        rows = 0 if vectors is None else len(vectors)
        entry = self.choose("class_moments_grams")
        block_r = min(next_power_of_2(rows), MOST_ROWS)
        block_p = self.block_p(entry, block_r)
        h, w, _, _ = self.cells.grids
        launch(
            class_moments_grams,
            (self.images * triton.cdiv(h * w, block_p), max(1, triton.cdiv(rows, block_r))),
            *(self.features, self.numbers if vectors is None else vectors, self.numbers, self.images, h, w),
            *(self.cells.dim, rows, *self.cells.at.strides),
            BLOCK_R=block_r,
            BLOCK_P=block_p,
            BLOCK_D=min(next_power_of_2(self.cells.dim), entry.blocks["BLOCK_D"]),
            VECTORS=vectors is not None,
            PRECISION=self.precision,
            warps=entry.warps,
            stages=entry.stages,
        )

    def forms(self, matrices: Tensor, first: int) -> None:
        """Products of the cells with their neighbours by matrices (M, d, d), into the planes from the first."""
        entry = self.choose("class_moments_forms")
        block_p = entry.blocks["BLOCK_P"]
        h, w, _, _ = self.cells.grids
        launch(
            class_moments_forms,
            (self.images * triton.cdiv(h * w, block_p), len(matrices)),
            *(self.features, matrices, self.numbers[first:], self.images, h, w, self.cells.dim),
            *self.cells.at.strides,
            BLOCK_P=block_p,
            BLOCK_D=min(next_power_of_2(self.cells.dim), entry.blocks["BLOCK_D"]),
            PRECISION=self.precision,
            warps=entry.warps,
            stages=entry.stages,
        )

    def gather(
        self,
        kind: tl.constexpr,
        partial: Tensor | None,
        *,
        anchors: Tensor,
        floors: Tensor | None = None,
        scales: Tensor | None = None,
        own: Tensor | None = None,
        raw: bool = False,
        by_class: bool,
    ) -> None:
        """The weights, and what is summed on the way: partial (slots, K) squares or (slots, 1) losses."""
        num_classes = self.cells.classes.num_classes
        entry = self.choose("class_moments_gather")
        block_k = triton.next_power_of_2(num_classes)
        a_thread = max(1, entry.blocks["NUMBERS"] // 4) if by_class else entry.blocks["NUMBERS"]
        most = triton.next_power_of_2(max(1, a_thread * 32 * entry.warps // block_k))
        block_p = min(entry.blocks["BLOCK_P"], most)
        h, w, height, width = self.cells.grids
        tiles = self.images * triton.cdiv(h * w, block_p)
        absent = self.numbers  # of what is not read
        launch(
            class_moments_gather,
            (tiles if partial is None else min(tiles, len(partial)),),
            *(self.cells.classes.labels[self.first :], self.numbers, self.weights),
            *(absent if tensor is None else tensor for tensor in (partial, anchors, floors, scales, own)),
            *(self.images, h, w, height, width, triton.cdiv(height, h), triton.cdiv(width, w)),
            *self.cells.classes[1:],
            BLOCK_K=block_k,
            BLOCK_P=block_p,
            KIND=kind.value,
            RAW=raw,
            BY_CLASS=by_class,
            WIDE=_is_wide(self.cells.at, self.cells.classes),
            warps=entry.warps,
            stages=entry.stages,
        )

    def linear(self, sums: Tensor) -> None:
        """Adds sum_c W_rc z_c to sums (slots, R, d), of the first R planes of weights."""
        slots, rows, dim = sums.shape
        entry = self.choose("class_moments_linear")
        block_r = min(next_power_of_2(rows), MOST_ROWS)
        block_d = min(next_power_of_2(dim), entry.blocks["BLOCK_D"])
        block_p = self.block_p(entry, block_r)
        pixels = self.cells.grids[0] * self.cells.grids[1]
        r_blocks, d_blocks = triton.cdiv(rows, block_r), triton.cdiv(dim, block_d)
        launch(
            class_moments_linear,
            (r_blocks, min(slots, self.images * triton.cdiv(pixels, block_p)), d_blocks),
            *(self.features, self.weights, sums, self.images, pixels, dim, rows, *self.cells.at.strides),
            BLOCK_R=block_r,
            BLOCK_P=block_p,
            BLOCK_D=block_d,
            PRECISION=self.precision,
            warps=entry.warps,
            stages=entry.stages,
        )

    def quadratic(self, sums: Tensor, *, first: int, sparse: bool) -> None:
        """Adds sum_c z_c t_c^T to sums (slots, M, d, d), of the planes of weights from the first: t_c is half M_cc z_c
        and the neighbours behind, so that the whole sum is this and its transpose."""
        slots, matrices, dim, _ = sums.shape
        entry = self.choose("class_moments_quadratic")
        block_d = min(next_power_of_2(dim), entry.blocks["BLOCK_D"])
        block_p = entry.blocks["BLOCK_P"]
        h, w, _, _ = self.cells.grids
        launch(
            class_moments_quadratic,
            (triton.cdiv(dim, block_d) ** 2, min(slots, self.images * triton.cdiv(h * w, block_p)), matrices),
            *(self.features, self.weights[first:], sums, self.images, h, w, dim, *self.cells.at.strides),
            BLOCK_P=block_p,
            BLOCK_D=block_d,
            SPARSE=sparse,
            PRECISION=self.precision,
            warps=entry.warps,
            stages=entry.stages,
        )

    def gradient(self, vectors: Tensor, matrices: Tensor, to: _Place) -> None:
        """W^T vectors + M' z + sum_m matrices_m M^m z of every cell; the planes of weights in this order."""
        entry = self.choose("class_moments_gradient")
        block_d = min(next_power_of_2(self.cells.dim), entry.blocks["BLOCK_D"])
        block_p = self.block_p(entry)
        h, w, _, _ = self.cells.grids
        launch(
            class_moments_gradient,
            (self.images * triton.cdiv(h * w, block_p), triton.cdiv(self.cells.dim, block_d)),
            *(self.features, vectors, matrices, self.weights, to.features[self.first :], self.images, h, w),
            *(self.cells.dim, len(vectors), len(matrices), *self.cells.at.strides, *to.strides),
            BLOCK_R=min(next_power_of_2(len(vectors)), entry.blocks["BLOCK_R"]),
            BLOCK_P=block_p,
            BLOCK_D=block_d,
            SPARSE=len(matrices) > 1,
            PRECISION=self.precision,
            warps=entry.warps,
            stages=entry.stages,
        )


def _count(classes: _Classes, counts: Tensor) -> None:
    """Counts (K,), and on CUDA an assertion that every label is one."""
    device = counts.device
    partial_counts, wrong = _counts(classes)
    none = torch.empty((0, classes.num_classes), dtype=torch.float32, device=device)  # sums and squares, of no rows
    all_right = torch.empty((), dtype=torch.bool, device=device)
    _add(_Partial(none, partial_counts, none, wrong), none.T, counts, none, all_right)
    if device.type == "cuda":
        expected = f"in 0..{classes.num_classes - 1} nor ignore_index={classes.ignore_index}"
        torch._assert_async(all_right, f"in2nect: a label is neither {expected}")


def _floors(present: Tensor, like: Tensor) -> Tensor:
    """(K,), to be added to the exponents: 0 of the present classes, else -inf."""
    return torch.zeros_like(present, dtype=like.dtype).masked_fill(~present, float("-inf"))


def _quadratic_sums(cells: _Cells, matrices: int) -> Tensor:
    entry = choose("class_moments_quadratic", cells.device, cells.at.features.dtype, cells.dim)
    blocks = triton.cdiv(cells.dim, entry.blocks["BLOCK_D"]) ** 2 * matrices
    slots = max(1, entry.blocks["PROGRAMS"] * processors(cells.device) // blocks)
    shape = (slots, matrices, cells.dim, cells.dim)
    return torch.zeros(shape, dtype=_accumulator(cells.at.features), device=cells.device)


def _add_up(partial: Tensor, total: Tensor, *, transposed: bool = False) -> None:
    """total = the sum of partial over its slots, and of their transposes."""
    entry = choose("class_moments_add", total.device, total.dtype, 1)
    block_e = entry.blocks["BLOCK_E"]
    launch(
        class_moments_add,
        (triton.cdiv(total.numel(), block_e),),
        *(partial, total, len(partial), total.numel(), total.shape[-1]),
        BLOCK_S=min(next_power_of_2(len(partial)), entry.blocks["BLOCK_S"]),
        BLOCK_E=block_e,
        TRANSPOSED=transposed,
        warps=entry.warps,
        stages=entry.stages,
    )


@triton.jit
def class_moments_same_grid(
    features,
    labels,
    shares,
    linear,
    squares,
    second,
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
    BLOCK_J: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """linear[slot] = sums of unit rows, RAW: then of raw rows; squares[slot] = sums of |u|^2; second[slot] = half the
    sum of shares_y u u^T, over every slots-th tile of pixels; BLOCK_J of their columns a program, because all would not
    fit into registers, of which the others' rows come out of the cache."""
    ACC: tl.constexpr = linear.dtype.element_ty
    slot = tl.program_id(0)
    classes = tl.arange(0, BLOCK_K)
    wanted = wanted_labels(classes, num_classes, ignore_index)
    channel = tl.arange(0, BLOCK_D)
    in_row = (channel < d)[None, :]
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    in_part = (j < d)[None, :]
    columns = (channel.to(tl.int64) * stride_channel)[None, :]
    per_image = tl.cdiv(pixels, BLOCK_P)
    unit = tl.zeros((BLOCK_K, BLOCK_J), ACC)
    raw = tl.zeros((BLOCK_K, BLOCK_J), ACC)
    moments = tl.zeros((BLOCK_D, BLOCK_J), ACC)
    squared = tl.zeros((BLOCK_K, BLOCK_P), ACC)
    for tile in range(slot, images * per_image, tl.num_programs(0)):
        image, p, y, valid = _tile(tile, per_image, pixels, labels, num_classes, ignore_index, BLOCK_P)
        place = features + image * stride_image + (p * stride_pixel)[:, None]
        wide = tl.load(place + columns, mask=valid[:, None] & in_row, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_D]
        part = (j.to(tl.int64) * stride_channel)[None, :]
        z = tl.load(place + part, mask=valid[:, None] & in_part, other=0.0)  # [BLOCK_P, BLOCK_J]
        square = tl.sum(wide * wide, 1)
        alpha = inverse_norm(square)
        hit = y[None, :] == wanted[:, None]  # [BLOCK_K, BLOCK_P]
        unit -= _times(tl.where(hit, -alpha[None, :], 0.0), z, PRECISION, ACC)
        if RAW:
            raw -= _minus_one_hot_times(hit, z, "ieee" if z.dtype.primitive_bitwidth == 16 else PRECISION, ACC)
        squared += tl.where(hit, (square * alpha * alpha)[None, :], 0.0)
        scale = -0.5 * tl.load(shares + y, mask=valid, other=0.0) * alpha * alpha
        moments -= _times(tl.trans(wide * scale[:, None]), z, PRECISION, ACC)
    there = (classes < num_classes)[:, None] & in_part
    rows = (1 + RAW) * num_classes
    place = linear + (slot.to(tl.int64) * rows + classes)[:, None] * d + j[None, :]
    tl.store(place, unit, mask=there)
    if RAW:
        tl.store(place + num_classes * d, raw, mask=there)
    if tl.program_id(1) == 0:
        tl.store(squares + slot * num_classes + classes, tl.sum(squared, 1), mask=classes < num_classes)
    place = second + (slot.to(tl.int64) * d + channel)[:, None] * d + j[None, :]
    tl.store(place, moments, mask=(channel < d)[:, None] & in_part)


@triton.jit
def class_moments_same_grid_mixtures(
    features,
    labels,
    centres,
    floors,
    anchors,
    linear,
    losses,
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
    PRECISION: tl.constexpr,
):
    """linear[slot, k] = sum a p_k u, losses[slot] = sum a LSE, over every slots-th tile of pixels."""
    ACC: tl.constexpr = linear.dtype.element_ty
    slot = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_D)
    in_row = (channel < d)[None, :]
    columns = (channel.to(tl.int64) * stride_channel)[None, :]
    per_image = tl.cdiv(pixels, BLOCK_P)
    there = (k < num_classes)[:, None] & in_row
    centre = tl.load(centres + k[:, None] * d + channel[None, :], mask=there, other=0.0)  # [BLOCK_K, BLOCK_D]
    floor = tl.load(floors + k, mask=k < num_classes, other=float("-inf"))
    total = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    loss = tl.zeros((BLOCK_P,), ACC)
    for tile in range(slot, images * per_image, tl.num_programs(0)):
        image, p, y, valid = _tile(tile, per_image, pixels, labels, num_classes, ignore_index, BLOCK_P)
        place = features + image * stride_image + (p * stride_pixel)[:, None] + columns
        z = tl.load(place, mask=valid[:, None] & in_row, other=0.0)  # [BLOCK_P, BLOCK_D]
        wide = z.to(ACC)
        alpha = inverse_norm(tl.sum(wide * wide, 1))
        anchor = tl.load(anchors + y, mask=valid, other=0.0)
        exponent = _times(centre, tl.trans(z), PRECISION, ACC) * alpha[None, :]  # [BLOCK_K, BLOCK_P]
        shares, lse = _softmax(exponent, floor, valid)
        loss += tl.where(anchor > 0, anchor * lse, 0.0)
        total -= _times(shares * (-anchor * alpha)[None, :], z, PRECISION, ACC)
    place = linear + (slot.to(tl.int64) * num_classes + k)[:, None] * d + channel[None, :]
    tl.store(place, total, mask=there)
    tl.store(losses + slot, tl.sum(loss, 0))


@triton.jit
def class_moments_same_grid_backward(
    features,
    labels,
    centres,
    constant,
    grad_sums,
    matrix,
    floors,
    anchors,
    scales,
    own,
    gradient,
    images,
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
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz = alpha (du - (du . u) u), du = sum_k a p_k centres_k + scales_y M u + constant_y + own_y u; RAW: and
    grad_sums_y. A tile of pixels a program."""
    ACC: tl.constexpr = centres.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_D)
    in_row = (channel < d)[:, None]
    per_image = tl.cdiv(pixels, BLOCK_P)
    image, p, y, valid = _tile(tl.program_id(0), per_image, pixels, labels, num_classes, ignore_index, BLOCK_P)
    there = valid[None, :] & in_row
    base = features + image * stride_image + (p * stride_pixel)[None, :]
    z = tl.load(base + (channel.to(tl.int64) * stride_channel)[:, None], mask=there, other=0.0)  # [BLOCK_D, BLOCK_P]
    wide = z.to(ACC)
    square = tl.sum(wide * wide, 0)
    alpha = tl.where(square <= ZERO_ROW_SQUARE, 0.0, inverse_norm(square))
    centre = tl.load(
        centres + k[:, None] * d + channel[None, :], mask=(k < num_classes)[:, None] & (channel < d)[None, :], other=0.0
    )  # [BLOCK_K, BLOCK_D]
    floor = tl.load(floors + k, mask=k < num_classes, other=float("-inf"))
    shares, _lse = _softmax(_times(centre, z, PRECISION, ACC) * alpha[None, :], floor, valid)  # [BLOCK_K, BLOCK_P]
    pull = shares * tl.load(anchors + y, mask=valid, other=0.0)[None, :]
    bent = tl.zeros((BLOCK_D, BLOCK_P), ACC)
    for start in range(0, d, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        part = tl.load(
            base + (j.to(tl.int64) * stride_channel)[:, None], mask=valid[None, :] & (j < d)[:, None], other=0.0
        )
        bent += _times(_matrix(matrix, channel, j, d), part, PRECISION, ACC)
    scale = tl.load(scales + y, mask=valid, other=0.0) * alpha
    du = bent * scale[None, :] + wide * (tl.load(own + y, mask=valid, other=0.0) * alpha)[None, :]
    du += tl.dot(tl.trans(centre), pull, input_precision=PRECISION, out_dtype=ACC)
    of_class = y[None, :] * d + channel[:, None]
    du += tl.load(constant + of_class, mask=there, other=0.0)
    along = tl.sum(du * wide, 0) * alpha
    dz = alpha[None, :] * (du - wide * (along * alpha)[None, :])
    if RAW:
        dz += tl.load(grad_sums + of_class, mask=there, other=0.0)
    offset = image * grad_image + (channel.to(tl.int64) * grad_channel)[:, None] + (p * grad_pixel)[None, :]
    tl.store(gradient + offset, dz.to(gradient.dtype.element_ty), mask=in_row & (p < pixels)[None, :])


@triton.jit
def class_moments_grams(
    features,
    vectors,
    numbers,
    images,
    h,
    w,
    d,
    rows,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z_c . z_c' of the cell and the four neighbours behind it, five planes of numbers, then z_c . v, one each."""
    ACC: tl.constexpr = numbers.dtype.element_ty
    pixels = h * w
    per_image = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // per_image).to(tl.int64)
    cell = (tl.program_id(0) % per_image) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inside = cell < pixels
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    right, left, down = _sides(cell, inside, h, w)
    dots = tl.zeros((BLOCK_R, BLOCK_P), ACC)
    g0 = tl.zeros((BLOCK_P,), ACC)
    g1, g2, g3, g4 = g0, g0, g0, g0
    for start in range(0, d, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        in_row = (channel < d)[:, None]
        base = features + image * stride_image + (channel.to(tl.int64) * stride_channel)[:, None]
        z = _rows(base, cell, inside, in_row, stride_pixel)  # [BLOCK_D, BLOCK_P]
        if VECTORS:
            v = tl.load(
                vectors + r.to(tl.int64)[:, None] * d + channel[None, :],
                mask=(r < rows)[:, None] & (channel < d)[None, :],
                other=0.0,
            )
            dots -= _times(-v, z, PRECISION, ACC)
        if tl.program_id(1) == 0:
            own = z.to(ACC)
            g0 += tl.sum(own * own, 0)
            g1 += tl.sum(own * _rows(base, cell + 1, right, in_row, stride_pixel).to(ACC), 0)
            g2 += tl.sum(own * _rows(base, cell + w - 1, left & down, in_row, stride_pixel).to(ACC), 0)
            g3 += tl.sum(own * _rows(base, cell + w, down, in_row, stride_pixel).to(ACC), 0)
            g4 += tl.sum(own * _rows(base, cell + w + 1, right & down, in_row, stride_pixel).to(ACC), 0)
    plane = tl.full((), 1, tl.int64) * images * pixels  # an argument of 1 is no tensor
    place = numbers + image * pixels + cell
    if tl.program_id(1) == 0:
        _store_pairs(place, plane, g0, g1, g2, g3, g4, inside)
    if VECTORS:
        tl.store(place[None, :] + (5 + r)[:, None] * plane, dots, mask=(r < rows)[:, None] & inside[None, :])


@triton.jit
def class_moments_forms(
    features,
    matrices,
    numbers,
    images,
    h,
    w,
    d,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z_c^T M z_c' of the cell and the four neighbours behind it, five planes of numbers a matrix."""
    ACC: tl.constexpr = numbers.dtype.element_ty
    pixels = h * w
    per_image = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // per_image).to(tl.int64)
    cell = (tl.program_id(0) % per_image) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inside = cell < pixels
    right, left, down = _sides(cell, inside, h, w)
    matrices += tl.program_id(1).to(tl.int64) * d * d
    features += image * stride_image
    g0 = tl.zeros((BLOCK_P,), ACC)
    g1, g2, g3, g4 = g0, g0, g0, g0
    for start in range(0, d, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        in_row = (channel < d)[:, None]
        bent = tl.zeros((BLOCK_D, BLOCK_P), ACC)
        for other_start in range(0, d, BLOCK_D):
            other = other_start + tl.arange(0, BLOCK_D)
            m = _matrix(matrices, channel, other, d)  # [BLOCK_D, BLOCK_D]
            z = _rows(
                features + (other.to(tl.int64) * stride_channel)[:, None],
                cell,
                inside,
                (other < d)[:, None],
                stride_pixel,
            )
            bent -= _times(-m, z, PRECISION, ACC)  # [BLOCK_D, BLOCK_P]
        base = features + (channel.to(tl.int64) * stride_channel)[:, None]
        g0 += tl.sum(bent * _rows(base, cell, inside, in_row, stride_pixel).to(ACC), 0)
        g1 += tl.sum(bent * _rows(base, cell + 1, right, in_row, stride_pixel).to(ACC), 0)
        g2 += tl.sum(bent * _rows(base, cell + w - 1, left & down, in_row, stride_pixel).to(ACC), 0)
        g3 += tl.sum(bent * _rows(base, cell + w, down, in_row, stride_pixel).to(ACC), 0)
        g4 += tl.sum(bent * _rows(base, cell + w + 1, right & down, in_row, stride_pixel).to(ACC), 0)
    plane = tl.full((), 1, tl.int64) * images * pixels  # an argument of 1 is no tensor
    place = numbers + 5 * tl.program_id(1) * plane + image * pixels + cell
    _store_pairs(place, plane, g0, g1, g2, g3, g4, inside)


@triton.jit
def class_moments_gather(
    labels,
    numbers,
    weights,
    partial,
    anchors,
    floors,
    scales,
    own,
    images,
    h,
    w,
    height,
    width,
    steps_y,
    steps_x,
    num_classes,
    ignore_index,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    KIND: tl.constexpr,
    RAW: tl.constexpr,
    BY_CLASS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What each cell adds to the results, as weights of its row, from the label pixels that it has a share b in.

    With a = anchors_y, alpha = 1 / ||z_p||, p the softmax, s = du . u; planes of weights in this order, where M holds
    v b b' of the cell and the four neighbours behind it:

        MOMENTS    [y = k] b alpha; RAW: [y = k] b; M of v = a alpha^2, BY_CLASS: of v = [y = k] a alpha^2
        MIXTURES   p_k a b alpha; BY_CLASS: M of v = p_k a alpha^2
        BACKWARD   p_k a b alpha; [y = k] b alpha; RAW: [y = k] b; M of v = (own_y - s) alpha^2;
                   M of v = scales_y alpha^2, BY_CLASS: of v = [y = k] scales_y alpha^2, and v = 2 p_k a alpha^2

    The pixels between the cell and its neighbours towards one corner at a time: what these four cells have is loaded
    once for all of them. BY_CLASS has too much to hold, and loads it for each pixel, from the cache; so does float64.
    """
    ACC: tl.constexpr = numbers.dtype.element_ty
    HOLD: tl.constexpr = tl.float32 == ACC
    pixels = h * w
    per_image = tl.cdiv(pixels, BLOCK_P)
    plane = tl.full((), 1, tl.int64) * images * pixels  # an argument of 1 is no tensor
    k = tl.arange(0, BLOCK_K)[:, None]  # [BLOCK_K, 1]
    known = k < num_classes
    wanted = wanted_labels(k, num_classes, ignore_index)
    unit_y, unit_x = tl.full((), 0.5, ACC) / height, tl.full((), 0.5, ACC) / width
    logits = numbers + 5 * plane + k * plane  # [BLOCK_K, 1]
    constants = numbers + (5 + num_classes) * plane
    if KIND == 2:
        forms = constants + num_classes * plane  # of the matrices
        curvatures = forms + 5 * num_classes * plane + 5 * k * plane  # BY_CLASS
        if not BY_CLASS:
            curvatures = logits
    else:
        forms = constants
        curvatures = constants + 5 * k * plane
    if KIND > 0:
        floor = tl.load(floors + k, mask=known, other=float("-inf"))
    squared = tl.zeros((BLOCK_K, BLOCK_P), ACC)
    losses = tl.zeros((1, BLOCK_P), ACC)
    for tile in range(tl.program_id(0), images * per_image, tl.num_programs(0)):
        image = (tile // per_image).to(tl.int64)
        cell = ((tile % per_image) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]  # [1, BLOCK_P]: one layout throughout
        if WIDE:
            cell = cell.to(tl.int64)
        inside = cell < pixels
        cell_y, cell_x = cell // w, cell % w
        first_y, _from_y = window(cell_y, h, height, ACC)
        first_x, _from_x = window(cell_x, w, width, ACC)
        behind_y = ((2 * cell_y + 1) * height + h - 1) // (2 * h)  # the first label pixel that is not before the cell
        behind_x = ((2 * cell_x + 1) * width + w - 1) // (2 * w)
        here = image * pixels
        # W, and what RAW and the constants add: [BLOCK_K, BLOCK_P]
        linear = tl.zeros((BLOCK_K, BLOCK_P), ACC)
        of_class, raw = linear, linear
        # M of one matrix, then of one a class
        m0 = tl.zeros((1, BLOCK_P), ACC)
        m1, m2, m3, m4, n0, n1, n2, n3, n4 = m0, m0, m0, m0, m0, m0, m0, m0, m0
        c0, c1, c2, c3, c4, e0, e1, e2, e3, e4 = (
            linear,
            linear,
            linear,
            linear,
            linear,
            linear,
            linear,
            linear,
            linear,
            linear,
        )
        for step in range(4):
            corner = tl.full((), 0, tl.int32) + step
            is_below, is_right = corner // 2, corner % 2
            same = is_below == is_right  # the cell and its diagonal neighbour lie from upper left to lower right
            step_y, step_x = 2 * is_below - 1, 2 * is_right - 1
            there_y = inside & (cell_y + step_y >= 0) & (cell_y + step_y < h)
            there_x = inside & (cell_x + step_x >= 0) & (cell_x + step_x < w)
            there = there_y & there_x
            across, along = cell + step_x, cell + step_y * w
            diagonal = along + step_x
            if HOLD:
                g00, g11, g22, g33, g01, g23, g02, g13, g03, g12 = _products(
                    numbers + here, plane, cell, across, along, diagonal, inside, there_x, there_y, there, same
                )
            if KIND > 0:
                l0 = tl.load(logits + here + cell, mask=known & inside, other=0.0)  # [BLOCK_K, BLOCK_P]
                l1 = tl.load(logits + here + across, mask=known & there_x, other=0.0)
                l2 = tl.load(logits + here + along, mask=known & there_y, other=0.0)
                l3 = tl.load(logits + here + diagonal, mask=known & there, other=0.0)
            if KIND == 2 and HOLD and not BY_CLASS:
                f00, f11, f22, f33, f01, f23, f02, f13, f03, f12 = _products(
                    forms + here, plane, cell, across, along, diagonal, inside, there_x, there_y, there, same
                )
            # which of the products are with neighbours behind the cell
            is_1 = (is_right == 1).to(ACC)
            is_2 = ((is_below == 1) & (is_right == 0)).to(ACC)
            is_3 = (is_below == 1).to(ACC)
            is_4 = ((is_below == 1) & (is_right == 1)).to(ACC)
            start_y = tl.where(is_below == 1, behind_y, first_y)
            start_x = tl.where(is_right == 1, behind_x, first_x)
            for dy in range(steps_y):
                y = start_y + dy
                distance = ((2 * y + 1) * h - (2 * cell_y + 1) * height).to(ACC)
                in_y = inside & (y < height) & ((is_below == 1) | (y < behind_y))
                share_y = tl.where(in_y, share(clamped(distance, cell_y, h), unit_y), 0.0)
                line = image * height * width + y * width
                for dx in range(steps_x):
                    x = start_x + dx
                    distance = ((2 * x + 1) * w - (2 * cell_x + 1) * width).to(ACC)
                    in_x = (x < width) & ((is_right == 1) | (x < behind_x))
                    share_x = tl.where(in_x, share(clamped(distance, cell_x, w), unit_x), 0.0)
                    b0 = share_y * share_x  # [1, BLOCK_P]
                    label = load_labels(labels + line + x, b0 != 0.0)
                    category = class_of(label, b0 != 0.0)
                    valid = (category >= 0) & (category < num_classes) & (label != ignore_index)
                    b1 = share_y * (1.0 - share_x)
                    b2 = (1.0 - share_y) * share_x
                    b3 = (1.0 - share_y) * (1.0 - share_x)
                    if HOLD:
                        square = _form(b0, b1, b2, b3, g00, g11, g22, g33, g01, g23, g02, g13, g03, g12)
                    else:
                        square = _form_of(
                            numbers + here, plane, cell, across, along, diagonal, valid, same, b0, b1, b2, b3
                        )
                    square = tl.where(square < 0, 0.0, square)
                    alpha = tl.where(valid, inverse_norm(square), 0.0)
                    hit = tl.where(category == wanted, 1.0, 0.0).to(ACC)  # [BLOCK_K, BLOCK_P]
                    anchor = tl.load(anchors + category, mask=valid, other=0.0)
                    if RAW:
                        raw += hit * b0
                    if KIND == 0:
                        linear += hit * (b0 * alpha)
                        squared += hit * tl.where(valid, b0 * square * alpha * alpha, 0.0)
                        v = anchor * alpha * alpha * b0
                        if BY_CLASS:
                            c0 += hit * (v * b0)
                            c1 += hit * (v * b1 * is_1)
                            c2 += hit * (v * b3 * is_2)
                            c3 += hit * (v * b2 * is_3)
                            c4 += hit * (v * b3 * is_4)
                    else:
                        if KIND == 2:
                            alpha = tl.where(square <= ZERO_ROW_SQUARE, 0.0, alpha)
                        dot = _term(b0, l0) + _term(b1, l1) + _term(b2, l2) + _term(b3, l3)
                        exponent = tl.where(valid, alpha * dot, 0.0)
                        if BY_CLASS:
                            curved = _form_of(
                                curvatures + here,
                                plane,
                                cell,
                                across,
                                along,
                                diagonal,
                                known & valid,
                                same,
                                b0,
                                b1,
                                b2,
                                b3,
                            )
                            curved = tl.where(valid, alpha * alpha * curved, 0.0)
                            bent = exponent + 2.0 * curved  # what s takes
                            exponent += curved
                        else:
                            bent = exponent
                        exponent = tl.where(known, exponent + floor, float("-inf"))
                        most = tl.max(exponent, 0)[None, :]
                        most = tl.where(valid, most, 0.0)
                        p = tl.exp(exponent - most)
                        total = tl.sum(p, 0)[None, :]
                        p = tl.where(valid, p / total, 0.0)
                        pull = tl.where(known, p * anchor, 0.0)  # [BLOCK_K, BLOCK_P]
                        linear += pull * (b0 * alpha)
                        if KIND == 1:
                            losses += tl.where(anchor > 0, b0 * anchor * (most + tl.log(total)), 0.0)
                        else:
                            of_class += hit * (b0 * alpha)
                            constant = constants + category.to(tl.int64) * plane + here
                            c = _term(b0, tl.load(constant + cell, mask=valid, other=0.0))
                            c += _term(b1, tl.load(constant + across, mask=valid & (b1 != 0.0), other=0.0))
                            c += _term(b2, tl.load(constant + along, mask=valid & (b2 != 0.0), other=0.0))
                            c += _term(b3, tl.load(constant + diagonal, mask=valid & (b3 != 0.0), other=0.0))
                            if BY_CLASS:
                                f = _form_of(
                                    forms + here + 5 * category.to(tl.int64) * plane,
                                    plane,
                                    cell,
                                    across,
                                    along,
                                    diagonal,
                                    valid,
                                    same,
                                    b0,
                                    b1,
                                    b2,
                                    b3,
                                )
                            elif not HOLD:
                                f = _form_of(
                                    forms + here, plane, cell, across, along, diagonal, valid, same, b0, b1, b2, b3
                                )
                            else:
                                f = _form(b0, b1, b2, b3, f00, f11, f22, f33, f01, f23, f02, f13, f03, f12)
                            own_y = tl.load(own + category, mask=valid, other=0.0)
                            scale_y = tl.load(scales + category, mask=valid, other=0.0)
                            s = tl.sum(pull * tl.where(known, bent, 0.0), 0)[None, :] + alpha * c
                            # |u|^2 is 1, but of zero rows, of which alpha is 0
                            s += scale_y * alpha * alpha * f + own_y
                            v = tl.where(valid & (alpha > 0), (own_y - s) * alpha * alpha * b0, 0.0)
                            v = tl.where(alpha != alpha, alpha, v)
                            scale_y = tl.where(valid, scale_y * alpha * alpha * b0, 0.0)
                            if BY_CLASS:
                                c0 += hit * (scale_y * b0)
                                c1 += hit * (scale_y * b1 * is_1)
                                c2 += hit * (scale_y * b3 * is_2)
                                c3 += hit * (scale_y * b2 * is_3)
                                c4 += hit * (scale_y * b3 * is_4)
                            else:
                                n0 += scale_y * b0
                                n1 += scale_y * b1 * is_1
                                n2 += scale_y * b3 * is_2
                                n3 += scale_y * b2 * is_3
                                n4 += scale_y * b3 * is_4
                        if BY_CLASS:
                            twice: tl.constexpr = 2.0 if KIND == 2 else 1.0
                            u = twice * alpha * alpha * b0
                            e0 += pull * (u * b0)
                            e1 += pull * (u * b1 * is_1)
                            e2 += pull * (u * b3 * is_2)
                            e3 += pull * (u * b2 * is_3)
                            e4 += pull * (u * b3 * is_4)
                    if KIND == 2 or (KIND == 0 and not BY_CLASS):
                        m0 += v * b0
                        m1 += v * b1 * is_1
                        m2 += v * b3 * is_2
                        m3 += v * b2 * is_3
                        m4 += v * b3 * is_4
        to = weights + here + cell  # [1, BLOCK_P]
        there = known & inside
        tl.store(to + k * plane, linear, mask=there)
        to += num_classes * plane
        if KIND == 2:
            tl.store(to + k * plane, of_class, mask=there)
            to += num_classes * plane
        if RAW:
            tl.store(to + k * plane, raw, mask=there)
            to += num_classes * plane
        if KIND == 2 or (KIND == 0 and not BY_CLASS):
            _store_pairs(to, plane, m0, m1, m2, m3, m4, inside)
            to += 5 * plane
        if KIND == 2 and not BY_CLASS:
            _store_pairs(to, plane, n0, n1, n2, n3, n4, inside)
        if BY_CLASS and KIND != 1:
            _store_pairs(to + 5 * k * plane, plane, c0, c1, c2, c3, c4, there)
            to += 5 * num_classes * plane
        if BY_CLASS and KIND != 0:
            _store_pairs(to + 5 * k * plane, plane, e0, e1, e2, e3, e4, there)
    if KIND == 0:
        place = partial + tl.program_id(0).to(tl.int64) * num_classes + tl.arange(0, BLOCK_K)
        mask = tl.arange(0, BLOCK_K) < num_classes
        tl.store(place, tl.load(place, mask=mask, other=0.0) + tl.sum(squared, 1), mask=mask)
    if KIND == 1:
        place = partial + tl.program_id(0)
        tl.store(place, tl.load(place) + tl.sum(losses))


@triton.jit
def class_moments_linear(
    features,
    weights,
    sums,
    images,
    pixels,
    d,
    rows,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[slot, r] += sum_c W_rc z_c over every slots-th tile of cells."""
    ACC: tl.constexpr = sums.dtype.element_ty
    slot = tl.program_id(1)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (channel < d)[None, :]
    columns = (channel.to(tl.int64) * stride_channel)[None, :]
    per_image = tl.cdiv(pixels, BLOCK_P)
    plane = tl.full((), 1, tl.int64) * images * pixels  # an argument of 1 is no tensor
    place = sums + (slot.to(tl.int64) * rows + r)[:, None] * d + channel[None, :]
    there = (r < rows)[:, None] & in_row
    total = tl.load(place, mask=there, other=0.0)
    for tile in range(slot, images * per_image, tl.num_programs(1)):
        image = (tile // per_image).to(tl.int64)
        cell = (tile % per_image) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = cell < pixels
        weight = tl.load(
            weights + r.to(tl.int64)[:, None] * plane + (image * pixels + cell)[None, :],
            mask=(r < rows)[:, None] & inside[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_P]
        touched = tl.max((weight != 0.0).to(tl.int32), 0) > 0  # a cell that no pixel touches may hold NaN
        z = tl.load(
            features + image * stride_image + (cell.to(tl.int64) * stride_pixel)[:, None] + columns,
            mask=touched[:, None] & in_row,
            other=0.0,
        )  # [BLOCK_P, BLOCK_D]
        total -= _times(-weight, z, PRECISION, ACC)
    tl.store(place, total, mask=there)


@triton.jit
def class_moments_quadratic(
    features,
    weights,
    sums,
    images,
    h,
    w,
    d,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPARSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[slot, m] += sum_c (M_cc z_c / 2 + sum M_cc' z_c') z_c^T over every slots-th tile of cells, c' behind c.

    SPARSE: most tiles have no weight of most matrices.
    """
    ACC: tl.constexpr = sums.dtype.element_ty
    slot = tl.program_id(1)
    blocks = tl.cdiv(d, BLOCK_D)
    i = (tl.program_id(0) // blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    pixels = h * w
    per_image = tl.cdiv(pixels, BLOCK_P)
    plane = tl.full((), 1, tl.int64) * images * pixels  # an argument of 1 is no tensor
    weights += 5 * tl.program_id(2) * plane
    matrix = slot.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    place = sums + (matrix * d + i[:, None]) * d + j[None, :]
    there = (i < d)[:, None] & (j < d)[None, :]
    total = tl.load(place, mask=there, other=0.0)  # [BLOCK_D, BLOCK_D]
    for tile in range(slot, images * per_image, tl.num_programs(1)):
        image = (tile // per_image).to(tl.int64)
        cell = (tile % per_image) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = cell < pixels
        to = weights + image * pixels + cell
        m0 = tl.load(to, mask=inside, other=0.0)  # [BLOCK_P]
        any_weight = True
        if SPARSE:
            any_weight = tl.max((m0 != 0.0).to(tl.int32), 0) > 0
        if any_weight:
            right, left, down = _sides(cell, inside, h, w)
            base = features + image * stride_image
            base_i = base + (i.to(tl.int64) * stride_channel)[None, :]
            in_i = (i < d)[None, :]
            t = tl.zeros((BLOCK_P, BLOCK_D), ACC)
            t = _add_row(t, base_i, cell, 0.5 * m0, in_i, stride_pixel, ACC)
            t = _add_row(t, base_i, cell + 1, tl.load(to + plane, mask=right, other=0.0), in_i, stride_pixel, ACC)
            m = tl.load(to + 2 * plane, mask=left & down, other=0.0)
            t = _add_row(t, base_i, cell + w - 1, m, in_i, stride_pixel, ACC)
            t = _add_row(t, base_i, cell + w, tl.load(to + 3 * plane, mask=down, other=0.0), in_i, stride_pixel, ACC)
            m = tl.load(to + 4 * plane, mask=right & down, other=0.0)
            t = _add_row(t, base_i, cell + w + 1, m, in_i, stride_pixel, ACC)
            z = tl.load(
                base + (cell.to(tl.int64) * stride_pixel)[:, None] + (j.to(tl.int64) * stride_channel)[None, :],
                mask=(m0 != 0.0)[:, None] & (j < d)[None, :],
                other=0.0,
            )
            total -= _times(-tl.trans(t), z, PRECISION, ACC)
    tl.store(place, total, mask=there)


@triton.jit
def class_moments_gradient(
    features,
    vectors,
    matrices,
    weights,
    gradient,
    images,
    h,
    w,
    d,
    rows,
    number,
    stride_image,
    stride_channel,
    stride_pixel,
    grad_image,
    grad_channel,
    grad_pixel,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPARSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz_c = sum_r W_rc vectors_r + sum_c' M'_cc' z_c' + sum_m matrices_m sum_c' M^m_cc' z_c', c' all around c.

    M_cc' of a neighbour before the cell is what that one has of the cell. SPARSE as in the quadratic sums.
    """
    ACC: tl.constexpr = weights.dtype.element_ty
    pixels = h * w
    per_image = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // per_image).to(tl.int64)
    cell = (tl.program_id(0) % per_image) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inside = cell < pixels
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (channel < d)[:, None]
    plane = tl.full((), 1, tl.int64) * images * pixels  # an argument of 1 is no tensor
    weights += image * pixels
    total = tl.zeros((BLOCK_D, BLOCK_P), ACC)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        vector = tl.load(
            vectors + r.to(tl.int64)[None, :] * d + channel[:, None], mask=(r < rows)[None, :] & in_row, other=0.0
        )  # [BLOCK_D, BLOCK_R]
        weight = tl.load(
            weights + r.to(tl.int64)[:, None] * plane + cell[None, :],
            mask=(r < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.dot(vector, weight, input_precision=PRECISION, out_dtype=ACC)
    weights += rows * plane
    features += image * stride_image
    base = features + (channel.to(tl.int64) * stride_channel)[:, None]
    total += _around(weights, plane, base, cell, inside, in_row, h, w, stride_pixel, BLOCK_D, BLOCK_P, ACC)
    for _ in range(number):
        weights += 5 * plane
        any_weight = True
        if SPARSE:
            any_weight = tl.max((tl.load(weights + cell, mask=inside, other=0.0) != 0.0).to(tl.int32), 0) > 0
        if any_weight:
            for start in range(0, d, BLOCK_D):
                other = start + tl.arange(0, BLOCK_D)
                base = features + (other.to(tl.int64) * stride_channel)[:, None]
                in_other = (other < d)[:, None]
                bent = _around(weights, plane, base, cell, inside, in_other, h, w, stride_pixel, BLOCK_D, BLOCK_P, ACC)
                matrix = _matrix(matrices, channel, other, d)
                total += tl.dot(matrix, bent, input_precision=PRECISION, out_dtype=ACC)
        matrices += d * d
    offset = image * grad_image + (channel.to(tl.int64) * grad_channel)[:, None]
    offset += (cell.to(tl.int64) * grad_pixel)[None, :]
    tl.store(gradient + offset, total.to(gradient.dtype.element_ty), mask=in_row & inside[None, :])


@triton.jit
def class_moments_add(
    partial, total, slots, entries, d, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """total = the sum over slots of partial, in a fixed order; TRANSPOSED: and of its transpose, d by d."""
    ACC: tl.constexpr = total.dtype.element_ty
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    added = _add_slots(partial, slots, entry, entries, s, tl.zeros((BLOCK_S, BLOCK_E), ACC))
    if TRANSPOSED:
        row, column = entry // d % d, entry % d
        other = entry + (column - row) * (d - 1)  # where row and column change places
        other = tl.where(entry < entries, other, entries)
        added += _add_slots(partial, slots, other, entries, s, tl.zeros((BLOCK_S, BLOCK_E), ACC))
    tl.store(total + entry, added, mask=entry < entries)


@triton.jit
def _tile(tile, per_image, pixels, labels, num_classes, ignore_index, BLOCK_P: tl.constexpr):
    """The image and the pixels of a tile, their classes, and whether they have one; [BLOCK_P]."""
    image = (tile // per_image).to(tl.int64)
    p = (tile % per_image).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    label = load_labels(labels + image * pixels + p, p < pixels)
    y = class_of(label, p < pixels)
    return image, p, y, (y >= 0) & (y < num_classes) & (label != ignore_index)


@triton.jit
def _softmax(exponent, floor, valid):
    """Softmax and log-sum-exp over classes, of exponents [BLOCK_K, BLOCK_P]; 0 where not valid."""
    exponent = exponent + floor[:, None]
    most = tl.where(valid, tl.max(exponent, 0), 0.0)
    p = tl.exp(exponent - most[None, :])
    total = tl.sum(p, 0)
    return tl.where(valid[None, :], p / total[None, :], 0.0), tl.where(valid, most + tl.log(total), 0.0)


@triton.jit
def _sides(cell, inside, h, w):
    """Whether a cell has a neighbour to the right, to the left and below."""
    x = cell % w
    return inside & (x < w - 1), inside & (x > 0), cell < (h - 1) * w


@triton.jit
def _rows(base, cell, there, in_row, stride_pixel):
    """[BLOCK_D, BLOCK_P] in the features' dtype, 0 where there is none."""
    return tl.load(base + (cell.to(tl.int64) * stride_pixel)[None, :], mask=there[None, :] & in_row, other=0.0)


@triton.jit
def _matrix(matrix, i, j, d):
    place = matrix + i.to(tl.int64)[:, None] * d + j[None, :]
    return tl.load(place, mask=(i < d)[:, None] & (j < d)[None, :], other=0.0)


@triton.jit
def _store_pairs(place, plane, g0, g1, g2, g3, g4, mask):
    tl.store(place, g0, mask=mask)
    tl.store(place + plane, g1, mask=mask)
    tl.store(place + 2 * plane, g2, mask=mask)
    tl.store(place + 3 * plane, g3, mask=mask)
    tl.store(place + 4 * plane, g4, mask=mask)


@triton.jit
def _products(planes, plane, cell, across, along, diagonal, inside, there_x, there_y, there, same):
    """The ten products of 2 x 2 cells with each other, numbered cell, across, along, diagonal: 0 to 3."""
    to_diagonal, to_other = tl.where(same, 4, 2) * plane, tl.where(same, 2, 4) * plane
    g00 = tl.load(planes + cell, mask=inside, other=0.0)
    g11 = tl.load(planes + across, mask=there_x, other=0.0)
    g22 = tl.load(planes + along, mask=there_y, other=0.0)
    g33 = tl.load(planes + diagonal, mask=there, other=0.0)
    g01 = tl.load(planes + plane + tl.minimum(cell, across), mask=there_x, other=0.0)
    g23 = tl.load(planes + plane + tl.minimum(along, diagonal), mask=there, other=0.0)
    g02 = tl.load(planes + 3 * plane + tl.minimum(cell, along), mask=there_y, other=0.0)
    g13 = tl.load(planes + 3 * plane + tl.minimum(across, diagonal), mask=there, other=0.0)
    g03 = tl.load(planes + to_diagonal + tl.minimum(cell, diagonal), mask=there, other=0.0)
    g12 = tl.load(planes + to_other + tl.minimum(across, along), mask=there, other=0.0)
    return g00, g11, g22, g33, g01, g23, g02, g13, g03, g12


@triton.jit
def _form(b0, b1, b2, b3, g00, g11, g22, g33, g01, g23, g02, g13, g03, g12):
    """z_p^T M z_p from the ten products of the four cells around p."""
    total = _term(b0 * b0, g00) + _term(b1 * b1, g11) + _term(b2 * b2, g22) + _term(b3 * b3, g33)
    total += 2.0 * (_term(b0 * b1, g01) + _term(b2 * b3, g23) + _term(b0 * b2, g02) + _term(b1 * b3, g13))
    return total + 2.0 * (_term(b0 * b3, g03) + _term(b1 * b2, g12))


@triton.jit
def _form_of(planes, plane, cell, across, along, diagonal, valid, same, b0, b1, b2, b3):
    """:func:`_form` of products that are loaded where their weight is not 0."""
    x, y, xy = valid & (b1 != 0.0), valid & (b2 != 0.0), valid & (b3 != 0.0)
    g00, g11, g22, g33, g01, g23, g02, g13, g03, g12 = _products(
        planes, plane, cell, across, along, diagonal, valid, x, y, xy, same
    )
    return _form(b0, b1, b2, b3, g00, g11, g22, g33, g01, g23, g02, g13, g03, g12)


@triton.jit
def _term(weight, number):
    """0 where the weight is, whatever the number: it may be of a cell that holds NaN."""
    return tl.where(weight != 0.0, weight * number, 0.0)


@triton.jit
def _add_row(t, base, cell, m, in_row, stride_pixel, ACC: tl.constexpr):
    """t + m z of a cell, [BLOCK_P, BLOCK_D]; where m is 0 it is not read."""
    place = base + (cell.to(tl.int64) * stride_pixel)[:, None]
    return t + m[:, None] * tl.load(place, mask=(m != 0.0)[:, None] & in_row, other=0.0).to(ACC)


@triton.jit
def _around(
    planes,
    plane,
    base,
    cell,
    inside,
    in_row,
    h,
    w,
    stride_pixel,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """sum_c' M_cc' z_c' over the cell and its eight neighbours, [BLOCK_D, BLOCK_P], row by row."""
    total = tl.zeros((BLOCK_D, BLOCK_P), ACC)
    x = cell % w
    for step in range(9):
        n = tl.full((), 0, tl.int32) + step
        dy, dx = n // 3 - 1, n % 3 - 1
        other = cell + dy * w + dx
        there = inside & (other >= 0) & (other < h * w) & (x + dx >= 0) & (x + dx < w)
        owner = tl.where(n < 4, other, cell)  # who has the product
        which = tl.where(n < 4, 4 - n, n - 4)
        m = tl.load(planes + which * plane + owner, mask=there, other=0.0)
        rows = tl.load(
            base + (other.to(tl.int64) * stride_pixel)[None, :], mask=in_row & (m != 0.0)[None, :], other=0.0
        )
        total += m[None, :] * rows.to(ACC)
    return total
