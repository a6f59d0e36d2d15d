"""One row of the bench: an implementation is checked against the float64 answer, and only then timed and weighed.

Ours is the public function on each backend that is there and implements the operator; theirs are in peers.py. A row
that cannot be timed says why.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from ceilings import Ceilings, available_memory, last_level_cache, least_work
from peers import peers
from problems import (
    DTYPE_NAMES,
    TOLERANCE,
    Inputs,
    Problem,
    differentiate,
    expected,
    generator_for,
    make_inputs,
    ours,
    relative_error,
    rotated,
    sampling_fault,
)
from timing import Outputs, Times, extra_memory, spread, time_in_turns, time_runs

from in2nect import native
from in2nect.ops import backend

ROTATING_SHARE = 0.25  # of the free memory, at most, for copies of the inputs
# On a CPU at most this: virtual machines tell the last cache of the whole chip, which they share with others.
ROTATING_BYTES_CPU = 2**28
DETERMINISTIC = "_deterministic"


@dataclass(frozen=True)
class Implementation:
    """``call(inputs, problem, chunk, checking)``; where checking, ``sampled`` takes the pixels that are prescribed."""

    name: str
    kind: str  # "ours" or "peer"
    call: Callable[[Problem, Inputs, int | None, bool], Outputs]
    chunks: tuple[int | None, ...] = (None,)
    compiles: bool = False
    sampler: Callable[[Problem, Inputs], torch.Tensor] | None = None
    backend: str | None = None
    deterministic: bool = False
    capability: str | None = None  # of the CPU, where it is not the best
    precision: str = "highest"  # of float32 products (torch.set_float32_matmul_precision)
    missing: str | None = None  # why it is not here

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Its backend, its CPU's capability, its determinism and precision, for a forward and its backward."""
        was = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
        capability = native.use_cpu_capability(self.capability) if self.capability else contextlib.nullcontext()
        with backend.use_backend(self.backend), capability, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.use_deterministic_algorithms(self.deterministic)
            torch.set_float32_matmul_precision(self.precision)
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(was[0])
                torch.set_float32_matmul_precision(was[1])


@dataclass(frozen=True)
class Settings:
    """How long to measure, and what for."""

    seconds: float
    repeats: int
    least: int = 3
    memory: bool = True
    check: bool = True
    nvtx: bool = False


@dataclass
class Row:
    """``status``: "timed", or, with the reason in ``why``, "absent", "wrong", "failed", "out of memory", "left out"."""

    problem: Problem
    implementation: Implementation
    status: str
    why: str | None = None
    chunk: int | None = None
    times: Times | None = None
    bound_ms: dict[str, float] = field(default_factory=dict)
    limited_by: dict[str, str] = field(default_factory=dict)
    extra_bytes: int | None = None
    memory_how: str | None = None
    gradient_bytes: int = 0
    error: dict[str, Any] = field(default_factory=dict)
    check_seconds: float = 0.0
    rotating_bytes: int = 0
    ratio_to_best_peer: float | None = None
    read_share: float | None = None

    @property
    def name(self) -> str:
        return self.implementation.name

    def percent_of_bound(self) -> dict[str, float]:
        if self.times is None:
            return {}
        spreads = {"forward": self.times.forward, "backward": self.times.backward, "both": self.times.both}
        return {name: 100 * self.bound_ms[name] / spread.median for name, spread in spreads.items() if spread}

    def to_json(self) -> dict[str, Any]:
        times = self.times
        of_times = {
            f"{name}_ms": None if times is None or getattr(times, name) is None else getattr(times, name).to_json()
            for name in ("forward", "backward", "both")
        }
        return {
            **describe(self.problem),
            "implementation": self.name,
            "kind": self.implementation.kind,
            "status": self.status,
            "why": self.why,
            "chunk": self.chunk,
            **of_times,
            "repeats": 0 if times is None else times.repeats,
            "bound_ms": self.bound_ms,
            "limited_by": self.limited_by,
            "percent_of_bound": self.percent_of_bound(),
            "ratio_to_best_peer": self.ratio_to_best_peer,
            "read_share": self.read_share,
            "extra_bytes": self.extra_bytes,
            "memory_how": self.memory_how,
            "gradient_bytes": self.gradient_bytes,
            "rotating_bytes": self.rotating_bytes,
            "error": self.error,
            "check_seconds": round(self.check_seconds, 2),
        }


def describe(problem: Problem) -> dict[str, Any]:
    """A problem's fields for JSON."""
    fields = asdict(problem) | {"device": str(problem.device), "dtype": DTYPE_NAMES[problem.dtype]}
    return fields | {"feature_shape": list(problem.feature_shape), "label_shape": list(problem.label_shape)}


def implementations(problem: Problem) -> list[Implementation]:
    """Ours on every backend, those that are not here too, then the peers."""
    found = []
    for name in backend.BACKENDS:
        reason = _backend_missing(problem, name)
        found.append(Implementation(name, "ours", _ours, backend=name, missing=reason))
        if problem.device.type == "cuda" and name != "reference":
            found.append(replace(found[-1], name=name + DETERMINISTIC, deterministic=True))
        if name == "cpp" and problem.device.type == "cpu":
            found += _cpp_variants(problem, found[-1])
    for peer in peers(problem):
        reason = peer.why_not(problem)
        chunks = (None,) if reason else peer.chunks(problem)
        found.append(Implementation(peer.name, "peer", peer.call, chunks, peer.compiles, peer.sampler, missing=reason))
    return found


def _cpp_variants(problem: Problem, plain: Implementation) -> list[Implementation]:
    """The C++ operators as a lesser CPU would run them, and float32 rows as pairs of bfloat16 numbers, for chips that
    multiply those many times faster."""
    variants = []
    for name in native.CPU_CAPABILITIES[:-1]:  # the last is for tests
        there = name in native.available_cpu_capabilities()
        missing = plain.missing or (None if there else f"this CPU has no {name}")
        variants.append(replace(plain, name=f"cpp_{name}", capability=name, missing=missing))
    if problem.dtype == torch.float32:
        slow = plain.missing or (None if native.cpu_capability() == "amx" else "it is for CPUs with AMX")
        variants.append(replace(plain, name="cpp_two_bf16", precision="high", missing=slow))
    return variants


def selected(found: Sequence[Implementation], patterns: Sequence[str]) -> list[Implementation]:
    """Those whose name fits a pattern; ours that are not here only where they are named in full, and the C++ operators
    of a lesser CPU only where a pattern asks for more than everything."""
    return [
        one
        for one in found
        if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in patterns if pattern != "*" or not one.capability)
        and (one.missing is None or one.kind == "peer" or one.name in patterns)
    ]


def measure(
    problem: Problem, implementation: Implementation, ceilings: Ceilings, settings: Settings, answers: Answers
) -> Row:
    """Check, time and weigh one implementation; whatever it raises becomes the row's reason."""
    if implementation.missing is not None:
        return Row(problem, implementation, "absent", implementation.missing)
    row = Row(problem, implementation, "failed", gradient_bytes=0)
    try:
        if settings.check:
            begun = time.perf_counter()
            answers(problem.for_check())  # before it chooses a backend, or determinism, for what follows
            row.check_seconds = time.perf_counter() - begun
        with implementation.chosen():
            if implementation.compiles:
                torch.compiler.reset()  # sizes are compiled one by one, and torch gives up after eight
            _measure(row, ceilings, settings, answers)
    except Exception as error:
        row.status, row.why = failure(error)
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def failure(error: Exception) -> tuple[str, str]:
    """Status and reason of a row that raised this."""
    no_memory = "can't allocate memory" in str(error)  # what torch's CPU allocator says
    no_memory = no_memory or isinstance(error, (torch.OutOfMemoryError, MemoryError))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"[:500]
    return "out of memory" if no_memory else "failed", why


class Answers:
    """The float64 answers, worked out once a problem."""

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._answer: Any = None

    def __call__(self, problem: Problem) -> tuple[Inputs, Outputs, Outputs]:
        """Inputs, outputs and gradients."""
        if problem != self._problem:
            inputs = make_inputs(problem)
            self._problem, self._answer = problem, (inputs, *expected(problem, inputs))
        return self._answer


def compare_with_peers(rows: Sequence[Row]) -> None:
    """Fill in how many times faster than the fastest peer each row is."""
    best = min((row.times.total for row in rows if row.times and row.implementation.kind == "peer"), default=None)
    for row in rows:
        if row.times is not None and best is not None:
            row.ratio_to_best_peer = best / row.times.total


def run_once(problem: Problem, implementation: Implementation, inputs: Inputs, chunk: int | None) -> None:
    """A forward and a backward, for a trace; its ranges carry the implementation's name."""
    with implementation.chosen():
        with torch.profiler.record_function(f"{implementation.name} forward"):
            outputs = implementation.call(problem, inputs, chunk, False)
        with torch.profiler.record_function(f"{implementation.name} backward"):
            differentiate(inputs, outputs)


def _measure(row: Row, ceilings: Ceilings, settings: Settings, answers: Answers) -> None:
    problem, implementation = row.problem, row.implementation
    if settings.check:
        begun = time.perf_counter()
        fault = _check(row, answers)
        row.check_seconds += time.perf_counter() - begun
        if fault is not None:
            row.status, row.why = "wrong", fault
            return
    inputs = make_inputs(problem)
    row.gradient_bytes = sum(leaf.numel() * leaf.element_size() for leaf in inputs.leaves)
    most = int(ROTATING_SHARE * available_memory(problem.device))
    most = min(most, ROTATING_BYTES_CPU) if problem.device.type == "cpu" else most
    sets = rotated(problem, inputs, last_level_cache(problem.device), most)
    row.rotating_bytes = sum(one.bytes() for one in sets)
    row.chunk = _best_chunk(problem, implementation, inputs)

    def forward(inputs: Inputs) -> Outputs:
        return implementation.call(problem, inputs, row.chunk, False)

    row.times = time_runs(
        forward,
        differentiate,
        sets,
        problem.device,
        seconds=settings.seconds,
        least=settings.least,
        most=settings.repeats,
        name=" ".join(filter(None, (problem.op, problem.estimator, implementation.name))),
        nvtx=settings.nvtx,
    )
    if problem.op == "class_sums":
        row.read_share = _read_share(forward, sets, problem.device, settings)
    works = dict(zip(("forward", "backward"), least_work(problem)))
    for name, work in works.items():
        row.bound_ms[name], row.limited_by[name] = work.milliseconds(ceilings)
    row.bound_ms["both"] = sum(row.bound_ms.values())
    if settings.memory:
        row.extra_bytes, row.memory_how = extra_memory(forward, differentiate, inputs, problem.device)
    row.status = "timed"


def _read_share(
    forward: Callable[[Inputs], Outputs], sets: Sequence[Inputs], device: torch.device, settings: Settings
) -> float:
    """Bytes a second that a forward reads, over those of a sum of the same features, taken in turns.

    A ceiling is taken once, of other memory: on a machine that others share, what memory gives changes by the minute,
    and by where its pages lie. The two read different sets, so that neither finds what the other left in a cache.
    """
    ours = itertools.cycle(sets)
    others = itertools.cycle([*sets[len(sets) // 2 :], *sets[: len(sets) // 2]])
    with torch.no_grad():
        times = time_in_turns(
            [lambda: forward(next(ours)), lambda: next(others).leaves[0].sum()],
            device,
            seconds=settings.seconds,
            least=settings.least,
            most=settings.repeats,
        )
    features = sets[0].leaves[0].nbytes
    everything = features + sets[0].constants["labels"].nbytes
    return spread([read / taken for taken, read in times]).median * everything / features


def _check(row: Row, answers: Answers) -> str | None:
    """What is wrong with the implementation, at every chunk, beside the float64 answer; None where nothing is."""
    implementation = row.implementation
    problem = row.problem.for_check()
    inputs, wanted, wanted_gradients = answers(problem)
    if implementation.sampler is not None:
        drawn, again = (implementation.sampler(problem, inputs) for _ in range(2))
        fault = sampling_fault(problem, inputs, drawn)
        if fault is None and bool((drawn >= 0).all()) and torch.equal(drawn, again):
            fault = "it drew the same pixels twice"
        if fault is not None or problem.op == "sample_pixels":
            row.error = {"pixels": problem.pixels, "value": None, "gradient": None}
            return fault
    worst = {"value": 0.0, "gradient": 0.0}
    for chunk in implementation.chunks:
        chunk = chunk if chunk is None else min(chunk, problem.pixels)
        outputs = implementation.call(problem, inputs, chunk, True)
        gradients = differentiate(inputs, outputs)
        if len(outputs) != len(wanted):
            return f"it gave {len(outputs)} results, expected {len(wanted)}"
        values = [relative_error(*pair) for pair in zip(outputs, wanted)]
        slopes = [relative_error(*pair) for pair in zip(gradients, wanted_gradients)]
        worst["value"] = _worst([worst["value"], *values])
        worst["gradient"] = _worst([worst["gradient"], *slopes])
        del outputs, gradients
    row.error = {"pixels": problem.pixels, **worst}
    for (name, error), limit in zip(worst.items(), TOLERANCE[problem.dtype]):
        if not error <= limit:
            return f"its {name} is off by {error:.1e}, relative to float64; at most {limit:.0e} is right in this dtype"
    return None


def _worst(errors: Sequence[float]) -> float:
    """The largest error; NaN counts as infinite."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def _best_chunk(problem: Problem, implementation: Implementation, inputs: Inputs) -> int | None:
    """The chunk of the fastest second run; each has then been compiled and warmed up."""
    seconds: dict[int | None, float] = {}
    failure: Exception | None = None
    for chunk in implementation.chunks:
        try:
            for _ in range(2 if len(implementation.chunks) > 1 else 1):
                _wait(problem.device)
                start = time.perf_counter()
                differentiate(inputs, implementation.call(problem, inputs, chunk, False))
                _wait(problem.device)
                seconds[chunk] = time.perf_counter() - start
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)  # whose frames hold what did not fit
            seconds.pop(chunk, None)
    if not seconds and failure is not None:
        raise failure
    return min(seconds, key=lambda chunk: seconds[chunk])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ours(problem: Problem, inputs: Inputs, chunk: int | None, checking: bool) -> Outputs:
    return ours(problem, inputs, generator_for(problem) if checking else None)


def _backend_missing(problem: Problem, name: str) -> str | None:
    """Why a backend has no row of its own for a problem."""
    if name == "triton" and backend.interpreted():
        return "TRITON_INTERPRET=1 interprets the kernels on the CPU, and that time is no result"
    reason = backend.why_not(name)
    if reason is not None:
        return reason
    if name != "reference" and (name == "cpp") != (problem.device.type == "cpu"):
        return f"it does not run on {problem.device.type}"
    if name in ("cuda", "triton"):
        reason = backend.device_why_not(problem.device, name)
        if reason is not None:
            return reason
    lacking = [operator for operator in _operators(problem) if not backend.implements(operator, name)]
    return f"it has no {' and no '.join(lacking)} of its own" if lacking else None


def _operators(problem: Problem) -> tuple[str, ...]:
    """The operators that make a problem what it is: a backend without them would time another's."""
    if problem.op != "intra_class_loss":
        return (problem.op,)
    if problem.estimator == "exact":
        return ("intra_exact",)
    if problem.estimator == "sampled":
        return ("sample_pixels", "gather_rows", "pair_logsumexp")
    return ("class_moments",) if "class_moments" in backend.operators() else ("class_sums",)
