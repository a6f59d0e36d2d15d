"""What the bench shows and keeps: aligned text, JSON with the machine and the versions, and a plot."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ceilings import Ceilings, last_level_cache
from growth import AXES, Series, exponent
from problems import DTYPE_NAMES, Problem
from rows import Row

import in2nect

WIDTH = 118
_NAME = 30  # characters of an implementation's name: the longest is linear_cross_entropy [16384]
_COLUMNS = (("forward ms", 15), ("backward ms", 15), ("both ms", 15), ("MiB", 9), ("% bound", 9), ("x peer", 9))
_OURS, _OURS_LIGHT = "#c44e52", "#e39a9c"
_PEER, _PEER_LIGHT = "#6f7d8c", "#b4bdc7"
_LINES = {"exact": "#c44e52", "sampled": "#dd8452", "moments": "#55a868"}
_AXIS_NAMES = {"pixels": "pixels N", "dim": "width d", "classes": "classes K"}


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware that a result depends on; not the machine's name."""
    found: dict[str, Any] = {"device": device_name(device), "cpu": _cpu(), "cores": os.cpu_count()}
    found |= {"last_level_cache": last_level_cache(device), "threads": torch.get_num_threads()}
    found |= {"system": platform.system(), "architecture": platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def versions() -> dict[str, Any]:
    """Of python, torch, triton and in2nect, with the commit where it lies in a checkout."""
    root = str(Path(in2nect.__file__).parent.parent)
    commit = _output("git", "-C", root, "rev-parse", "HEAD")
    status = None if commit is None else _output("git", "-C", root, "status", "--porcelain")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "in2nect": in2nect.__version__,
        "commit": commit,
        "dirty": None if commit is None else bool(status),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"


def slug(device: torch.device) -> str:
    """A device's name for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device_name(device).lower())).strip("-")


def ceilings_text(ceilings: dict[torch.dtype, Ceilings]) -> str:
    lines = ["ceilings of this machine, measured now:"]
    for position, one in enumerate(ceilings.values()):
        if position == 0:
            lines.append(f"  {one.bytes / 1e9:10.4g} GB/s       {one.how['bytes']}")
            lines.append(f"  {one.reads / 1e9:10.4g} GB/s       {one.how['reads']}")
        lines.append(f"  {one.flops / 1e9:10.4g} GFLOP/s    {one.how['flops']}")
        lines.append(f"  {one.exponentials / 1e9:10.4g} Gexp/s     {one.how['exponentials']}")
    return "\n".join(lines)


def table_head(problem: Problem) -> str:
    """Title, bound and column names of a problem's table."""
    grid = " x ".join(str(size) for size in problem.feature_shape)
    title = f"{problem.op}{', ' + problem.estimator if problem.estimator else ''}: N = {problem.pixels:,}"
    title += f", K = {problem.classes}" if problem.op == "sample_pixels" else f" ({grid} cells), d = {problem.dim}"
    title += "" if problem.op in ("sample_pixels", "pair_logsumexp") else f", K = {problem.classes}"
    title += f", {problem.keys:,} keys" if problem.keys else ""
    title += f", {problem.resolution} resolution, ratio {problem.ratio}" if problem.ratio > 1 else ""
    title += "" if problem.op == "sample_pixels" else f", {DTYPE_NAMES[problem.dtype]}"
    title += "" if problem.op in ("sample_pixels", "pair_logsumexp") else f", {problem.layout}"
    head = "implementation".ljust(_NAME) + "".join(name.rjust(width) for name, width in _COLUMNS) + "   error"
    return f"{title}\n{head}"


def table_row(row: Row) -> str:
    """One line, or more where a reason is long."""
    name = row.name + (f" [{row.chunk}]" if row.chunk is not None else "")
    if row.times is None:
        return wrapped(name.ljust(_NAME), f"  {row.status}: {row.why}")
    percent = row.percent_of_bound()
    cells = [
        *(_cell(getattr(row.times, name)) for name in ("forward", "backward", "both")),
        "-" if row.extra_bytes is None else digits(row.extra_bytes / 2**20),
        digits(percent.get("both", percent["forward"])),
        "-" if row.ratio_to_best_peer is None else f"{digits(row.ratio_to_best_peer)}x",
    ]
    errors = [error for error in (row.error.get("value"), row.error.get("gradient")) if error is not None]
    error = ("0" if max(errors) == 0 else f"{max(errors):.0e}") if errors else "-"
    return name.ljust(_NAME) + "".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS)) + error.rjust(8)


def table_foot(rows: Sequence[Row], missing: dict[str, str]) -> str:
    """What sets the bound, and which backends have no row."""
    timed = next((row for row in rows if row.times is not None), None)
    lines = []
    if timed is not None:
        parts = [
            f"{name} {digits(timed.bound_ms[name])} ms ({timed.limited_by[name]})"
            for name in ("forward", "backward")
            if timed.bound_ms[name] > 0
        ]
        lines.append("bound: " + ", ".join(parts))
    shares = [f"{row.name} {digits(100 * row.read_share)} %" for row in rows if row.read_share is not None]
    if shares:
        lines.append(wrapped("reads, over the rate of a sum of the same features, in turns:", f" {', '.join(shares)}"))
    lines += [wrapped(f"no row for {name}:", f" {why}") for name, why in missing.items()]
    return "\n".join(lines)


LEGEND = (
    "Times are medians, ± half the distance from the 10th to the 90th percentile. MiB: memory at the peak beyond the\n"
    "inputs, gradient included. % bound: the bound over the time of both. x peer: time of the fastest peer over this\n"
    "one's. error: the larger of value's and gradient's, relative to float64. [n]: rows a chunk, the fastest tried."
)

STATUSES = (
    "A row without times is absent (not installed, or not for this device), wrong (its value or gradient is further\n"
    "from float64's than the dtype's rounding explains), failed, out of memory, or left out of the time budget.\n"
    "The bound: the least products, exponentials and bytes of the best algorithm known, over the ceilings of this\n"
    "run; bench/ceilings.py derives it. What the JSON holds: bench/results/README.md."
)


def growth_text(all_series: Sequence[Series]) -> str:
    """For each axis a column a series: ms of forward and backward, and the power by which they grew."""
    blocks = []
    for axis in AXES:
        columns = [one for one in all_series if one.axis == axis]
        if not columns:
            continue
        values = sorted({getattr(row.problem, axis) for one in columns for row in one.rows if row.times is not None})
        rows = {one.label: {getattr(row.problem, axis): row for row in one.rows} for one in columns}
        widths = [max(20, len(one.label) + 3) for one in columns]
        lines = [
            f"cost over {_AXIS_NAMES[axis]} ({_fixed(axis, columns)}): forward and backward in ms (power of its growth)"
        ]
        lines.append(_AXIS_NAMES[axis].ljust(14) + "".join(one.label.rjust(w) for one, w in zip(columns, widths)))
        for value in values:
            cells = [_growth_cell(one, rows[one.label].get(value)) for one in columns]
            lines.append(f"{value:,}".ljust(14) + "".join(cell.rjust(w) for cell, w in zip(cells, widths)))
        for one in columns:
            ended = next((row for row in one.rows if row.times is None), None)
            if ended is not None:
                start = f"{one.label} ends before {getattr(ended.problem, axis):,}:"
                lines.append(wrapped(start, f" {ended.why}"))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def heading(tool: str, device: torch.device, arguments: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the JSON of every script begins with."""
    return {
        "schema": 1,
        "tool": tool,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        "arguments": arguments,
        "seconds": round(seconds, 1),
    }


def result_path(device: torch.device, tool: str) -> Path:
    """Where the JSON of a run goes that is given no name."""
    return Path(__file__).resolve().parent / "results" / f"{date.today().isoformat()}-{slug(device)}-{tool}.json"


def document(
    *,
    device: torch.device,
    arguments: dict[str, Any],
    ceilings: dict[torch.dtype, Ceilings],
    rows: Sequence[Row],
    missing: dict[str, dict[str, str]],
    all_series: Sequence[Series],
    seconds: float,
) -> dict[str, Any]:
    """The whole run, for JSON."""
    growth = []
    for one in all_series:
        before: Row | None = None
        for row in one.rows:
            power: float | None = None if before is None else exponent(before, row, one.axis)
            growth.append({"axis": one.axis, "series": one.label, "exponent": power, **row.to_json()})
            before = row
    return finite(
        {
            **heading("loss_throughput", device, arguments, seconds),
            "ceilings": {DTYPE_NAMES[dtype]: one.to_json() for dtype, one in ceilings.items()},
            "rows": [row.to_json() for row in rows],
            "no_row": missing,
            "growth": growth,
        }
    )


def plot(target: Path, rows: Sequence[Row], all_series: Sequence[Series], device: torch.device) -> str | None:
    """Draw bars for every table and lines for the growth; the reason where matplotlib, or anything to draw, lacks."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no plot: {error}; pip install matplotlib"
    tables = _tables(rows)
    lines = [axis for axis in AXES if any(one.axis == axis and _timed(one.rows) for one in all_series)]
    if not tables and not lines:
        return "no plot: nothing was timed"
    height = [max(1.9, 0.34 * len(table) + 1.25) for table in tables] + ([3.9] if lines else [])
    figure = Figure(figsize=(11.5, sum(height) + 0.9), dpi=110, layout="constrained")
    grid = figure.add_gridspec(len(height), 1, height_ratios=height)
    for position, table in enumerate(tables):
        _bars(figure.add_subplot(grid[position]), table)
    if lines:
        cells = grid[len(tables)].subgridspec(1, len(lines), width_ratios=[1.5 if a == "pixels" else 1 for a in lines])
        panels: list[Any] = []
        for position, axis in enumerate(lines):
            panels.append(figure.add_subplot(cells[position], sharey=panels[0] if panels else None))
            _curves(panels[-1], axis, [one for one in all_series if one.axis == axis])
            panels[-1].tick_params(labelleft=position == 0)
        panels[0].set_ylabel("ms: forward and backward", fontsize=9)
        panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"in2nect {in2nect.__version__}: forward and backward on {device_name(device)}",
        x=0.012,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    from in2nect.files import replacing

    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        figure.savefig(partial)
    return None


def _tables(rows: Sequence[Row]) -> list[list[Row]]:
    """Timed rows, a list for each problem."""
    tables: dict[Problem, list[Row]] = {}
    for row in _timed(rows):
        tables.setdefault(row.problem, []).append(row)
    return list(tables.values())


def _bars(axes: Any, rows: list[Row]) -> None:
    problem = rows[0].problem
    rows = sorted(rows, key=lambda row: row.times.total if row.times else 0.0)
    for position, row in enumerate(rows):
        assert row.times is not None
        is_ours = row.implementation.kind == "ours"
        backward = row.times.backward.median if row.times.backward else 0.0
        # medians do not add up; the bar is as long as the median of both
        forward = row.times.total * row.times.forward.median / (row.times.forward.median + backward)
        backward = row.times.total - forward
        axes.barh(position, forward, 0.66, color=_OURS if is_ours else _PEER)
        axes.barh(position, backward, 0.66, left=forward, color=_OURS_LIGHT if is_ours else _PEER_LIGHT)
        percent = row.percent_of_bound()
        text = f" {digits(row.times.total)} ms, at {digits(percent.get('both', percent['forward']))} % of the bound"
        text += "" if row.extra_bytes is None else f", {digits(row.extra_bytes / 2**20)} MiB"
        axes.text(row.times.total, position, text, va="center", fontsize=8)
    bound = rows[0].bound_ms["both"]
    axes.axvline(bound, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    for label, row in zip(axes.get_yticklabels(), rows):
        label.set_fontweight("bold" if row.implementation.kind == "ours" else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(row.times.total for row in rows if row.times))
    axes.set_xlabel("ms: forward (dark) and backward (light); ours red, peers grey; dashed: the bound", fontsize=8)
    title = table_head(problem).split("\n")[0]
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Any, axis: str, all_series: Sequence[Series]) -> None:
    for one in all_series:
        timed = _timed(one.rows)
        if not timed:
            continue
        x = [getattr(row.problem, axis) for row in timed]
        y = [row.times.total for row in timed if row.times]
        color = _LINES.get(one.label, _PEER)
        label = f"{one.label} ({timed[0].name})" if one.label in _LINES else f"exact ({one.label}), a peer"
        axes.plot(x, y, color=color, marker="o", markersize=3.5, linewidth=1.6, label=label)
        if one.label == "exact" and axis == "pixels":
            bound = [row.bound_ms["both"] for row in timed]
            axes.plot(x, bound, color=color, linestyle="--", linewidth=1, label="the bound of exact")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({getattr(row.problem, axis) for one in all_series for row in _timed(one.rows)})
    axes.set_xticks(ticks, [_short(tick) for tick in ticks], fontsize=8, rotation=45 if len(ticks) > 8 else 0)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel(_AXIS_NAMES[axis], fontsize=9)
    axes.set_title(f"over {_AXIS_NAMES[axis]}\n{_fixed(axis, all_series)}", fontsize=8.5, loc="left")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _fixed(axis: str, columns: Sequence[Series]) -> str:
    """What stays the same along an axis."""
    problem = columns[0].problems[0]
    if axis == "pixels":
        return f"d = {problem.dim}, K = {problem.classes}, {DTYPE_NAMES[problem.dtype]}"
    sizes: dict[int, list[str]] = {}
    for one in columns:
        sizes.setdefault(one.problems[0].pixels, []).append(one.label)
    pixels = f"N = {_short(next(iter(sizes)))}"
    if len(sizes) > 1:  # exact, and those whose cost is linear
        pixels = ", ".join(f"N = {_short(n)} {'/'.join(labels)}" for n, labels in sizes.items())
    return f"{pixels}; {'K = ' + str(problem.classes) if axis == 'dim' else 'd = ' + str(problem.dim)}"


def _growth_cell(one: Series, row: Row | None) -> str:
    if row is None or row.times is None:
        return "-"
    position = one.rows.index(row)
    power = exponent(one.rows[position - 1], row, one.axis) if position else None
    return digits(row.times.total) + (f" ({power:.1f})" if power is not None else "      ")


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.times is not None]


def _cell(spread: Any) -> str:
    return "-" if spread is None else f"{digits(spread.median)} ±{100 * spread.relative:3.0f} %"


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value >= 1e-3 else f"{value:.1e}"


def _short(number: int) -> str:
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return f"{number:,}"


def wrapped(start: str, text: str) -> str:
    """A line of at most WIDTH characters, with what is left below, indented."""
    lines, line = [], start
    for word in text.split(" "):
        if len(line) + 1 + len(word) > WIDTH and line.strip():
            lines.append(line)
            line = "    " + word
        else:
            line += (" " if line and not line.endswith(" ") else "") + word
    return "\n".join([*lines, line])


def finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def say(text: str) -> None:
    """Print at once, so that a long run is seen to move."""
    print(text)
    sys.stdout.flush()
