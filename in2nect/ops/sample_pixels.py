"""``in2nect::sample_pixels``: up to m pixels a class, uniform without replacement, for the ``sampled`` estimator.

A class keeps its pixels with the smallest hash(seed, step, pixel index): no random state, no host synchronisation, the
same pixels on every device, and samples of parts of a batch merge. The reference sorts, O(N log N); cpp is O(N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from in2nect import distributed
from in2nect.labels import valid_mask
from in2nect.ops._registration import define
from in2nect.ops.backend import implementation, kernel, native_operator, select

# SplitMix64's constants as signed 64-bit integers: torch has no arithmetic on unsigned ones, and products wrap alike.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_UNMIX_1, _UNMIX_2 = ((pow(mix, -1, 2**64) + 2**63) % 2**64 - 2**63 for mix in (_MIX_1, _MIX_2))  # their inverses


def sample_pixels(labels: Tensor, num_classes: int, per_class: int, seed: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Flat indices of the pixels drawn for each class.

    Args:
        labels: any shape; index i is the i-th pixel in row-major order.
        num_classes: K.
        per_class: m, at least 1.
        seed: (2,) int64 on the labels' device: seed and step.
        ignore_index: label of pixels that belong to no class.

    Returns:
        (K, m) int64: the ``min(m, n_k)`` pixels of class k with the smallest hash, ascending by hash, then -1.

    Raises:
        ValueError: per_class or the seed's shape.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; expected at least 1.")
    if seed.shape != (2,) or seed.dtype != torch.int64:
        raise ValueError(f"seed is {tuple(seed.shape)} {seed.dtype}; expected (2,) int64: seed and step.")
    return torch.ops.in2nect.sample_pixels(labels, num_classes, per_class, seed, ignore_index)


def _sample_pixels(labels: Tensor, num_classes: int, per_class: int, seed: Tensor, ignore_index: int) -> Tensor:
    return select("sample_pixels", labels.device)(labels, num_classes, per_class, seed, ignore_index)


def _sample_pixels_fake(labels: Tensor, num_classes: int, per_class: int, seed: Tensor, ignore_index: int) -> Tensor:
    return labels.new_empty((num_classes, per_class), dtype=torch.int64)


define(
    "sample_pixels(Tensor labels, int num_classes, int per_class, Tensor seed, int ignore_index) -> Tensor",
    _sample_pixels,
    _sample_pixels_fake,
)


def sample_global_pixels(
    labels: Tensor, num_classes: int, per_class: int, seeds: Tensor, group: str, *, ignore_index: int = 255
) -> Tensor:
    """The pixels that :func:`sample_pixels` draws from the labels of all ranks, one rank's after the other's.

    Args:
        labels: any shape, which may differ from rank to rank.
        num_classes: K.
        per_class: m, at least 1.
        seeds: (S, 2) int64 on the labels' device: seed and step of each draw. Those of the group's first rank count.
        group: name of a process group (:func:`in2nect.distributed.group_name`).
        ignore_index: label of pixels that belong to no class.

    Returns:
        (S, K, m) int64: as :func:`sample_pixels`, with flat indices into this rank's labels, and -1 for a pixel of
        another rank. Of each place that is filled at all, one rank has the pixel.

    Raises:
        ValueError: per_class or the seeds' shape.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; expected at least 1.")
    if seeds.dim() != 2 or seeds.shape[1] != 2 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds are {tuple(seeds.shape)} {seeds.dtype}; expected (S, 2) int64: seeds and steps.")
    return torch.ops.in2nect.sample_global_pixels(labels, num_classes, per_class, seeds, ignore_index, group)


def _sample_global_pixels(
    labels: Tensor, num_classes: int, per_class: int, seeds: Tensor, ignore_index: int, group: str
) -> Tensor:
    run, rank = select("sample_pixels", labels.device), distributed.rank_in(group)
    own = torch.cat([seeds.new_full((1,), labels.numel()), seeds.flatten()])
    pixels, everyones_seeds = distributed.gather(own, group).split([1, seeds.numel()], 1)
    seeds = _shifted(everyones_seeds[0].view_as(seeds), pixels[:rank].sum())
    indices = torch.stack([run(labels, num_classes, per_class, seed, ignore_index) for seed in seeds])  # [S, K, m]
    hashes = _hash(_stream(seeds)[:, None, None], indices).masked_fill(indices < 0, 2**63 - 1)
    # the smallest of all ranks' smallest; stable, so that equal hashes stay in the order of pixels
    order = distributed.gather(hashes, group).permute(1, 2, 0, 3).flatten(2).argsort(stable=True)[..., :per_class]
    return torch.where(order // per_class == rank, indices.gather(2, order % per_class), -1)


def _sample_global_pixels_fake(
    labels: Tensor, num_classes: int, per_class: int, seeds: Tensor, ignore_index: int, group: str
) -> Tensor:
    return labels.new_empty((seeds.shape[0], num_classes, per_class), dtype=torch.int64)


define(
    "sample_global_pixels(Tensor labels, int num_classes, int per_class, Tensor seeds, int ignore_index, str group) "
    "-> Tensor",
    _sample_global_pixels,
    _sample_global_pixels_fake,
)


@implementation("sample_pixels", "reference")
def _reference(labels: Tensor, num_classes: int, per_class: int, seed: Tensor, ignore_index: int) -> Tensor:
    flat = labels.flatten()
    # ignored pixels go into a class of their own, after the others
    classes = torch.where(valid_mask(flat, num_classes, ignore_index), flat.long(), num_classes)
    by_hash = torch.argsort(hash_pixels(flat.numel(), seed), stable=True)
    order = by_hash[torch.argsort(classes[by_hash], stable=True)]  # by class, then by hash
    counts = (classes[:, None] == torch.arange(num_classes, device=flat.device)).sum(0)
    starts = counts.cumsum(0) - counts
    slots = torch.arange(per_class, device=flat.device)
    positions = (starts[:, None] + slots).clamp(max=max(flat.numel() - 1, 0))  # [K, m]
    if flat.numel() == 0:
        return torch.full_like(positions, -1)
    return torch.where(slots < counts[:, None], order[positions], -1)


implementation("sample_pixels", "cpp")(native_operator("cpp", "sample_pixels"))
implementation("sample_pixels", "cuda")(native_operator("cuda", "sample_pixels"))
implementation("sample_pixels", "triton")(kernel("sample_pixels"))


def hash_pixels(pixels: int, seed: Tensor) -> Tensor:
    """(pixels,) int64, non-negative; the hash of :func:`in2nect.reference.hash_pixels`."""
    return _hash(_stream(seed), torch.arange(pixels, device=seed.device))


def _stream(seed: Tensor) -> Tensor:
    """The state (...,) from which the hashes of seeds (..., 2) are made."""
    return _mix(seed[..., 0] + _GOLDEN * (seed[..., 1] + 1))


def _hash(stream: Tensor, pixel: Tensor) -> Tensor:
    return _shift(_mix(stream + _GOLDEN * (pixel + 1)), 1)


def _shifted(seeds: Tensor, pixels: Tensor) -> Tensor:
    """Seeds (S, 2) under which pixel i has the hash that pixel ``i + pixels`` has under the given ones.

    A pixel moves the stream by a constant, and the stream is a bijection of the seed.
    """
    step = seeds[:, 1]
    return torch.stack([_unmix(_stream(seeds) + _GOLDEN * pixels) - _GOLDEN * (step + 1), step], 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _unmix(x: Tensor) -> Tensor:
    """The inverse of :func:`_mix`."""
    x = (x ^ _shift(x, 31) ^ _shift(x, 62)) * _UNMIX_2
    x = (x ^ _shift(x, 27) ^ _shift(x, 54)) * _UNMIX_1
    return x ^ _shift(x, 30) ^ _shift(x, 60)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
