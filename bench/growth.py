"""The second table: how the cost of each estimator grows with the pixels N, the width d and the classes K.

A series is one implementation along one axis. It stops where its next point, by the growth that its algorithm has,
would not fit into its share of the time that is left; the rows beyond say so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ceilings import Ceilings, available_memory
from problems import Problem
from rows import Answers, Implementation, Row, Settings, implementations, measure

AXES = ("pixels", "dim", "classes")
# Axis, device and whether every pair counts: the points. On a CPU they start lower, and time ends them.
PIXELS_OF_PAIRS = {"cuda": [2**14, 2**16, 2**18, 2**20], "cpu": [2**k for k in range(10, 21)]}
PIXELS = [2**14, 2**16, 2**18, 2**20, 2**22, 2**24]
DIMS = [16, 64, 256, 1024]
CLASSES = [2, 8, 32, 128]
# Where d and K vary, N is this:
BASE_OF_PAIRS = {"cuda": 2**16, "cpu": 2**12}
BASE = {"cuda": 2**20, "cpu": 2**16}
WEIGHT = {"pixels": 2.0, "dim": 1.0, "classes": 1.0}  # shares of the time
# How the work grows along an axis, where it is not in proportion; it says what the next point will take.
POWER: dict[tuple[str, str | None], int] = {
    ("pixels", "exact"): 2,
    ("classes", "exact"): 0,
    ("classes", "sampled"): 2,
}
HELD = 12  # times the inputs, that an estimator may hold: `sampled` its gradients in float32, peers rows and unit rows


@dataclass
class Series:
    """One implementation of one estimator along one axis."""

    axis: str
    label: str
    problems: list[Problem]
    choose: Callable[[Problem], Implementation]  # anew at each point: what a peer can, and its chunks, depend on N
    rows: list[Row] = field(default_factory=list)


def series(
    base: Problem, estimators: Sequence[str], choose: Callable[[Problem], Implementation], peer: str | None
) -> list[Series]:
    """The series of each estimator, by the implementation that ``choose`` takes, and of a peer of ``exact`` over N."""

    def choose_peer(problem: Problem) -> Implementation:
        return next(one for one in implementations(problem) if one.name == peer)

    found = []
    for axis in AXES:
        for estimator in estimators:
            problems = _along(replace(base, op="intra_class_loss", estimator=estimator, keys=0), axis)
            found.append(Series(axis, estimator, problems, choose))
            if axis == "pixels" and estimator == "exact" and peer is not None:
                found.append(Series(axis, peer, problems, choose_peer))
    return found


def run(all_series: Sequence[Series], ceilings: Ceilings, settings: Settings, deadline: float) -> None:
    """Measure every series; ``deadline`` is a time.monotonic()."""
    weights = [WEIGHT[one.axis] for one in all_series]
    for position, one in enumerate(all_series):
        share = (deadline - time.monotonic()) * weights[position] / sum(weights[position:])
        _run(one, ceilings, settings, share)


def exponent(before: Row, row: Row, axis: str) -> float | None:
    """How the time grew from one point to the next, as a power of the axis."""
    if before.times is None or row.times is None:
        return None
    steps = getattr(row.problem, axis) / getattr(before.problem, axis)
    return math.log(row.times.total / before.times.total) / math.log(steps)


def _run(one: Series, ceilings: Ceilings, settings: Settings, share: float) -> None:
    begun = time.monotonic()
    cost = 0.0  # seconds of the point before, the check left out
    for position, problem in enumerate(one.problems):
        implementation = one.choose(problem)
        why = None
        if position > 0:
            why = _too_much(one, problem, cost, share - (time.monotonic() - begun), settings)
        if why is None:
            before = time.monotonic()
            row = measure(problem, implementation, ceilings, replace(settings, check=position == 0), Answers())
            cost = time.monotonic() - before - row.check_seconds
            one.rows.append(row)
            why = None if row.times is not None else row.why
        if why is not None:
            rest = one.problems[len(one.rows) :]
            one.rows += [Row(later, implementation, "left out", why) for later in rest]
            return


def _too_much(one: Series, problem: Problem, cost: float, left: float, settings: Settings) -> str | None:
    """Why the next point is left out: by the growth of the last one's time, or of its memory."""
    last = one.rows[-1]
    assert last.times is not None
    steps = getattr(problem, one.axis) / getattr(last.problem, one.axis)
    growth = steps ** POWER.get((one.axis, problem.estimator), 1)
    once = last.times.total / 1e3
    around = cost - once * last.times.repeats  # inputs, warming up, trying chunks
    predicted = around * growth + max(settings.least * once * growth, settings.seconds)
    if predicted > left:
        return f"it would take about {predicted:.0f} s, and {max(left, 0):.0f} s are left for it (--budget)"
    needed = HELD * problem.pixels * problem.dim * 4
    there = available_memory(problem.device)
    return f"it may take {needed / 2**30:.0f} GiB of {there / 2**30:.0f}" if needed > there else None


def _along(base: Problem, axis: str) -> list[Problem]:
    kind = base.device.type
    if axis == "pixels":
        return [replace(base, pixels=n) for n in (PIXELS_OF_PAIRS[kind] if base.every_pair else PIXELS)]
    base = replace(base, pixels=(BASE_OF_PAIRS if base.every_pair else BASE)[kind])
    if axis == "dim":
        return [replace(base, dim=d) for d in DIMS]
    return [replace(base, classes=k) for k in CLASSES]
