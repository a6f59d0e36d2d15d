"""Times and memory of a forward and a backward, by CUDA events or the host's clock, over rotating inputs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from problems import Inputs

Outputs = tuple[torch.Tensor, ...]
Forward = Callable[[Inputs], Outputs]
Backward = Callable[[Inputs, Outputs], Outputs]

AHEAD_CYCLES = 2_000_000  # about a millisecond of a GPU's clock, which the host uses to get ahead of it
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's mallopt
# From here on a block is mapped for itself and given back when freed, so that the resident set is what is in use ...
BLOCK_MEASURED = 2**16
# ... and, while times are taken, what glibc's own sliding threshold comes to, set once so that all rows run alike.
BLOCK_TIMED = 2**25
LARGEST_PLUG = 2**30


@dataclass(frozen=True)
class Spread:
    """Milliseconds of repeated runs."""

    median: float
    p10: float
    p90: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @property
    def relative(self) -> float:
        """Half the distance of the percentiles, as a share of the median."""
        return (self.p90 - self.p10) / 2 / self.median


@dataclass(frozen=True)
class Times:
    """``backward`` and ``both`` are None where nothing is differentiated."""

    forward: Spread
    backward: Spread | None
    both: Spread | None
    repeats: int

    @property
    def total(self) -> float:
        """Milliseconds of a step: forward and backward where there is one."""
        return (self.both or self.forward).median


def time_runs(
    forward: Forward,
    backward: Backward,
    sets: Sequence[Inputs],
    device: torch.device,
    *,
    seconds: float,
    least: int,
    most: int,
    name: str = "",
    nvtx: bool = False,
) -> Times:
    """Times as many runs as fit into ``seconds``, within ``least`` and ``most``, each on the next of the input sets.

    The caller has run it before, so that nothing is compiled here; one run more tells how many there will be.
    On CUDA a millisecond of spinning goes into the stream before each run: the host gets ahead, and the events measure
    the GPU's work as in a training step, not the launches.
    """
    mark = _mark(name) if nvtx else _unmarked
    run = _run_cuda if device.type == "cuda" else _run_host
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        before = time.perf_counter()
        run(forward, backward, sets[-1], mark)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        once = time.perf_counter() - before
        repeats = max(least, min(most, int(seconds / once)))
        timed = [run(forward, backward, sets[i % len(sets)], mark) for i in range(repeats)]
    finally:
        if was_collecting:
            gc.enable()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        timed = [tuple(a.elapsed_time(b) for a, b in itertools.pairwise(events)) for events in timed]
    forwards, backwards = [t[0] for t in timed], [t[1] for t in timed]
    if not sets[0].leaves:
        return Times(spread(forwards), None, None, repeats)
    return Times(spread(forwards), spread(backwards), spread([sum(t) for t in timed]), repeats)


def time_in_turns(
    tasks: Sequence[Callable[[], object]], device: torch.device, *, seconds: float, least: int, most: int
) -> list[list[float]]:
    """Milliseconds of each task in every round: all tasks, one after the other, and in the next round the other way
    round, so that a machine that drifts slows all of them alike.

    As many rounds as fit into ``seconds``, within ``least`` and ``most``. The caller has run the tasks before. On CUDA
    nothing waits between tasks: each takes from one event of the stream to the next, which is what the host takes where
    it is slower than the GPU.
    """
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    marks: list[list[Any]] = []
    try:
        before = time.perf_counter()
        for task in tasks:
            task()
        _wait(device)
        rounds = max(least, min(most, int(seconds / (time.perf_counter() - before))))
        for number in range(rounds):
            marks.append([_now(device)])
            for task in tasks if number % 2 == 0 else reversed(tasks):
                task()
                marks[-1].append(_now(device))
    finally:
        if was_collecting:
            gc.enable()
    _wait(device)
    times = [[_between(a, b) for a, b in itertools.pairwise(moments)] for moments in marks]
    return [found if number % 2 == 0 else found[::-1] for number, found in enumerate(times)]


def extra_memory(forward: Forward, backward: Backward, inputs: Inputs, device: torch.device) -> tuple[int | None, str]:
    """Bytes that a forward and backward hold at their peak beyond the inputs, the gradient among them; and how.

    CUDA: the allocator's own peak. CPU: the peak of the process's resident set (VmHWM, set back before the run through
    /proc/self/clear_refs), with glibc told to map every block of 64 KiB or more for itself: it counts what native code
    allocates too, to about 0.1 MiB. None where the system offers neither.
    """

    def step() -> None:
        outputs = forward(inputs)
        gradients = backward(inputs, outputs)
        del outputs, gradients

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "peak of torch's CUDA allocator"
    try:
        with _mapped_blocks():
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = _status("VmRSS")
            step()
            peak = _status("VmHWM")
    except (OSError, AttributeError):
        return None, "not measured: it takes Linux with /proc/self/clear_refs, and glibc"
    return max(peak - before, 0), "peak of the resident set (VmHWM)"


def settle_allocator() -> None:
    """Fix glibc's thresholds for the whole run; nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        _set_thresholds(ctypes.CDLL(None), BLOCK_TIMED)


def spread(milliseconds: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile, interpolated."""
    ordered = sorted(milliseconds)

    def percentile(share: float) -> float:
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return Spread(percentile(0.5), percentile(0.1), percentile(0.9))


def _run_host(forward: Forward, backward: Backward, inputs: Inputs, mark: Any) -> tuple[float, float]:
    with mark("forward"):
        start = time.perf_counter()
        outputs = forward(inputs)
        middle = time.perf_counter()
    with mark("backward"):
        resumed = time.perf_counter()
        gradients = backward(inputs, outputs)
        end = time.perf_counter()
    del outputs, gradients
    return 1e3 * (middle - start), 1e3 * (end - resumed)


def _run_cuda(forward: Forward, backward: Backward, inputs: Inputs, mark: Any) -> tuple[Any, ...]:
    events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda._sleep(AHEAD_CYCLES)
    events[0].record()
    with mark("forward"):
        outputs = forward(inputs)
    events[1].record()
    with mark("backward"):
        gradients = backward(inputs, outputs)
    events[2].record()
    del outputs, gradients
    return events


def _now(device: torch.device) -> Any:
    """A moment on the device's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _unmarked(direction: str) -> Any:
    return contextlib.nullcontext()


def _mark(name: str) -> Callable[[str], Any]:
    return lambda direction: torch.cuda.nvtx.range(f"{name} {direction}")


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo; hblks is the number of blocks mapped for themselves."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_int) for name in _names)


@contextlib.contextmanager
def _mapped_blocks() -> Iterator[None]:
    """Have every block mapped for itself, and what the heap has free occupied, without being touched: malloc would take
    blocks from there, and keep them when freed."""
    library = ctypes.CDLL(None)
    library.mallinfo.restype = _MallocInfo
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.restype, library.free.argtypes = None, (ctypes.c_void_p,)
    _set_thresholds(library, BLOCK_MEASURED)
    plugs = []
    try:
        library.malloc_trim(0)
        size = LARGEST_PLUG
        while size >= BLOCK_MEASURED:
            mapped = library.mallinfo().hblks
            block = library.malloc(size)
            if block and library.mallinfo().hblks == mapped:
                plugs.append(block)  # out of the heap
            else:
                library.free(block)
                size //= 2
        yield
    finally:
        for block in plugs:
            library.free(block)
        _set_thresholds(library, BLOCK_TIMED)


def _set_thresholds(library: ctypes.CDLL, block: int) -> None:
    library.mallopt(MMAP_THRESHOLD, block)
    library.mallopt(TRIM_THRESHOLD, 2 * block)  # glibc's own proportion


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as file:
        found = re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024
