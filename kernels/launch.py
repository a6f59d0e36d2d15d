"""How a kernel is launched: tile sizes, warps and stages from the static table in ``table.py``, by the device's
architecture; an opt-in search that prints the entry to add; and the determinism that a caller asked of torch.

IN2NECT_AUTOTUNE=1 times every candidate of ``table.CANDIDATES`` at the first launch of a kernel for an architecture,
dtype and width, keeps the fastest for this process, and prints the line to put into the table.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

from in2nect.kernels.table import ARCHITECTURES, CANDIDATES, TABLE, Entry

_assumed: str | None = None
_tuned: dict[tuple[str, str, str, int], Entry] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int, **constants: Any) -> None:
    """Run a kernel on a grid; a grid without programs is not launched.

    Fusing a product and a sum is asked for by name, because Triton's default moves between releases.
    """
    if 0 in grid:
        return
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def choose(kernel: str, device: torch.device, dtype: torch.dtype, dim: int) -> Entry:
    """The table's entry for a kernel, by name, on a device, for features of a dtype and width."""
    where = architecture(device)
    group = dtype_group(dtype)
    if (kernel, where, group, dim) in _tuned:
        return _tuned[kernel, where, group, dim]
    for entry in TABLE[kernel]:
        if where in entry.architectures and group in entry.dtypes and dim <= entry.max_dim:
            return entry
    raise ValueError(f"{kernel} has no launch entry for {where}, {group}, d = {dim}; the widest is 1024.")


def tuned(kernel: str, device: torch.device, dtype: torch.dtype, dim: int, run: Callable[[Entry], None]) -> Entry:
    """:func:`choose`, after a search over the candidates where IN2NECT_AUTOTUNE=1 asks for one (on a GPU, but not in
    deterministic mode, whose sums round by the tile, nor under the capture of a graph).

    Args:
        run: launches the kernel with an entry; called many times, so it must not change its inputs.
    """
    key = kernel, architecture(device), dtype_group(dtype), dim
    searching = os.environ.get("IN2NECT_AUTOTUNE") == "1" and device.type == "cuda"
    if not searching or key in _tuned or deterministic() or torch.cuda.is_current_stream_capturing():
        return choose(kernel, device, dtype, dim)
    default = choose(kernel, device, dtype, dim)
    timed: list[tuple[float, Entry]] = []
    for candidate in (default, *CANDIDATES.get(kernel, ())):
        if candidate.blocks.get("BLOCK_D") != default.blocks.get("BLOCK_D"):
            continue
        try:
            timed.append((triton.testing.do_bench(lambda c=candidate: run(c)), candidate))
        except triton.runtime.errors.OutOfResources:  # more shared memory or registers than this chip has
            continue
    milliseconds, best = min(timed, key=lambda pair: pair[0])
    _tuned[key] = best
    print(
        f"in2nect autotune: {kernel} on {key[1]}, {key[2]}, d = {dim}: {milliseconds:.4f} ms, "
        f"{timed[0][0] / milliseconds:.2f} x the table's entry. To keep it, put before the others of this kernel:\n"
        f"    Entry(({key[1]!r},), ({key[2]!r},), {dim}, {best.blocks!r}, warps={best.warps}, stages={best.stages}, "
        f'reason="measured: {milliseconds:.4f} ms"),'
    )
    return best


def architecture(device: torch.device) -> str:
    """The table's architecture for a device: its own, or the one whose limits it shares. Without a GPU: sm_86."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return "sm_86"
    return _architecture(*_capability(device))


@contextmanager
def assumed_architecture(name: str) -> Iterator[None]:
    """Choose launches as if the device were of an architecture: for compiling ahead of time without it."""
    global _assumed
    if name not in ARCHITECTURES:
        raise ValueError(f"There is no launch table for {name!r}; expected one of {', '.join(ARCHITECTURES)}.")
    previous, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = previous


def dtype_group(dtype: torch.dtype) -> str:
    """Which of the table's dtypes a torch dtype is: "half" for bfloat16 and float16."""
    return {torch.float32: "float32", torch.float64: "float64"}.get(dtype, "half")


def deterministic() -> bool:
    """Whether the caller asked torch for results that are the same, bit for bit, in every run."""
    return torch.are_deterministic_algorithms_enabled()


def input_precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 as three TF32 products (float32's quality), all else as it is.

    Where torch may use TF32 in its own matrix products (``torch.set_float32_matmul_precision("high")``, or
    ``torch.backends.cuda.matmul.fp32_precision = "tf32"``), one TF32 product does.
    """
    if dtype != torch.float32:
        return "ieee"
    # the older allow_tf32 raises when read after fp32_precision was set; this name reads both
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n, and at least 16, the narrowest tile of ``tl.dot``."""
    return max(16, triton.next_power_of_2(n))


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 4 without one, so that the interpreter sees several programs."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def pixel_strides(features: Tensor) -> tuple[Tensor, int, int, int]:
    """Features (B, d, h, w) and the strides of image, channel and pixel, pixels counted along rows (h w of them).

    Contiguous and channels_last tensors come back as they are. Where no one stride walks from the end of a row to the
    next (a crop, say), a contiguous copy does.
    """
    _, _, height, width = features.shape
    if height > 1 and width > 1 and features.stride(2) != width * features.stride(3):
        features = features.contiguous()
    per_pixel = features.stride(3) if width > 1 else features.stride(2)
    return features, features.stride(0), features.stride(1), per_pixel


def _architecture(major: int, minor: int) -> str:
    if major == 8:
        return {0: "sm_80", 9: "sm_89"}.get(minor, "sm_86")
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_89"  # 11 and 12: tensor cores without wgmma, and 99 KiB of shared memory a block


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
