"""log D_i = log sum_j w_j exp(s_ij) of Eq. 6 and its gradient, tile by tile: O(N^2 d) time, O(N) memory.

Symmetric rows (a set against itself) take the two ways that no general attention kernel has. Forward: e_ij serves row i
and column j, so half the tiles do, 0.5 G and N^2 / 2 exponentials (G = 2 N^2 d flops). Backward: the gradient matrix is
symmetric, so one kernel over rows does, 2 G, without atomics. Both shift each similarity by a constant of its row and
its column instead of a running maximum:

    e_ij = exp(s_ij - h_i - h_j) <= 1,    h = 1 / (2 tau) for unit rows,    h_i = ||z_i||^2 / (2 tau) for raw ones
    D_i  = exp(h_i + h_max) sum_j omega_j e_ij,    omega_j = w_j exp(h_j - h_max)
    dL/du_i = (1 / tau) sum_j e_ij (rho_i omega_j + rho_j omega_i) u_j,    rho_i = a_i / sum_j omega_j e_ij

which holds while no sum underflows. Where one might (raw rows of widely spread norms, zero rows at a low temperature),
or where a norm is not finite, a flag on the device, never read by the host, hands all rows to the general kernels. They
keep a running maximum, take anchors against other keys too, need all the tiles, and by the compiled code some four to
eight times the instructions an element.

Exponentials are powers of two (factor = log2(e) / tau goes into the similarity), sums are float32, or float64 for
float64 rows. Products: bfloat16 and float16 as they are, float32 as three TF32 products (``launch.input_precision``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from in2nect.kernels.launch import (
    choose,
    deterministic,
    input_precision,
    launch,
    next_power_of_2,
    pixel_strides,
    processors,
    tuned,
)
from in2nect.kernels.table import Entry

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ZERO_ROW_NORM = tl.constexpr(1e-12)  # reference.ZERO_ROW_NORM: a shorter row has no direction

NOT_QUITE_ONE = tl.constexpr(1 - 1e-6)  # 1 for a row at ZERO_ROW_NORM, whatever the division rounds to

# The spread of h, in powers of two, up to which the constant shift keeps float32's precision: the row's own term is at
# least 2^-60 times its weight, which is 2^-24 or more for 16 million pixels; a term that float32 flushes to zero, of
# 2^-126, is then 2^-42 of the sum. (Fixed point lacks that range: in deterministic mode raw rows go to the general
# kernels.)
WIDEST_SPREAD = 60.0

# The shift log2(e) / tau, in powers of two, up to which unit rows may hold zero rows. These are the only ones without a
# term of 1: their sum is 2^-shift of the weights, of which fixed point keeps 62 bits, and their rho is 2^40 (1 / 1e-12)
# times its inverse, of float32's 2^127.
COLDEST_SHIFT = tl.constexpr(20.0)

# Of the half-matrix forward: two are resident, so some sixteen waves, of which the last may be partly empty. With 8, an
# A6000 would work 65,536 rows in 3.05 waves.
PROGRAMS_A_PROCESSOR = 32
LARGEST_TILE = 1024  # of rows or channels
MOST_ROWS = 128  # of a tile of the pairwise kernels
WIDTH_MULTIPLE = 16  # what Triton specialises a stride on
ELEMENTWISE = 1024  # numbers a program of the kernels which take one number a row

# How a tile of rows finds its pixels: all rows at one stride; a tile within one image; or a division a row.
ONE_STRIDE = tl.constexpr(0)
WITHIN_IMAGE = tl.constexpr(1)
ANYWHERE = tl.constexpr(2)


class Rows(NamedTuple):
    """Features (B, d, h, w) as N = B h w rows of d numbers, found by stride."""

    features: Tensor
    number: int
    dim: int
    pixels: int  # of an image; of all of them, where one stride walks through all
    stride_b: int
    stride_d: int
    stride_p: int

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.features.dtype == torch.float64 else torch.float32

    @property
    def place(self) -> tuple[int, int, int, int, int]:
        """What every kernel takes of a set of rows after its pointer."""
        return self.number, self.pixels, self.stride_b, self.stride_d, self.stride_p

    @property
    def wide(self) -> bool:
        """Whether offsets, those of the masked ends of tiles too, need 64 bits."""
        images = self.number // max(self.pixels, 1)
        rows = images * self.stride_b + (self.pixels + LARGEST_TILE) * self.stride_p
        return rows + (self.dim + LARGEST_TILE) * self.stride_d >= 2**31

    def walk(self, *tiles: int) -> int:
        """How tiles of these sizes find their pixels."""
        if self.pixels == self.number:
            return ONE_STRIDE.value
        return WITHIN_IMAGE.value if all(self.pixels % tile == 0 for tile in tiles) else ANYWHERE.value


class PerRow(NamedTuple):
    """A number a row: given for each row, or for each class together with the rows' labels (ignored rows have 0)."""

    values: Tensor  # (N,), or (K,) with labels
    labels: Tensor | None = None  # (N,)
    ignore_index: int = -1

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        labels = self.values if self.labels is None else self.labels
        return self.values, labels, self.values.shape[0], self.ignore_index


class Positive(NamedTuple):
    """The gradient of the positive term, taken off each row's before it is written: values[y] - own[y] z."""

    values: Tensor  # (K, d): 2 S_k / (n_k (n_k - 1) tau) times the upstream gradient, 0 for classes without a pair
    own: Tensor  # (K,): the same without S_k
    labels: Tensor  # (N,)
    ignore_index: int


class Symmetric(NamedTuple):
    """What both directions of the symmetric form need of the rows, one pass over them."""

    rows: Rows
    normalize: bool
    inverse_temperature: Tensor  # (1,)
    norms: Tensor  # (N,): 1 / ||z|| of unit rows, else h in powers of two
    omega: Tensor  # (N,)
    peak: Tensor  # (1,): h_max in powers of two; unused for unit rows
    flag: Tensor  # (1,) int32: not 0 where the general kernels are to do the work


def as_rows(features: Tensor, *, wide_loads: bool = False) -> Rows:
    """Features (B, d, h, w), or rows (N, d), as :class:`Rows`.

    Args:
        wide_loads: copy features of which 16 bytes cannot be loaded at once (an odd grid or width, a crop) to rows that
            start at multiples of 16: element by element a tile's addresses alone would fill the registers.
    """
    if features.dim() == 2:
        features = features.T[None, :, None]
    batch, dim, height, width = features.shape
    features, stride_b, stride_d, stride_p = pixel_strides(features)
    pixels = height * width
    if batch == 1 or stride_b == pixels * stride_p:
        pixels, stride_b = batch * pixels, 0
    rows = Rows(features, batch * height * width, dim, pixels, stride_b, stride_d, stride_p)
    if not wide_loads or rows.number == 0 or _loads_are_wide(rows):
        return rows
    padded = features.new_empty((rows.number, triton.cdiv(dim, WIDTH_MULTIPLE) * WIDTH_MULTIPLE))
    padded.view(batch, height, width, -1)[..., :dim].copy_(features.permute(0, 2, 3, 1))
    return Rows(padded, rows.number, dim, rows.number, 0, 1, padded.shape[1])


def pair_logsumexp(anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float) -> Tensor:
    """log D (N,) of anchors (N, d) against keys (M, d), or against themselves, under weights (M,)."""
    own, per_key = as_rows(anchors, wide_loads=True), PerRow(weights.contiguous())
    inverse_temperature = inverse(temperature, own)
    log_d = torch.empty(own.number, dtype=own.accumulator, device=anchors.device)
    if keys is not None:
        general_forward(own, as_rows(keys, wide_loads=True), per_key, inverse_temperature, log_d)
    elif own.number > 0:
        shape = symmetric(own, per_key, inverse_temperature, normalize=False)
        symmetric_forward(shape, log_d)
        general_forward(own, own, per_key, inverse_temperature, log_d, flag=shape.flag)
    return log_d


def pair_logsumexp_backward(
    grad: Tensor, log_d: Tensor, anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gradients of anchors (N, d) and keys (M, d), the latter empty where the anchors are their own keys."""
    own = as_rows(anchors, wide_loads=True)
    per_key, coefficients = PerRow(weights.contiguous()), PerRow(grad.contiguous())
    grad_anchors = torch.empty_like(anchors)
    if keys is None:
        backward(own, per_key, coefficients, log_d, temperature, as_rows(grad_anchors), normalize=False)
        return grad_anchors, anchors.new_empty((0, anchors.shape[1]))
    others, grad_keys = as_rows(keys, wide_loads=True), torch.empty_like(keys)
    settings = per_key, coefficients, log_d, inverse(temperature, own)
    general_backward(own, others, *settings, as_rows(grad_anchors), own_is_anchor=True)
    general_backward(others, own, *settings, as_rows(grad_keys), own_is_key=True)
    return grad_anchors, grad_keys


def forward(rows: Rows, weights: PerRow, temperature: float, log_d: Tensor, *, normalize: bool) -> None:
    """Writes log D (N,) of rows against themselves."""
    if rows.number == 0:
        return
    inverse_temperature = inverse(temperature, rows)
    shape = symmetric(rows, weights, inverse_temperature, normalize=normalize)
    symmetric_forward(shape, log_d)
    general_forward(rows, rows, weights, inverse_temperature, log_d, normalize=normalize, flag=shape.flag)


def backward(
    rows: Rows,
    weights: PerRow,
    coefficients: PerRow,
    log_d: Tensor,
    temperature: float,
    out: Rows,
    *,
    normalize: bool,
    positive: Positive | None = None,
) -> None:
    """Writes the gradient of rows against themselves, of sum_i a_i log D_i and, on request, of the positive term.

    Args:
        coefficients: a_i times the upstream gradient.
        out: the gradient of the rows before normalisation, every element written once.
        normalize: rows were compared by direction.
        positive: taken off on the way, so that the whole gradient is rounded to its dtype once.
    """
    if rows.number == 0:
        return
    dtype, device = rows.features.dtype, log_d.device
    narrowest = min(
        choose(name, device, dtype, rows.dim).blocks["BLOCK_D"] for name in ("pair_symmetric_backward", "pair_backward")
    )
    # Rows wider than a tile come in parts, and a direction's gradient needs the row: then through a buffer.
    in_parts = positive is not None and rows.dim > narrowest
    target, on_the_way = out, positive
    if in_parts:
        target, on_the_way = as_rows(log_d.new_empty((rows.number, rows.dim))), None
    inverse_temperature = inverse(temperature, rows)
    shape = symmetric(rows, weights, inverse_temperature, normalize=normalize)
    symmetric_backward(shape, coefficients, log_d, target, on_the_way)
    general_backward(
        rows,
        rows,
        weights,
        coefficients,
        log_d,
        inverse_temperature,
        target,
        own_is_anchor=True,
        own_is_key=True,
        normalize=normalize,
        flag=shape.flag,
        positive=on_the_way,
    )
    if in_parts:
        assert positive is not None
        entry = choose("pair_positive", device, dtype, rows.dim)
        block_p = entry.blocks["BLOCK_P"]
        launch(
            pair_positive,
            (triton.cdiv(rows.number, block_p),),
            target.features,
            rows.features,
            *rows.place,
            *_target(out, positive),
            DIM=rows.dim,
            BLOCK_P=block_p,
            BLOCK_D=next_power_of_2(rows.dim),
            WALK=rows.walk(block_p),
            WIDE=rows.wide or out.wide or target.wide,
            NORMALIZE=normalize,
            warps=entry.warps,
            stages=entry.stages,
        )


def inverse(temperature: float, rows: Rows) -> Tensor:
    """1 / temperature (1,), in the dtype of the sums: as a number Triton would take it in float32."""
    return torch.full((1,), 1 / temperature, dtype=rows.accumulator, device=rows.features.device)


def symmetric(rows: Rows, weights: PerRow, inverse_temperature: Tensor, *, normalize: bool) -> Symmetric:
    """Norms, weights and the flag of rows that are their own keys.

    Args:
        rows: at least one.
        weights: w of each row; with labels, an ignored row is no anchor either and may hold anything.
        inverse_temperature: of :func:`inverse`.
        normalize: compare directions.
    """
    device = rows.features.device
    norms = torch.empty(rows.number, dtype=rows.accumulator, device=device)
    omega = torch.empty_like(norms)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    entry = choose("pair_row_statistics", device, rows.features.dtype, rows.dim)
    block_p = entry.blocks["BLOCK_P"]
    launch(
        pair_row_statistics,
        (triton.cdiv(rows.number, block_p),),
        rows.features,
        *rows.place,
        *weights.arguments,
        norms,
        omega,
        flag,
        inverse_temperature,
        DIM=rows.dim,
        BLOCK_P=block_p,
        BLOCK_D=min(entry.blocks["BLOCK_D"], next_power_of_2(rows.dim)),
        WALK=rows.walk(block_p),
        WIDE=rows.wide,
        LABELLED=weights.labels is not None,
        NORMALIZE=normalize,
        warps=entry.warps,
        stages=entry.stages,
    )
    if normalize:
        return Symmetric(rows, normalize, inverse_temperature, norms, omega, norms, flag)
    there = omega > 0
    peak = torch.where(there, norms, -math.inf).amax().reshape(1)
    peak = torch.where(torch.isneginf(peak), 0.0, peak)
    lowest = torch.where(there, norms, peak).amin()
    wide = peak - lowest > WIDEST_SPREAD
    if (
        weights.labels is None
    ):  # rows of weight 0 are anchors without a term of their own, so all terms must be in range
        wide = wide | (~there.all() & (4 * norms.amax() > WIDEST_SPREAD))
    if deterministic():
        wide = torch.ones_like(wide)
    del there
    omega.mul_((norms - peak).clamp_(max=0).exp2_())  # only rows of weight 0 lie above the peak
    return Symmetric(rows, normalize, inverse_temperature, norms, omega, peak, flag | wide.to(torch.int32))


def symmetric_forward(shape: Symmetric, log_d: Tensor) -> None:
    """Writes log D (N,) unless the flag is up: half the tiles, each for its rows and its columns."""
    rows, device = shape.rows, log_d.device
    fixed_point = deterministic()
    scale = shape.peak  # of no use to floats
    if fixed_point:  # a sum is at most that of all omega: as an integer it stays within 2^62
        largest = shape.omega.sum(dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
        scale = torch.exp2((62 - torch.log2(largest)).floor()).reshape(1)
    sums = torch.empty(rows.number, dtype=torch.int64 if fixed_point else log_d.dtype, device=device)

    def run(entry: Entry) -> None:
        block_m, block_n = entry.blocks["BLOCK_M"], entry.blocks["BLOCK_N"]
        tiles = triton.cdiv(rows.number, block_n)
        steps = tiles // 2 + 1
        # several waves of programs even out the last one; fewer tiles a program would not pay for loading its own
        parts = min(steps, max(1, PROGRAMS_A_PROCESSOR * processors(device) // tiles))
        chunk = triton.cdiv(steps, parts)
        sums.zero_()
        launch(
            pair_symmetric_forward,
            (tiles, triton.cdiv(steps, chunk)),
            rows.features,
            *rows.place,
            shape.norms,
            shape.omega,
            shape.flag,
            scale,
            sums,
            tiles,
            chunk,
            shape.inverse_temperature,
            DIM=rows.dim,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=min(entry.blocks["BLOCK_D"], next_power_of_2(rows.dim)),
            WALK=rows.walk(block_m, block_n),
            WIDE=rows.wide,
            EVEN=rows.number % block_n == 0,
            NORMALIZE=shape.normalize,
            FIXED_POINT=fixed_point,
            PRECISION=input_precision(rows.features.dtype),
            warps=entry.warps,
            stages=entry.stages,
        )

    run(tuned("pair_symmetric_forward", device, rows.features.dtype, rows.dim, run))
    launch(
        pair_finish,
        (triton.cdiv(rows.number, ELEMENTWISE),),
        sums,
        shape.norms,
        shape.peak,
        shape.flag,
        scale,
        log_d,
        rows.number,
        shape.inverse_temperature,
        BLOCK=ELEMENTWISE,
        NORMALIZE=shape.normalize,
        FIXED_POINT=fixed_point,
        warps=4,
        stages=1,
    )


def symmetric_backward(
    shape: Symmetric, coefficients: PerRow, log_d: Tensor, out: Rows, positive: Positive | None = None
) -> None:
    """Writes the gradient of the rows, unless the flag is up: tiles by rows, so that nothing is added across programs.

    Uses up ``shape.omega``.
    """
    rows, device, dtype = shape.rows, log_d.device, shape.rows.features.dtype
    rho = torch.empty_like(shape.omega)
    launch(
        pair_coefficients,
        (triton.cdiv(rows.number, ELEMENTWISE),),
        shape.norms,
        shape.omega,
        shape.peak,
        *coefficients.arguments,
        log_d,
        rho,
        rows.number,
        shape.inverse_temperature,
        BLOCK=ELEMENTWISE,
        LABELLED=coefficients.labels is not None,
        NORMALIZE=shape.normalize,
        warps=4,
        stages=1,
    )

    def run(entry: Entry) -> None:
        block_m, block_n = entry.blocks["BLOCK_M"], entry.blocks["BLOCK_N"]
        block_d = min(entry.blocks["BLOCK_D"], next_power_of_2(rows.dim))
        launch(
            pair_symmetric_backward,
            (triton.cdiv(rows.number, block_m), triton.cdiv(rows.dim, block_d)),
            rows.features,
            *rows.place,
            shape.norms,
            shape.omega,
            rho,
            shape.flag,
            *_target(out, positive),
            shape.inverse_temperature,
            DIM=rows.dim,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            WALK=rows.walk(block_m, block_n),
            WIDE=rows.wide or out.wide,
            EVEN=rows.number % block_m == 0 and rows.number % block_n == 0,
            NORMALIZE=shape.normalize,
            POSITIVE=positive is not None,
            PRECISION=input_precision(dtype),
            warps=entry.warps,
            stages=entry.stages,
        )

    run(tuned("pair_symmetric_backward", device, dtype, rows.dim, run))


def general_forward(
    anchors: Rows,
    keys: Rows,
    weights: PerRow,
    inverse_temperature: Tensor,
    log_d: Tensor,
    *,
    normalize: bool = False,
    flag: Tensor | None = None,
) -> None:
    """Writes log D (N,) of anchors against keys with a running maximum; with a flag, where it is up."""
    dtype = anchors.features.dtype
    entry = choose("pair_forward", log_d.device, dtype, anchors.dim)
    block_m, block_n = entry.blocks["BLOCK_M"], entry.blocks["BLOCK_N"]
    launch(
        pair_forward,
        (triton.cdiv(anchors.number, block_m),),
        anchors.features,
        *anchors.place,
        keys.features,
        *keys.place,
        *weights.arguments,
        log_d if flag is None else flag,
        log_d,
        inverse_temperature,
        DIM=anchors.dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=min(entry.blocks["BLOCK_D"], next_power_of_2(anchors.dim)),
        OWN_WALK=anchors.walk(block_m),
        WALK=keys.walk(block_n),
        WIDE=anchors.wide or keys.wide,
        LABELLED=weights.labels is not None,
        NORMALIZE=normalize,
        FLAGGED=flag is not None,
        PRECISION=input_precision(dtype),
        warps=entry.warps,
        stages=entry.stages,
    )


def general_backward(
    own: Rows,
    others: Rows,
    weights: PerRow,
    coefficients: PerRow,
    log_d: Tensor,
    inverse_temperature: Tensor,
    out: Rows,
    *,
    own_is_anchor: bool = False,
    own_is_key: bool = False,
    normalize: bool = False,
    flag: Tensor | None = None,
    positive: Positive | None = None,
) -> None:
    """Writes the gradient of one set of rows, anchors or keys or both, from the other; with a flag, where it is up."""
    dtype = own.features.dtype
    entry = choose("pair_backward", log_d.device, dtype, own.dim)
    block_m, block_n = entry.blocks["BLOCK_M"], entry.blocks["BLOCK_N"]
    block_d = min(entry.blocks["BLOCK_D"], next_power_of_2(own.dim))
    launch(
        pair_backward,
        (triton.cdiv(own.number, block_m), triton.cdiv(own.dim, block_d)),
        own.features,
        *own.place,
        others.features,
        *others.place,
        *weights.arguments,
        coefficients.values,
        log_d,
        log_d if flag is None else flag,
        *_target(out, positive),
        inverse_temperature,
        DIM=own.dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        OWN_WALK=own.walk(block_m),
        WALK=others.walk(block_n),
        WIDE=own.wide or others.wide or out.wide,
        OWN_IS_ANCHOR=own_is_anchor,
        OWN_IS_KEY=own_is_key,
        LABELLED=weights.labels is not None,
        NORMALIZE=normalize,
        POSITIVE=positive is not None,
        FLAGGED=flag is not None,
        PRECISION=input_precision(dtype),
        warps=entry.warps,
        stages=entry.stages,
    )


def _loads_are_wide(rows: Rows) -> bool:
    """Whether Triton may load 16 bytes at a time: what it knows are strides that are multiples of 16, and addresses."""
    strides = rows.stride_b, rows.stride_d, rows.stride_p
    regular = all(stride % WIDTH_MULTIPLE == 0 for stride in strides if stride != 1) and 1 in strides[1:]
    tiles_fit = rows.pixels == rows.number or rows.pixels % MOST_ROWS == 0
    return regular and tiles_fit and rows.features.data_ptr() % 16 == 0


@triton.jit
def pair_row_statistics(
    features,
    count,
    pixels,
    stride_b,
    stride_d,
    stride_p,
    weights,
    labels,
    num_classes,
    ignore_index,
    norms,
    omega,
    flag,
    inverse_temperature,
    DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WALK: tl.constexpr,
    WIDE: tl.constexpr,
    LABELLED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """1 / max(||z||, 1e-12), or h = log2(e) ||z||^2 / (2 tau); the weight; and the flag where a norm is not finite, or
    where the direction of a zero row is compared at a low temperature."""
    ACC: tl.constexpr = norms.dtype.element_ty
    start = tl.program_id(0) * BLOCK_P
    i = start + tl.arange(0, BLOCK_P)
    inside = i < count
    offsets = pixel_offsets(start, pixels, stride_b, stride_p, BLOCK_P, WALK, WIDE)
    square = tl.zeros((BLOCK_P,), ACC)
    for first in range(0, DIM, BLOCK_D):
        z = load_rows(features, offsets, stride_d, inside, first, DIM, BLOCK_D).to(ACC)  # [BLOCK_P, BLOCK_D]
        square += tl.sum(z * z, 1)
    weight = row_value(weights, labels, i, inside, num_classes, ignore_index, LABELLED).to(ACC)
    if NORMALIZE:
        norm = 1 / tl.maximum(tl.sqrt(square), ZERO_ROW_NORM)
    else:
        norm = square * (tl.load(inverse_temperature) * (LOG2_E * 0.5))
    tl.store(norms + i, norm, mask=inside)
    tl.store(omega + i, weight, mask=inside)
    finite = square < float("inf")
    raised = inside & (finite == 0)
    if NORMALIZE:
        shift = tl.load(inverse_temperature) * LOG2_E
        lowest = tl.where(shift > COLDEST_SHIFT, ZERO_ROW_NORM, -1.0)  # of a weighted row's norm
        raised = raised | (inside & (weight > 0) & (tl.sqrt(square) <= lowest))
    tl.atomic_max(flag + i * 0, tl.where(raised, 1, 0), mask=raised, sem="relaxed")


@triton.jit
def pair_symmetric_forward(
    features,
    count,
    pixels,
    stride_b,
    stride_d,
    stride_p,
    norms,
    omega,
    flag,
    scale,
    sums,
    tiles,
    chunk,
    inverse_temperature,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WALK: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FIXED_POINT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums_i += sum_j omega_j e_ij over half of the tiles: e of tile (a, b) is added to the rows of a and of b.

    Tile t of BLOCK_N rows meets tiles t, t + 1, ..., t + tiles / 2, counted round: every pair of tiles once, and all
    programs have equally much to do. Program (t, c) takes the c-th ``chunk`` of them, BLOCK_M rows at a time. Its own
    tile lies along the columns of e, whose sums stay in registers; the sums along the rows, which four lanes share, go
    to the other tile's rows by atomic addition: floats, or integers in units of 1 / scale, whose order is nothing.
    """
    if tl.load(flag) != 0:
        return
    ACC: tl.constexpr = norms.dtype.element_ty
    PARTS: tl.constexpr = BLOCK_N // BLOCK_M
    factor = tl.load(inverse_temperature) * LOG2_E
    own_tile = tl.program_id(0)
    first = tl.program_id(1) * chunk
    half = tiles // 2
    # with an even number of tiles the two at half the way round meet twice: the lower one takes them
    last = tl.where((tiles % 2 == 0) & (own_tile >= half), half - 1, half)
    j = own_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    own_inside = within(j, count, EVEN)
    own_offsets = pixel_offsets(own_tile * BLOCK_N, pixels, stride_b, stride_p, BLOCK_N, WALK, WIDE)
    own = load_rows(features, own_offsets, stride_d, own_inside, 0, DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    own_norm = tl.load(norms + j, mask=own_inside, other=0.0)
    own_omega = tl.load(omega + j, mask=own_inside, other=0.0)
    to_fixed = tl.load(scale)
    if NORMALIZE:
        own_norm = own_norm * factor
    own_sums = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), ACC)
    for step in range(first * PARTS, tl.minimum(first + chunk, last + 1) * PARTS):
        part = own_tile * PARTS + step
        part = tl.where(part >= tiles * PARTS, part - tiles * PARTS, part)
        start = part * BLOCK_M
        i = start + tl.arange(0, BLOCK_M)
        inside = within(i, count, EVEN)
        offsets = pixel_offsets(start, pixels, stride_b, stride_p, BLOCK_M, WALK, WIDE)
        z = load_rows(features, offsets, stride_d, inside, 0, DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        s = tl.dot(z, tl.trans(own), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_M, BLOCK_N]
        if DIM > BLOCK_D:
            for channel in range(BLOCK_D, DIM, BLOCK_D):
                z = load_rows(features, offsets, stride_d, inside, channel, DIM, BLOCK_D)
                w = load_rows(features, own_offsets, stride_d, own_inside, channel, DIM, BLOCK_D)
                s = tl.dot(z, tl.trans(w), s, input_precision=PRECISION, out_dtype=ACC)
        norm = tl.load(norms + i, mask=inside, other=0.0)
        if NORMALIZE:
            e = tl.exp2(s * norm[:, None] * own_norm[None, :] - factor)
        else:
            e = tl.exp2(s * factor - norm[:, None] - own_norm[None, :])
        weight = tl.load(omega + i, mask=inside, other=0.0)
        # rows r and r + 8 of a tensor-core tile are one thread's: their sum costs no exchange between threads
        own_sums += tl.sum(tl.reshape(e * weight[:, None], (BLOCK_M // 16, 2, 8, BLOCK_N)), 1)
        if step >= PARTS:
            add(sums, i, tl.sum(e * own_omega[None, :], 1), inside, to_fixed, FIXED_POINT)
    add(sums, j, tl.sum(tl.sum(own_sums, 0), 0), own_inside, to_fixed, FIXED_POINT)


@triton.jit
def pair_finish(
    sums,
    norms,
    peak,
    flag,
    scale,
    log_d,
    count,
    inverse_temperature,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FIXED_POINT: tl.constexpr,
):
    """log D_i = h_i + h_max + log of the sum."""
    if tl.load(flag) != 0:
        return
    ACC: tl.constexpr = log_d.dtype.element_ty
    factor = tl.load(inverse_temperature) * LOG2_E
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.load(sums + i, mask=inside, other=1)
    if FIXED_POINT:
        total = (total.to(tl.float64) / tl.load(scale)).to(ACC)
    if NORMALIZE:
        shift = factor
    else:
        shift = tl.load(norms + i, mask=inside, other=0.0) + tl.load(peak)
    tl.store(log_d + i, (shift + tl.log2(total)) * LN_2, mask=inside)


@triton.jit
def pair_coefficients(
    norms,
    omega,
    peak,
    coefficients,
    labels,
    num_classes,
    ignore_index,
    log_d,
    rho,
    count,
    inverse_temperature,
    BLOCK: tl.constexpr,
    LABELLED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """rho_i = a_i exp(h_i + h_max - log D_i); for unit rows rho and omega take up 1 / ||z||, to multiply raw rows."""
    ACC: tl.constexpr = rho.dtype.element_ty
    factor = tl.load(inverse_temperature) * LOG2_E
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    norm = tl.load(norms + i, mask=inside, other=0.0)
    coefficient = row_value(coefficients, labels, i, inside, num_classes, ignore_index, LABELLED).to(ACC)
    base = log2_d(log_d, i, inside)
    given = coefficient
    if NORMALIZE:
        coefficient *= tl.exp2(factor - base) * norm
        tl.store(omega + i, tl.load(omega + i, mask=inside, other=0.0) * norm, mask=inside)
    else:
        coefficient *= tl.exp2(norm + tl.load(peak) - base)
    tl.store(rho + i, tl.where(given == 0, 0.0, coefficient), mask=inside)  # D of an ignored row may be anything


@triton.jit
def pair_symmetric_backward(
    features,
    count,
    pixels,
    stride_b,
    stride_d,
    stride_p,
    norms,
    omega,
    rho,
    flag,
    out,
    out_pixels,
    out_stride_b,
    out_stride_d,
    out_stride_p,
    positive,
    positive_own,
    labels,
    num_classes,
    ignore_index,
    inverse_temperature,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WALK: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/du_i = (1 / tau) sum_j e_ij (rho_i omega_j + rho_j omega_i) u_j, and from it dL/dz_i.

    Program (t, c): rows of tile t against all rows, columns c of the gradient. Unit rows are never formed: omega and
    rho of the other rows hold 1 / ||z_j|| (``pair_coefficients``).
    """
    if tl.load(flag) != 0:
        return
    ACC: tl.constexpr = norms.dtype.element_ty
    factor = tl.load(inverse_temperature) * LOG2_E
    start = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_D
    i = start + tl.arange(0, BLOCK_M)
    own_inside = within(i, count, EVEN)
    own_offsets = pixel_offsets(start, pixels, stride_b, stride_p, BLOCK_M, WALK, WIDE)
    own = load_rows(features, own_offsets, stride_d, own_inside, 0, DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    own_norm = tl.load(norms + i, mask=own_inside, other=1.0)
    own_omega = tl.load(omega + i, mask=own_inside, other=0.0)
    own_rho = tl.load(rho + i, mask=own_inside, other=0.0)
    scaled = own_norm
    if NORMALIZE:
        own_omega = own_omega / own_norm
        own_rho = own_rho / own_norm
        scaled = own_norm * factor
    gradient = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for first in range(0, count, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = within(j, count, EVEN)
        offsets = pixel_offsets(first, pixels, stride_b, stride_p, BLOCK_N, WALK, WIDE)
        z = load_rows(features, offsets, stride_d, inside, 0, DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(own, tl.trans(z), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_M, BLOCK_N]
        if DIM > BLOCK_D:
            for part in range(BLOCK_D, DIM, BLOCK_D):
                z = load_rows(features, offsets, stride_d, inside, part, DIM, BLOCK_D)
                w = load_rows(features, own_offsets, stride_d, own_inside, part, DIM, BLOCK_D)
                s = tl.dot(w, tl.trans(z), s, input_precision=PRECISION, out_dtype=ACC)
            z = load_rows(features, offsets, stride_d, inside, column, DIM, BLOCK_D)
        norm = tl.load(norms + j, mask=inside, other=0.0)
        if NORMALIZE:
            e = tl.exp2(s * scaled[:, None] * norm[None, :] - factor)
        else:
            e = tl.exp2(s * factor - scaled[:, None] - norm[None, :])
        weight = tl.load(omega + j, mask=inside, other=0.0)
        slope = tl.load(rho + j, mask=inside, other=0.0)
        e = e * (own_rho[:, None] * weight[None, :] + own_omega[:, None] * slope[None, :])
        gradient = product(e, z, gradient, PRECISION)
    gradient = gradient * tl.load(inverse_temperature)
    if POSITIVE:
        gradient = with_positive(
            gradient, own, i, own_inside, own_norm, positive, positive_own, labels, num_classes, ignore_index,
            DIM, BLOCK_D, NORMALIZE,
        )  # fmt: skip
    to = pixel_offsets(start, out_pixels, out_stride_b, out_stride_p, BLOCK_M, ANYWHERE, WIDE)
    store_rows(out, to, out_stride_d, own_inside, column, gradient, DIM, BLOCK_D)


@triton.jit
def pair_forward(
    anchors,
    count,
    own_pixels,
    own_stride_b,
    own_stride_d,
    own_stride_p,
    keys,
    key_count,
    pixels,
    stride_b,
    stride_d,
    stride_p,
    weights,
    labels,
    num_classes,
    ignore_index,
    flag,
    log_d,
    inverse_temperature,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN_WALK: tl.constexpr,
    WALK: tl.constexpr,
    WIDE: tl.constexpr,
    LABELLED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FLAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log D_i of any anchors against any keys: log-sum-exp over key tiles with a running maximum.

    With labels a key of weight 0 is not read, so that it may hold anything.
    """
    if FLAGGED and tl.load(flag) == 0:
        return
    ACC: tl.constexpr = log_d.dtype.element_ty
    factor = tl.load(inverse_temperature) * LOG2_E
    start = tl.program_id(0) * BLOCK_M
    i = start + tl.arange(0, BLOCK_M)
    own_inside = i < count
    own_offsets = pixel_offsets(start, own_pixels, own_stride_b, own_stride_p, BLOCK_M, OWN_WALK, WIDE)
    own_norm = tl.zeros((BLOCK_M,), ACC) + factor
    if NORMALIZE:
        own_norm = inverse_norm(anchors, own_offsets, own_stride_d, own_inside, ACC, DIM, BLOCK_M, BLOCK_D) * factor
    highest = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    for first in range(0, key_count, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = j < key_count
        weight = row_value(weights, labels, j, inside, num_classes, ignore_index, LABELLED).to(ACC)
        if LABELLED:
            inside = inside & (weight > 0)
        offsets = pixel_offsets(first, pixels, stride_b, stride_p, BLOCK_N, WALK, WIDE)
        s = similarities(
            anchors, own_offsets, own_stride_d, own_inside, keys, offsets, stride_d, inside, own_norm, ACC,
            DIM, BLOCK_M, BLOCK_N, BLOCK_D, NORMALIZE, PRECISION,
        )  # fmt: skip
        s = tl.where((weight > 0)[None, :], s + tl.log2(weight)[None, :], float("-inf"))  # [BLOCK_M, BLOCK_N]
        above = tl.maximum(highest, tl.max(s, 1))
        base = tl.where(above == float("-inf"), 0.0, above)  # no key yet: -inf - -inf would be NaN
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        highest = above
    base = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(log_d + i, (base + tl.log2(total)) * LN_2, mask=own_inside)


@triton.jit
def pair_backward(
    rows,
    count,
    own_pixels,
    own_stride_b,
    own_stride_d,
    own_stride_p,
    others,
    other_count,
    pixels,
    stride_b,
    stride_d,
    stride_p,
    weights,
    labels,
    num_classes,
    ignore_index,
    coefficients,
    log_d,
    flag,
    out,
    out_pixels,
    out_stride_b,
    out_stride_d,
    out_stride_p,
    positive,
    positive_own,
    positive_labels,
    positive_classes,
    positive_ignore,
    inverse_temperature,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN_WALK: tl.constexpr,
    WALK: tl.constexpr,
    WIDE: tl.constexpr,
    OWN_IS_ANCHOR: tl.constexpr,
    OWN_IS_KEY: tl.constexpr,
    LABELLED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POSITIVE: tl.constexpr,
    FLAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of rows r that are anchors, keys or both: (1 / tau) sum_c P_rc u_c, every exponent at most 0,

    P_rc = a_r exp(s_rc + log w_c - log D_r)  [r an anchor]  +  a_c exp(s_rc + log w_r - log D_c)  [r a key].
    """
    if FLAGGED and tl.load(flag) == 0:
        return
    ACC: tl.constexpr = log_d.dtype.element_ty
    factor = tl.load(inverse_temperature) * LOG2_E
    start = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_D
    i = start + tl.arange(0, BLOCK_M)
    own_inside = i < count
    own_offsets = pixel_offsets(start, own_pixels, own_stride_b, own_stride_p, BLOCK_M, OWN_WALK, WIDE)
    scaled = tl.zeros((BLOCK_M,), ACC) + factor
    own_norm = scaled
    if NORMALIZE:
        own_norm = inverse_norm(rows, own_offsets, own_stride_d, own_inside, ACC, DIM, BLOCK_M, BLOCK_D)
        scaled = own_norm * factor
    if OWN_IS_ANCHOR:
        own_coefficient = row_value(coefficients, labels, i, own_inside, num_classes, ignore_index, LABELLED).to(ACC)
        own_base = log2_d(log_d, i, own_inside)
    if OWN_IS_KEY:
        own_weight = row_value(weights, labels, i, own_inside, num_classes, ignore_index, LABELLED).to(ACC)
    gradient = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for first in range(0, other_count, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = j < other_count
        readable = inside
        if LABELLED:
            # weights and coefficients of a class are both 0 where it has no pixel, and no ignored row has either
            there = row_value(weights, labels, j, inside, num_classes, ignore_index, LABELLED)
            readable = inside & (there > 0)
        offsets = pixel_offsets(first, pixels, stride_b, stride_p, BLOCK_N, WALK, WIDE)
        s = similarities(
            rows, own_offsets, own_stride_d, own_inside, others, offsets, stride_d, readable, scaled, ACC,
            DIM, BLOCK_M, BLOCK_N, BLOCK_D, NORMALIZE, PRECISION,
        )  # fmt: skip
        p = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if OWN_IS_ANCHOR:
            weight = row_value(weights, labels, j, inside, num_classes, ignore_index, LABELLED).to(ACC)
            exponent = tl.where((weight > 0)[None, :], s + tl.log2(weight)[None, :] - own_base[:, None], float("-inf"))
            p += own_coefficient[:, None] * tl.exp2(exponent)
        if OWN_IS_KEY:
            coefficient = row_value(coefficients, labels, j, inside, num_classes, ignore_index, LABELLED).to(ACC)
            base = log2_d(log_d, j, inside)
            exponent = s + tl.log2(own_weight)[:, None] - base[None, :]
            exponent = tl.where((own_weight > 0)[:, None] & readable[None, :], exponent, float("-inf"))
            p += coefficient[None, :] * tl.exp2(exponent)
        if NORMALIZE:
            p *= inverse_norm(others, offsets, stride_d, readable, ACC, DIM, BLOCK_N, BLOCK_D)[None, :]
        z = load_rows(others, offsets, stride_d, readable, column, DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        gradient = product(p, z, gradient, PRECISION)
    gradient = gradient * tl.load(inverse_temperature)
    if POSITIVE:
        own = load_rows(rows, own_offsets, own_stride_d, own_inside, column, DIM, BLOCK_D)
        gradient = with_positive(
            gradient, own, i, own_inside, own_norm, positive, positive_own, positive_labels, positive_classes,
            positive_ignore, DIM, BLOCK_D, NORMALIZE,
        )  # fmt: skip
    to = pixel_offsets(start, out_pixels, out_stride_b, out_stride_p, BLOCK_M, ANYWHERE, WIDE)
    store_rows(out, to, out_stride_d, own_inside, column, gradient, DIM, BLOCK_D)


@triton.jit
def pair_positive(
    gradient,
    features,
    count,
    pixels,
    stride_b,
    stride_d,
    stride_p,
    out,
    out_pixels,
    out_stride_b,
    out_stride_d,
    out_stride_p,
    positive,
    positive_own,
    labels,
    num_classes,
    ignore_index,
    DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WALK: tl.constexpr,
    WIDE: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """The last step of the backward kernels, of gradients (N, d) that came in parts."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    start = tl.program_id(0) * BLOCK_P
    i = start + tl.arange(0, BLOCK_P)
    inside = i < count
    offsets = pixel_offsets(start, pixels, stride_b, stride_p, BLOCK_P, WALK, WIDE)
    z = load_rows(features, offsets, stride_d, inside, 0, DIM, BLOCK_D)  # [BLOCK_P, BLOCK_D]
    du = load_rows(gradient, i.to(offsets.dtype) * DIM, 1, inside, 0, DIM, BLOCK_D)
    wide = z.to(ACC)
    norm = 1 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), ZERO_ROW_NORM)
    du = with_positive(
        du, z, i, inside, norm, positive, positive_own, labels, num_classes, ignore_index, DIM, BLOCK_D, NORMALIZE
    )
    to = pixel_offsets(start, out_pixels, out_stride_b, out_stride_p, BLOCK_P, ANYWHERE, WIDE)
    store_rows(out, to, out_stride_d, inside, 0, du, DIM, BLOCK_D)


@triton.jit
def pixel_offsets(start, pixels, stride_b, stride_p, BLOCK: tl.constexpr, WALK: tl.constexpr, WIDE: tl.constexpr):
    """Where rows start, start + 1, ... lie; [BLOCK], int64 if offsets leave 32 bits, else in half as many registers."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    local = tl.arange(0, BLOCK).to(INDEX)
    if WALK == ONE_STRIDE:
        return tl.cast(start, INDEX) * stride_p + local * stride_p
    elif WALK == WITHIN_IMAGE:  # one division a tile
        image = start // pixels
        return tl.cast(image, INDEX) * stride_b + tl.cast(start - image * pixels, INDEX) * stride_p + local * stride_p
    else:
        i = start + tl.arange(0, BLOCK)
        image = i // pixels
        return image.to(INDEX) * stride_b + (i - image * pixels).to(INDEX) * stride_p


@triton.jit
def within(i, count, EVEN: tl.constexpr):
    """Which rows of a tile there are; without a comparison where tiles divide them evenly. [BLOCK]"""
    if EVEN:
        return tl.full(i.shape, True, tl.int1)
    else:
        return i < count


@triton.jit
def load_rows(features, offsets, stride_d, inside, first, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels first, first + 1, ... of rows, 0 outside; [BLOCK, BLOCK_D]."""
    channel = first + tl.arange(0, BLOCK_D)
    pointers = features + offsets[:, None] + channel.to(offsets.dtype)[None, :] * stride_d
    if DIM % BLOCK_D == 0:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (channel < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(out, offsets, stride_d, inside, first, values, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of ``load_rows``, in out's dtype."""
    channel = first + tl.arange(0, BLOCK_D)
    pointers = out + offsets[:, None] + channel.to(offsets.dtype)[None, :] * stride_d
    mask = inside[:, None] & (channel < DIM)[None, :]
    tl.store(pointers, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def row_value(values, labels, i, inside, num_classes, ignore_index, LABELLED: tl.constexpr):
    """``values[i]``, or the value of row i's class and 0 where it is ignored; [BLOCK]."""
    if LABELLED:
        label = tl.load(labels + i, mask=inside, other=0).to(tl.int64)
        valid = inside & (label >= 0) & (label < num_classes) & (label != ignore_index)
        return tl.load(values + tl.where(valid, label, 0), mask=valid, other=0.0)
    else:
        return tl.load(values + i, mask=inside, other=0.0)


@triton.jit
def log2_d(log_d, i, inside):
    """log2 of D_i; +inf for a row without keys, so that its share of anything, exp2(... - log2 D), is 0; [BLOCK]."""
    base = tl.load(log_d + i, mask=inside, other=float("inf")) / LN_2
    return tl.where(base == float("-inf"), float("inf"), base)


@triton.jit
def add(sums, i, values, inside, to_fixed, FIXED_POINT: tl.constexpr):
    """sums[i] += values: floats, in no order, or integers in units of 1 / to_fixed, in which the order is nothing."""
    if FIXED_POINT:
        values = tl.floor(values.to(tl.float64) * to_fixed + 0.5).to(tl.int64)
    tl.atomic_add(sums + i, values, mask=inside, sem="relaxed")


@triton.jit
def product(p, z, total, PRECISION: tl.constexpr):
    """total + p z [BLOCK_M, BLOCK_D]: p in z's dtype, but for float16, whose range the coefficients leave (a class of
    10^5 pixels weighs 10^-5 twice): TF32 has float16's mantissa and bfloat16's range. The tensor core drops the 13 bits
    below TF32's, so they are rounded first: the dropped halves of positive coefficients would not average out."""
    if z.dtype == tl.float16:
        p = (p.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
        return tl.dot(p, z.to(tl.float32), total, input_precision="tf32", out_dtype=total.dtype)
    elif z.dtype == tl.float32:
        # Tensor cores round what they accumulate towards zero, which thousands of tiles would show in float32's digits:
        # they add up one tile, tiles are added outside. (The compiler folds a sum back in, but not a difference.)
        return total - tl.dot(-p, z, input_precision=PRECISION, out_dtype=total.dtype)
    else:
        return tl.dot(p.to(z.dtype), z, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def similarities(
    rows,
    own_offsets,
    own_stride_d,
    own_inside,
    others,
    offsets,
    stride_d,
    inside,
    scaled,
    ACC: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scaled_r (z_r . z_c), times 1 / ||z_c|| for unit rows; [BLOCK_M, BLOCK_N]."""
    s = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for part in range(0, DIM, BLOCK_D):
        own = load_rows(rows, own_offsets, own_stride_d, own_inside, part, DIM, BLOCK_D)
        z = load_rows(others, offsets, stride_d, inside, part, DIM, BLOCK_D)
        s = tl.dot(own, tl.trans(z), s, input_precision=PRECISION, out_dtype=ACC)
    s = s * scaled[:, None]
    if NORMALIZE:
        s *= inverse_norm(others, offsets, stride_d, inside, ACC, DIM, BLOCK_N, BLOCK_D)[None, :]
    return s


@triton.jit
def inverse_norm(
    features,
    offsets,
    stride_d,
    inside,
    ACC: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """1 / max(||z||, 1e-12); [BLOCK]."""
    square = tl.zeros((BLOCK,), ACC)
    for part in range(0, DIM, BLOCK_D):
        z = load_rows(features, offsets, stride_d, inside, part, DIM, BLOCK_D).to(ACC)
        square += tl.sum(z * z, 1)
    return 1 / tl.maximum(tl.sqrt(square), ZERO_ROW_NORM)


@triton.jit
def with_positive(
    gradient,
    z,
    i,
    inside,
    norm,
    positive,
    positive_own,
    labels,
    num_classes,
    ignore_index,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """dL/dz of whole rows from dL/du of the log D term: the positive term's off, through the normalisation; 0 where
    ignored; [BLOCK, BLOCK_D]."""
    label = tl.load(labels + i, mask=inside, other=0).to(tl.int64)
    valid = inside & (label >= 0) & (label < num_classes) & (label != ignore_index)
    label = tl.where(valid, label, 0)
    channel = tl.arange(0, BLOCK_D)
    pointers = positive + label[:, None] * DIM + channel[None, :]
    pull = tl.load(pointers, mask=valid[:, None] & (channel < DIM)[None, :], other=0.0)
    z = z.to(gradient.dtype)
    if NORMALIZE:
        u = z * norm[:, None]
        gradient = gradient - pull  # its part along u, the own share, is projected away
        gradient = (gradient - tl.sum(gradient * u, 1)[:, None] * u) * norm[:, None]
        valid = valid & (norm * ZERO_ROW_NORM < NOT_QUITE_ONE)  # the direction of a zero row has no derivative
    else:
        own = tl.load(positive_own + label, mask=valid, other=0.0)
        gradient = gradient - pull + own[:, None] * z
    return tl.where(valid[:, None], gradient, 0.0)


def _target(out: Rows, positive: Positive | None) -> tuple:
    """What the backward kernels take of where the gradient goes."""
    place = out.features, *out.place[1:]
    if positive is None:
        return *place, out.features, out.features, out.features, 0, 0
    return (
        *place,
        positive.values,
        positive.own,
        positive.labels,
        positive.own.shape[0],
        positive.ignore_index,
    )
