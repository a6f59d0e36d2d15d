"""Draws up to m pixels a class, those with the smallest hash of (seed, step, pixel index); O(N) time, two reads of the
labels, and O(K m) memory.

The sample of the ``sampled`` estimator of Eq. 6. Rather than sorting N hashes, it keeps those below a threshold which
lets through a little more than m of each class, and sorts these. Classes where chance lets through too few or too many
are drawn again by bisection, so the result is the reference's, always; the host never waits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from in2nect.kernels.launch import choose, launch, next_power_of_2, processors
from in2nect.kernels.table import Entry

# Of n_k hashes, uniform in [0, 2^63), those below 2^63 (m + slack) / n_k number m + slack in the mean. They are fewer
# than m, or more than m + 2 slack, with a chance of at most exp(-slack^2 / (2 m + 2 slack)) and
# exp(-slack^2 / (2 m + 8/3 slack)) (Chernoff's and Bernstein's bounds). With slack = 8 sqrt(m) + 64 the first is below
# exp(-32) = 1.3e-14 for every m, and so is the second once the capacity is rounded up.
SLACK_DEVIATIONS = 8.0
SLACK_LEAST = 64.0
CAPACITY_MULTIPLE = 64  # rows of candidates begin on cache lines
PROGRAMS_A_PROCESSOR = 8  # of 4 warps: half of the 64 warps that sm_80 and sm_90 hold hide the loads' latency
BLOCK_SLOTS = 256  # slots that one program fills or emits at a time; two a thread

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # SplitMix64's increment and multipliers
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_LARGEST = tl.constexpr(2**63 - 1)  # no hash is larger: it fills the empty slots, which so are sorted to the end


def sample_pixels(labels: Tensor, num_classes: int, per_class: int, seed: Tensor, ignore_index: int) -> Tensor:
    """(K, m) int64: the ``min(m, n_k)`` pixels of class k with the smallest hash, ascending by hash, then -1."""
    flat = labels.contiguous().view(-1)
    pixels, device = flat.numel(), flat.device
    expected, capacity = per_class + _slack(per_class), _capacity(per_class)

    counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
    thresholds = torch.empty_like(counts)
    found = torch.empty(num_classes, dtype=torch.int32, device=device)
    hashes = torch.empty((num_classes, capacity), dtype=torch.int64, device=device)
    indices = torch.empty_like(hashes)
    sample = torch.empty((num_classes, per_class), dtype=torch.int64, device=device)

    counting = choose("sample_pixels_count", device, torch.float32, num_classes)
    hashing = choose("sample_pixels_candidates", device, torch.float32, num_classes)
    slotwise = {"BLOCK_S": BLOCK_SLOTS, "warps": hashing.warps, "stages": hashing.stages}
    bins = next_power_of_2(num_classes)
    grid = _grid(pixels, counting, device)
    launch(sample_pixels_count, grid, flat, counts, pixels, num_classes, ignore_index, BINS=bins, **_sizes(counting))
    arguments: tuple = counts, thresholds, found, hashes, expected, capacity
    launch(sample_pixels_open, (num_classes,), *arguments, **slotwise)
    arguments = flat, seed, thresholds, found, hashes, indices, pixels, num_classes, ignore_index, capacity
    launch(sample_pixels_candidates, _grid(pixels, hashing, device), *arguments, **_sizes(hashing))
    arguments = flat, seed, counts, found, hashes, indices, pixels, ignore_index, per_class, capacity
    launch(sample_pixels_repair, (num_classes,), *arguments, BLOCK_S=BLOCK_SLOTS, **_sizes(hashing))
    hashes, order = torch.sort(hashes, dim=1)
    grid = triton.cdiv(per_class, BLOCK_SLOTS), num_classes
    launch(sample_pixels_emit, grid, hashes, order, indices, counts, sample, per_class, capacity, **slotwise)
    return sample


def _slack(per_class: int) -> float:
    return SLACK_DEVIATIONS * math.sqrt(per_class) + SLACK_LEAST


def _capacity(per_class: int) -> int:
    return triton.cdiv(math.ceil(per_class + 2 * _slack(per_class)), CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


def _grid(pixels: int, entry: Entry, device: torch.device) -> tuple[int, ...]:
    return (min(triton.cdiv(pixels, entry.blocks["BLOCK_N"]), PROGRAMS_A_PROCESSOR * processors(device)),)


def _sizes(entry: Entry) -> dict[str, int]:
    return {"BLOCK_N": entry.blocks["BLOCK_N"], "warps": entry.warps, "stages": entry.stages}


@triton.jit
def sample_pixels_count(labels, counts, pixels, num_classes, ignore_index, BINS: tl.constexpr, BLOCK_N: tl.constexpr):
    """n_k: each program walks over blocks of pixels and adds its histogram once; sums of integers have no order."""
    bins = tl.arange(0, BINS)  # [BINS]
    total = tl.zeros((BINS,), tl.int32)  # a program sees far fewer than 2^31 pixels
    step = tl.num_programs(0).to(tl.int64) * BLOCK_N
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK_N, pixels, step):
        index = tl.arange(0, BLOCK_N).to(tl.int64) + start  # [BLOCK_N]
        classes, valid = _load_classes(labels, index, pixels, num_classes, ignore_index)
        total += tl.histogram(classes, BINS, mask=valid)
    tl.atomic_add(counts + bins, total.to(tl.int64), mask=(bins < num_classes) & (total > 0), sem="relaxed")


@triton.jit
def sample_pixels_open(counts, thresholds, found, hashes, expected, capacity, BLOCK_S: tl.constexpr):
    """For each class the threshold, the largest hash of a candidate: ``2^63 expected / n_k``; and its empty slots."""
    k = tl.program_id(0)
    share = expected / tl.maximum(tl.load(counts + k), 1).to(tl.float64)
    below = tl.where(share < 1.0, share, 0.5)  # at most 1 - 2^-53, whose product with 2^63 fits
    threshold = tl.where(share < 1.0, (below * 2.0**63).to(tl.int64), _LARGEST)
    tl.store(thresholds + k, threshold)
    tl.store(found + k, 0)
    for start in range(0, capacity, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        tl.store(hashes + k.to(tl.int64) * capacity + slot, _LARGEST, mask=slot < capacity)


@triton.jit
def sample_pixels_candidates(
    labels,
    seed,
    thresholds,
    found,
    hashes,
    indices,
    pixels,
    num_classes,
    ignore_index,
    capacity,
    BLOCK_N: tl.constexpr,
):
    """Appends each pixel whose hash is within its class's threshold to the class's slots, in no particular order."""
    stream = _stream(seed)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_N
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK_N, pixels, step):
        index = tl.arange(0, BLOCK_N).to(tl.int64) + start  # [BLOCK_N]
        classes, valid = _load_classes(labels, index, pixels, num_classes, ignore_index)
        value = _hash(stream, start, BLOCK_N)
        candidate = valid & (value <= tl.load(thresholds + classes, mask=valid, other=0))
        slot = tl.atomic_add(found + classes, 1, mask=candidate, sem="relaxed")
        fits = candidate & (slot < capacity)
        where = classes.to(tl.int64) * capacity + slot
        tl.store(hashes + where, value, mask=fits)
        tl.store(indices + where, index, mask=fits)


@triton.jit
def sample_pixels_repair(
    labels,
    seed,
    counts,
    found,
    hashes,
    indices,
    pixels,
    ignore_index,
    per_class,
    capacity,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where a class's candidates are too few or too many: its m-th smallest hash, bit by bit, and those up to it.

    One program a class, 64 passes over the labels; nearly always there is nothing to do.
    """
    k = tl.program_id(0)
    wanted = tl.minimum(tl.load(counts + k), per_class)
    candidates = tl.load(found + k)
    if (candidates >= wanted) & (candidates <= capacity):
        return
    stream = _stream(seed)
    k = k.to(tl.int64)
    first = tl.zeros((), tl.int64)  # of the loops over pixels, which so count in 64 bits

    # the smallest threshold that at least `wanted` hashes do not pass: its bits from the highest down
    threshold = tl.zeros((), tl.int64)
    for position in range(63):
        bit = tl.full((), 1, tl.int64) << (62 - position)
        within = tl.zeros((BLOCK_N,), tl.int64)
        for start in range(first, pixels, BLOCK_N):
            index = tl.arange(0, BLOCK_N).to(tl.int64) + start  # [BLOCK_N]
            member = _members(labels, index, pixels, k, ignore_index)
            within += (member & (_hash(stream, start, BLOCK_N) < threshold + bit)).to(tl.int64)
        if tl.sum(within) < wanted:
            threshold += bit

    written = tl.zeros((), tl.int64)
    for start in range(first, pixels, BLOCK_N):
        index = tl.arange(0, BLOCK_N).to(tl.int64) + start
        value = _hash(stream, start, BLOCK_N)
        chosen = _members(labels, index, pixels, k, ignore_index) & (value <= threshold)
        slot = written + tl.cumsum(chosen.to(tl.int64)) - 1
        tl.store(hashes + k * capacity + slot, value, mask=chosen)
        tl.store(indices + k * capacity + slot, index, mask=chosen)
        written += tl.sum(chosen.to(tl.int64))
    for start in range(0, capacity, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        tl.store(hashes + k * capacity + slot, _LARGEST, mask=(slot >= written) & (slot < capacity))


@triton.jit
def sample_pixels_emit(hashes, order, indices, counts, sample, per_class, capacity, BLOCK_S: tl.constexpr):
    """The first m of each class's sorted candidates, and -1 beyond n_k.

    A hash is a bijection's upper 63 bits, so at most two pixels share one; the smaller index goes first then.
    """
    k = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    drawn = slot < tl.minimum(tl.load(counts + k), per_class)
    row = k * capacity + slot
    own = tl.load(hashes + row, mask=drawn, other=0)
    index = tl.load(indices + k * capacity + tl.load(order + row, mask=drawn, other=0), mask=drawn, other=-1)
    after = drawn & (slot + 1 < capacity)
    twin = after & (tl.load(hashes + row + 1, mask=after, other=-1) == own)
    partner = tl.load(indices + k * capacity + tl.load(order + row + 1, mask=twin, other=0), mask=twin, other=0)
    index = tl.where(twin, tl.minimum(index, partner), index)
    before = drawn & (slot > 0)
    twin = before & (tl.load(hashes + row - 1, mask=before, other=-1) == own)
    partner = tl.load(indices + k * capacity + tl.load(order + row - 1, mask=twin, other=0), mask=twin, other=0)
    index = tl.where(twin, tl.maximum(index, partner), index)
    tl.store(sample + k * per_class + slot, index, mask=slot < per_class)


@triton.jit
def _load_classes(labels, index, pixels, num_classes, ignore_index):
    """Classes of pixels, 0 where they carry none, and whether they carry one."""
    label = _load_labels(labels, index, pixels)
    valid = (index < pixels) & (label >= 0) & (label < num_classes) & (label != ignore_index)
    return tl.where(valid, label, 0).to(tl.int32), valid


@triton.jit
def _members(labels, index, pixels, k, ignore_index):
    """Whether pixels belong to class k."""
    label = _load_labels(labels, index, pixels)
    return (index < pixels) & (label == k) & (label != ignore_index)


@triton.jit
def _load_labels(labels, index, pixels):
    """Labels of pixels, 0 beyond the last; bytes widened, so that comparing with any ignore_index cannot wrap."""
    label = tl.load(labels + index, mask=index < pixels, other=0)
    if label.dtype.primitive_bitwidth < 32:
        label = label.to(tl.int32)
    return label


@triton.jit
def _stream(seed):
    """SplitMix64's state for a seed and step: ``mix(seed + golden (step + 1))``."""
    step = tl.load(seed + 1).to(tl.uint64, bitcast=True)
    return _mix(tl.load(seed).to(tl.uint64, bitcast=True) + _GOLDEN * (step + 1))


@triton.jit
def _hash(stream, start, BLOCK_N: tl.constexpr):
    """Hashes, 63 bits, of the pixels of a block: ``mix(stream + golden (index + 1)) >> 1``; int64 [BLOCK_N]."""
    lane = tl.arange(1, BLOCK_N + 1).to(tl.uint64)
    # the product in two parts: one of the block's scalar, and one of lanes of 32 bits which does not change
    origin = (tl.zeros((), tl.int64) + start).to(tl.uint64)  # the interpreter's start is a Python integer
    state = stream + _GOLDEN * origin + _GOLDEN * lane
    return (_mix(state) >> 1).to(tl.int64, bitcast=True)


@triton.jit
def _mix(x):
    """SplitMix64's finalizer, a bijection of 64 bits; on unsigned numbers, whose right shift is logical."""
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)
