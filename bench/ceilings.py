"""What the machine can do, measured in the run itself, and from it the time below which no implementation of a problem
can be: the bound.

Ceilings: bytes a second of a large copy (read and written) and of a large sum (read alone), floating-point operations
a second of a large torch.mm in the dtype, exponentials a second of a loop in registers (CUDA) or in cache (CPU). About
two seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from problems import Problem

from in2nect import native

COPY_BYTES = {
    "cuda": 2**31,
    "cpu": 2**28,
}  # of each of the two buffers: far beyond any L2; what two cores fill in 0.1 s
MATRIX_SIDE = {torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 4096, torch.float64: 2048}
MATRIX_SIDE_CPU = 1024
EXPONENTIALS_IN_CACHE = 2**15  # 256 KiB with the result, in float32
EXPONENTIALS_IN_REGISTERS = 2**26  # elements on CUDA, each exponentiated ROUNDS times by exponentials.py
SECONDS = 0.4  # a ceiling is the fastest of the runs in this time


@dataclass(frozen=True)
class Ceilings:
    """Rates a second: ``bytes`` of a copy, both ways counted; ``reads``, bytes of a sum."""

    bytes: float
    flops: float
    exponentials: float
    reads: float
    how: dict[str, str]

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """The least that one direction of a problem must do. ``bytes`` move at the rate of a copy; ``reads`` are bytes that
    are read where next to nothing is written, and come faster."""

    flops: float = 0.0
    exponentials: float = 0.0
    bytes: float = 0.0
    reads: float = 0.0

    def milliseconds(self, ceilings: Ceilings) -> tuple[float, str]:
        """Bound in ms and what sets it. The units work side by side, so the slowest of them alone."""
        times = {
            "matrix products": self.flops / ceilings.flops,
            "exponentials": self.exponentials / ceilings.exponentials,
            "bytes": self.bytes / ceilings.bytes + self.reads / ceilings.reads,
        }
        limit = max(times, key=lambda name: times[name])
        return 1e3 * times[limit], limit


def least_work(problem: Problem) -> tuple[Work, Work]:
    """Forward and backward of a problem, at the cost of the best algorithm that docs/mathematics.md knows.

    Bytes: each input is read once and each output written once, whatever an algorithm keeps in between.

    Every pair, one set of N rows (``exact``, ``pair_logsumexp``); G = 2 N^2 d is the whole matrix of similarities:
        forward   0.5 G and N^2/2 exponentials: s_ij = s_ji, so one exponential serves a row and a column
        backward  CUDA: 2 G and N^2 exponentials: s again, and its product with the rows, row by row, because adding to
                  rows and columns from half of the tiles takes atomics;
                  CPU: 1.5 G and N^2/2 exponentials: half of s, and a product for its rows and one for its columns,
                  into accumulators of each thread
    Anchors against M keys, H = 2 N M d:
        forward   H and N M exponentials
        backward  CUDA: 4 H and 2 N M, a kernel for the anchors and one for the keys;  CPU: 3 H and N M
    ``sampled`` is that with N = M = K m after the class sums, whose bytes it adds; ``moments``, per pixel:
        forward   d^2 (its part of a symmetric M2, by half) + 2 K d (K logits), K exponentials
        backward  2 d^2 (one d x d product) + 4 K d (the logits again, and the mean of the centres), K exponentials
        at label resolution the products per cell, and per pixel some flops to interpolate K numbers and hand K back;
        features are counted as read once each way, the gradient as written once, labels as read three times
    ``class_sums`` and ``gather_rows`` move bytes: features and labels in, sums out; labels in, the gradient out.
    Those of ``class_sums`` go one way almost all: what it reads counts at the rate of a sum, what it writes at that of
    a copy.
    """
    s = torch.finfo(problem.dtype).bits // 8
    wide = max(s, 4)  # bytes of sums, log D and gathered rows
    n, d, k = problem.pixels, problem.dim, problem.classes
    features = math.prod(problem.feature_shape) * d * s
    labels = math.prod(problem.label_shape) * 8
    on_cuda = problem.device.type == "cuda"
    blended = problem.feature_shape != problem.grid
    if problem.op == "pair_logsumexp" and problem.keys:
        rows = (n + problem.keys) * d * s + problem.keys * wide
        forward, backward = _anchors_and_keys(n, problem.keys, d, on_cuda)
        return _with_bytes(forward, rows + n * wide), _with_bytes(backward, 2 * rows + 2 * n * wide)
    if problem.op == "pair_logsumexp":
        forward, backward = _one_set(n, d, on_cuda)
        rows = n * d * s + n * wide
        return _with_bytes(forward, rows + n * wide), _with_bytes(backward, 2 * rows + 2 * n * wide)
    if problem.op == "class_sums":
        sums = k * d * wide
        return Work(reads=features + labels, bytes=sums + k * 8), Work(reads=labels + sums, bytes=features)
    if problem.op == "sample_pixels":
        return Work(bytes=labels + k * problem.per_class * 8), Work()
    if problem.op == "gather_rows":
        gathered = k * problem.per_class * d
        corners = 4 if problem.ratio > 1 and problem.resolution == "label" else 1
        return Work(bytes=min(corners * gathered * s, features) + gathered * wide), Work(
            bytes=gathered * wide + features
        )
    if problem.estimator == "exact":
        forward, backward = _one_set(n, d, on_cuda)
    elif problem.estimator == "sampled":
        forward, backward = _anchors_and_keys(k * problem.per_class, k * problem.per_class, d, on_cuda)
    else:
        cells = math.prod(problem.feature_shape)
        forward = Work(flops=cells * (d * d + 2 * k * d) + blended * 6 * k * n, exponentials=n * k)
        backward = Work(flops=cells * (2 * d * d + 4 * k * d) + blended * 12 * k * n, exponentials=n * k)
        return _with_bytes(forward, features + 2 * labels), _with_bytes(backward, 2 * features + labels)
    return _with_bytes(forward, features + labels), _with_bytes(backward, 2 * features + labels)


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device, for products in a dtype."""
    copied, copy_rate = _copy(device)
    summed, read_rate = _sum(device)
    product, product_rate = _product(device, dtype)
    exponential, exponential_rate = _exponentials(device, dtype)
    how = {
        "bytes": f"a copy of {copied / 2**20:.0f} MiB, read and written",
        "reads": f"a sum of {summed / 2**20:.0f} MiB, read",
        "flops": product,
        "exponentials": exponential,
    }
    return Ceilings(copy_rate, product_rate, exponential_rate, read_rate, how)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the L2 of a GPU, or of the last cache of a CPU as the kernel tells it; 32 MiB where it does not."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    units = {"K": 2**10, "M": 2**20}
    sizes = []
    for index in range(5):
        try:
            with open(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size") as file:
                text = file.read().strip()
        except OSError:
            continue
        sizes.append(int(text.rstrip("KM")) * units.get(text[-1], 1))
    return max(sizes, default=32 * 2**20)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30


def _one_set(n: int, d: int, on_cuda: bool) -> tuple[Work, Work]:
    whole = 2.0 * n * n * d
    forward = Work(flops=0.5 * whole, exponentials=0.5 * n * n)
    if on_cuda:
        return forward, Work(flops=2.0 * whole, exponentials=1.0 * n * n)
    return forward, Work(flops=1.5 * whole, exponentials=0.5 * n * n)


def _anchors_and_keys(n: int, m: int, d: int, on_cuda: bool) -> tuple[Work, Work]:
    whole = 2.0 * n * m * d
    forward = Work(flops=whole, exponentials=1.0 * n * m)
    if on_cuda:
        return forward, Work(flops=4.0 * whole, exponentials=2.0 * n * m)
    return forward, Work(flops=3.0 * whole, exponentials=1.0 * n * m)


def _with_bytes(work: Work, moved: float) -> Work:
    return Work(work.flops, work.exponentials, moved)


def _copy(device: torch.device) -> tuple[int, float]:
    size = COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, available_memory(device) // 8)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(7)
    target = torch.empty_like(source)
    return size, 2 * size / _fastest(lambda: target.copy_(source), device)


def _sum(device: torch.device) -> tuple[int, float]:
    """Of float32; on the CPU a row a thread, each streamed from end to end. On two Zen 5 cores 49 GB/s, where a loop of
    AVX-512 loads and additions in C comes to 45 and torch.sum of all at once to 42."""
    rows = torch.get_num_threads() if device.type == "cpu" else 1
    size = COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, available_memory(device) // 8)
    source = torch.ones(rows, size // 4 // rows, device=device)
    size = 4 * source.numel()
    return size, size / _fastest(lambda: source.sum(1), device)


def _product(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    """float32 on CUDA: IEEE, or three TF32 products of the same quality where those are faster, as kernels do it."""
    side = MATRIX_SIDE[dtype] if device.type == "cuda" else MATRIX_SIDE_CPU
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    name = str(dtype).removeprefix("torch.")
    how = f"torch.mm of {side} x {side} random matrices, {name}"
    rate = 2.0 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), device)
    if device.type == "cuda" and dtype == torch.float32:
        chosen = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        thrice = 2.0 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), device) / 3
        torch.set_float32_matmul_precision(chosen)
        if thrice > rate:
            return f"{how}: a third of the rate in TF32 (three TF32 products make a float32 one)", thrice
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        in_registers = _in_registers("multiply_adds", dtype)
        if in_registers > rate:
            return f"multiply-adds of {name} in registers of one thread, times {torch.get_num_threads()}", in_registers
    return how, rate


def _in_registers(what: str, dtype: torch.dtype) -> float:
    """Operations a second of the C++ kernels' own loops, of one thread times the threads; 0 where they are missing."""
    if not native.available("cpp"):
        return 0.0
    rounds = 100_000  # some milliseconds
    operations = native.busy(what, rounds, float64=dtype == torch.float64)
    seconds = _fastest(lambda: native.busy(what, rounds, float64=dtype == torch.float64), torch.device("cpu"))
    return torch.get_num_threads() * operations / seconds


def _exponentials(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    """In float64 for float64, else in float32. On the CPU of one thread, times the threads: they share nothing, and all
    at once would mostly measure how they wait for one another wherever other processes run."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    name = str(wide).removeprefix("torch.")
    if device.type == "cuda":
        from exponentials import ROUNDS, exponentiate

        x = torch.rand(EXPONENTIALS_IN_REGISTERS, device=device, dtype=wide)
        seconds = _fastest(lambda: exponentiate(x), device)
        return f"exp2 of {len(x)} {name}, {ROUNDS} times in registers", ROUNDS * len(x) / seconds
    x = torch.randn(EXPONENTIALS_IN_CACHE, dtype=wide)
    out = torch.empty_like(x)
    rounds, threads = 8, torch.get_num_threads()  # 8: some tens of microseconds, long for the clock
    torch.set_num_threads(1)
    seconds = _fastest(lambda: [torch.exp(x, out=out) for _ in range(rounds)], device)
    torch.set_num_threads(threads)
    rate = threads * rounds * len(x) / seconds
    in_registers = _in_registers("exponentials", wide)
    if in_registers > rate:
        return f"2^x of {name} in registers of one thread, times {threads}", in_registers
    return f"torch.exp of {len(x)} {name} in the cache of one thread, times {threads}", rate


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run."""
    best, begun = math.inf, None
    while begun is None or time.perf_counter() - begun < SECONDS:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            before = time.perf_counter()
            run()
            seconds = time.perf_counter() - before
        if begun is None:  # the first run warms up
            begun = time.perf_counter()
            continue
        best = min(best, seconds)
    return best
