"""Times the losses and their operators against each other, against what PyTorch and public libraries offer, and against
what the machine can do.

    python bench/loss_throughput.py                                       two tables, the growth, and a plot; 3 minutes
    python bench/loss_throughput.py --op class_sums --device cuda --pixels 1048576 --json
    python bench/loss_throughput.py --impl 'triton,torch_*' --pixels 65536 --trace runs/bench/trace.json

Every implementation computes the same thing: before it is timed, its value and its gradient are held to the equations
in float64, and one that is off is a row that says so. Ceilings are measured first, in the same run. It runs straight
from a checkout and needs torch alone; matplotlib draws the plot.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

# Threads of libgomp that wait spin for long by default, and with other processes about take a core from them.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is loaded

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
try:
    import in2nect  # noqa: F401
except ImportError:
    sys.path.insert(0, str(ROOT))

import growth  # noqa: E402
import output  # noqa: E402
from arguments import positive  # noqa: E402
from ceilings import Ceilings, measure  # noqa: E402
from output import say  # noqa: E402
from problems import DTYPES, ESTIMATORS, LAYOUTS, OPS, Problem, make_inputs  # noqa: E402
from rows import (  # noqa: E402
    Answers,
    Implementation,
    Row,
    Settings,
    compare_with_peers,
    implementations,
    run_once,
    selected,
)
from rows import measure as measure_row  # noqa: E402
from timing import settle_allocator  # noqa: E402

from in2nect.files import replacing  # noqa: E402
from in2nect.ops import backend  # noqa: E402

DEFAULT_OPS = ("intra_class_loss", "class_sums")
PIXELS_OF_PAIRS = {"cpu": 4096, "cuda": 65_536}
PIXELS = {"cpu": 262_144, "cuda": 1_048_576}
SECONDS = 1.0  # of runs a row
BUDGET = {"cpu": 150.0, "cuda": 600.0}
TABLES_SHARE = 0.6  # of the budget, after which no row of the first tables is begun where growth is to follow
GROWTH_SECONDS = 0.3  # a point, once it has been run
PLOT = ROOT / "runs" / "bench" / "loss_throughput.png"
NO_NAME = ""  # of --json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; 1 where nothing could be timed, or an implementation of ours was wrong."""
    begun = time.monotonic()
    logging.getLogger("torch.utils.cpp_extension").setLevel(
        logging.ERROR
    )  # that there is no CUDA, which the table says
    warnings.filterwarnings(
        "ignore", message="in2nect::.* runs on CUDA through plain torch"
    )  # as the float64 answers do
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    os.environ.pop("IN2NECT_BACKEND", None)  # each row chooses its own
    device = torch.device(options.device)
    if device.type == "cuda":
        # cuBLAS is deterministic with it alone, and it is read when cuBLAS starts; the size is that of its default
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        settle_allocator()
    problems = [_problem(options, device, op, estimator) for op, estimator in _tables(options)]
    chosen = {problem: _implementations(problem, options) for problem in problems}
    if not any(chosen.values()):
        names = sorted({one.name for problem in problems for one in implementations(problem)})
        parser.error(f"--impl {options.impl} names no implementation; there are {', '.join(names)}")

    versions = output.versions()
    say(
        f"{output.device_name(device)}: python {versions['python']}, torch {versions['torch']}, "
        f"triton {versions['triton']}, in2nect {versions['in2nect']}"
    )
    ceilings = {dtype: measure(device, dtype) for dtype in dict.fromkeys(problem.dtype for problem in problems)}
    say(output.ceilings_text(ceilings) + "\n")
    settings = Settings(options.seconds, options.repeats, nvtx=options.nvtx)
    end = begun + options.budget * (TABLES_SHARE if options.growth else 1.0)
    rows: list[Row] = []
    missing: dict[str, dict[str, str]] = {}
    for position, problem in enumerate(problems):
        share = (end - time.monotonic()) / (len(problems) - position)  # what one table leaves goes to the others
        absent = _absent(problem, chosen[problem])
        missing[" ".join(filter(None, (problem.op, problem.estimator)))] = absent
        rows += _table(problem, chosen[problem], ceilings[problem.dtype], settings, absent, time.monotonic() + share)
    say(output.LEGEND + "\n")
    all_series = _growth(options, problems, rows, ceilings, settings, begun) if options.growth else []
    if options.trace is not None:
        _trace(options.trace, [row for row in rows if row.times is not None], device)
    _plot(options, rows, all_series, device)
    if options.json is not None:
        _write_json(options, rows, missing, all_series, ceilings, device, time.monotonic() - begun)
    say(f"{time.monotonic() - begun:.0f} s in all")
    wrong = any(row.status == "wrong" and row.implementation.kind == "ours" for row in rows)
    return int(wrong or not any(row.times is not None for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loss_throughput.py",
        description=__doc__,
        epilog=f"the columns:\n{output.LEGEND}\n{output.STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is timed")
    what.add_argument(
        "--op",
        type=_list(OPS),
        metavar="LIST",
        help=f"of {', '.join(OPS)}; a table each (default: {','.join(DEFAULT_OPS)})",
    )
    what.add_argument(
        "--estimator",
        type=_list(ESTIMATORS),
        metavar="LIST",
        help=f"of intra_class_loss, of {', '.join(ESTIMATORS)}; a table each (default: exact; in the growth, all)",
    )
    what.add_argument(
        "--impl",
        default="*",
        metavar="LIST",
        help="names or patterns of implementations: reference, cpp, cuda, triton (ours, by backend), on CUDA also "
        "triton_deterministic and cuda_deterministic (under torch.use_deterministic_algorithms, which also fills every "
        "fresh tensor), on the CPU cpp_portable, cpp_avx2, cpp_avx512, cpp_avx512_bf16, cpp_amx (cpp as a lesser CPU "
        "runs it; only if asked for) and cpp_two_bf16 (float32 rows as two bfloat16 numbers each, where the CPU has "
        "AMX), and the peers that the tables name (default: %(default)s)",
    )
    what.add_argument(
        "--device", choices=("cpu", "cuda"), help="where the tensors are (default: cuda where there is one)"
    )
    what.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the features (default: bf16 on cuda, fp32 on cpu)",
    )
    size = parser.add_argument_group("at which size")
    size.add_argument(
        "--pixels",
        type=positive,
        metavar="N",
        help="rows of the loss; images of 256 x 256 where they divide N, else one image (default: "
        f"{PIXELS_OF_PAIRS['cpu']} on cpu and {PIXELS_OF_PAIRS['cuda']} on cuda where every pair counts, "
        f"else {PIXELS['cpu']} and {PIXELS['cuda']})",
    )
    size.add_argument("--dim", type=positive, default=64, metavar="D", help="features a pixel (default: %(default)s)")
    size.add_argument("--classes", type=positive, default=7, metavar="K", help="long-tailed (default: %(default)s)")
    size.add_argument(
        "--per-class", type=positive, default=256, metavar="M", help="pixels drawn a class (default: %(default)s)"
    )
    size.add_argument(
        "--keys", type=int, default=0, metavar="M", help="of pair_logsumexp: anchors against M keys, not each other"
    )
    size.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="nchw",
        help="of the features in memory; rows: (N, d) without an image (default: %(default)s)",
    )
    size.add_argument(
        "--resolution",
        choices=("label", "feature"),
        default="label",
        help="where the loss is, if the labels are finer than the features (default: %(default)s)",
    )
    size.add_argument(
        "--ratio",
        type=positive,
        default=1,
        metavar="R",
        help="side of the labels over that of the features (default: %(default)s, where both resolutions are one)",
    )
    size.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="tau of the pairs (default: %(default)s)"
    )
    size.add_argument("--seed", type=int, default=0, help="of features, labels and draws (default: %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help="of repeated runs a row, three runs at least (default: %(default)g)",
    )
    how.add_argument(
        "--repeats", type=positive, default=200, metavar="R", help="runs a row, at most (default: %(default)s)"
    )
    how.add_argument(
        "--growth",
        action=argparse.BooleanOptionalAction,
        help="a second table: the cost of each estimator over N, d and K, on the backend that the device gets by "
        "default, and of the fastest peer of exact (default: where neither --op nor --impl is given)",
    )
    how.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help="seconds in all, beyond which nothing is begun and rows say so (default: "
        f"{BUDGET['cpu']:g} on cpu, {BUDGET['cuda']:g} on cuda)",
    )
    kept = parser.add_argument_group("what is kept")
    kept.add_argument(
        "--json",
        nargs="?",
        const=NO_NAME,
        metavar="FILE",
        help="every figure, with machine, versions, arguments and ceilings; without a name "
        "bench/results/YYYY-MM-DD-DEVICE-loss_throughput.json (default: nothing is kept)",
    )
    kept.add_argument(
        "--plot",
        type=Path,
        default=PLOT,
        metavar="FILE.png",
        help="bars and lines (default: runs/bench/loss_throughput.png)",
    )
    kept.add_argument("--no-plot", action="store_true", help="draw nothing")
    kept.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.json",
        help="a Chrome trace of one run of every timed row by torch's profiler, taken after the times",
    )
    kept.add_argument(
        "--nvtx", action="store_true", help="mark every timed forward and backward for Nsight Systems; cuda only"
    )
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in what depends on other options, and refuse what does not go together."""
    if options.growth is None:
        options.growth = options.op is None and options.impl == "*"
    options.op = options.op or list(DEFAULT_OPS)
    options.growth_estimators = options.estimator or list(ESTIMATORS)
    options.estimator = options.estimator or ["exact"]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    options.budget = BUDGET[options.device] if options.budget is None else options.budget
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; --device cpu runs everywhere")
    if options.nvtx and options.device == "cpu":
        parser.error("--nvtx marks ranges on CUDA's timeline, and this is --device cpu; --trace works on both")
    if backend.interpreted() and (options.device == "cuda" or "triton" in options.impl.split(",")):
        parser.error(
            "TRITON_INTERPRET=1 is set: Triton's kernels would be interpreted on the CPU, and such a time is no "
            "result. Unset it; without a GPU the Triton kernels cannot be timed."
        )
    if options.classes < 2:
        parser.error(f"--classes {options.classes}: the losses compare classes and need at least 2")
    if options.pixels is not None and options.pixels < 2 * options.classes:
        parser.error(
            f"--pixels {options.pixels}: {options.classes} classes need {2 * options.classes} at least, two each"
        )
    if options.keys and "pair_logsumexp" not in options.op:
        parser.error("--keys belongs to --op pair_logsumexp")
    if options.keys < 0 or 0 < options.keys < 2 * options.classes:
        parser.error(f"--keys {options.keys}: expected 0 or at least two a class")
    if options.ratio > 1 and options.layout == "rows":
        parser.error("--ratio is of images, and --layout rows has none; use --layout nchw or channels_last")
    if options.temperature <= 0:
        parser.error(f"--temperature {options.temperature}: expected a positive number")
    for op, estimator in _tables(options):
        _, height, width = _problem(options, torch.device(options.device), op, estimator).grid
        if options.resolution == "label" and (height % options.ratio or width % options.ratio):
            parser.error(
                f"--ratio {options.ratio} does not divide the {height} x {width} labels of {op}; "
                "choose --pixels so that it does, a multiple of 65536 for a power of two"
            )


def _tables(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Operator and estimator of each table."""
    return [
        (op, estimator)
        for op in options.op
        for estimator in (options.estimator if op == "intra_class_loss" else [None])
    ]


def _problem(options: argparse.Namespace, device: torch.device, op: str, estimator: str | None) -> Problem:
    problem = Problem(
        op=op,
        estimator=estimator,
        device=device,
        dtype=DTYPES[options.dtype],
        pixels=1,
        dim=options.dim,
        classes=options.classes,
        layout=options.layout,
        resolution=options.resolution,
        ratio=options.ratio,
        per_class=options.per_class,
        keys=options.keys if op == "pair_logsumexp" else 0,
        temperature=options.temperature,
        seed=options.seed,
    )
    default = (PIXELS_OF_PAIRS if problem.every_pair else PIXELS)[device.type]
    return replace(problem, pixels=options.pixels or default)


def _implementations(problem: Problem, options: argparse.Namespace) -> list[Implementation]:
    return selected(implementations(problem), options.impl.split(","))


def _absent(problem: Problem, chosen: Sequence[Implementation]) -> dict[str, str]:
    """Our backends that have no row here, and why."""
    shown = {one.name for one in chosen}
    return {
        one.name: one.missing
        for one in implementations(problem)
        if one.kind == "ours" and one.missing is not None and one.name not in shown and one.name in backend.BACKENDS
    }


def _table(
    problem: Problem,
    chosen: Sequence[Implementation],
    ceilings: Ceilings,
    settings: Settings,
    absent: dict[str, str],
    end: float,
) -> list[Row]:
    """One problem's rows, each reported as it comes, and the whole once the peers are known."""
    rows: list[Row] = []
    answers = Answers()
    for one in chosen:
        if one.missing is None and time.monotonic() > end:
            rows.append(Row(problem, one, "left out", "the time is spent (--budget)"))
            continue
        if sys.stderr.isatty():
            print(f"\r{problem.op}: {one.name} ...".ljust(60), end="\r", file=sys.stderr, flush=True)
        rows.append(measure_row(problem, one, ceilings, settings, answers))
    compare_with_peers(rows)
    say(output.table_head(problem))
    for row in rows:
        say(output.table_row(row))
    say(output.table_foot(rows, absent) + "\n")
    return rows


def _growth(
    options: argparse.Namespace,
    problems: Sequence[Problem],
    rows: Sequence[Row],
    ceilings: dict[torch.dtype, Ceilings],
    settings: Settings,
    begun: float,
) -> list[growth.Series]:
    """The second table. On the CPU a peer that compiles for every size is left out: that would take all the time."""
    base = replace(problems[0], dtype=DTYPES[options.dtype])
    peers = [
        row
        for row in rows
        if row.times is not None
        and row.implementation.kind == "peer"
        and row.problem.estimator == "exact"
        and (base.device.type == "cuda" or not row.implementation.compiles)
    ]
    fastest = min(peers, key=lambda row: row.times.total if row.times else 0.0, default=None)
    name = None if fastest is None else fastest.name
    all_series = growth.series(base, options.growth_estimators, _by_default, name)
    settings = replace(
        settings, seconds=min(GROWTH_SECONDS, settings.seconds), least=1, memory=base.device.type == "cuda"
    )
    dtype = base.dtype
    measured = ceilings[dtype] if dtype in ceilings else measure(base.device, dtype)
    growth.run(all_series, measured, settings, begun + options.budget)
    say(output.growth_text(all_series) + "\n")
    return all_series


def _by_default(problem: Problem) -> Implementation:
    """Ours as a user gets it, on the backends that the device chooses by itself; named after the first of them."""
    ours = [one for one in implementations(problem) if one.name in backend.BACKENDS]
    there = {one.name: one for one in ours if one.missing is None}
    name = next(name for name in ("triton", "cuda", "cpp", "reference") if name in there)
    return replace(there[name], backend=None)


def _trace(target: Path, rows: Sequence[Row], device: torch.device) -> None:
    """One run of every timed row under torch's profiler, warmed up before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for row in rows:
        run_once(row.problem, row.implementation, make_inputs(row.problem), row.chunk)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        for row in rows:
            run_once(row.problem, row.implementation, make_inputs(row.problem), row.chunk)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        profile.export_chrome_trace(str(partial))
    say(f"trace: {target} (open it in ui.perfetto.dev)")


def _plot(
    options: argparse.Namespace, rows: Sequence[Row], all_series: Sequence[growth.Series], device: torch.device
) -> None:
    if options.no_plot:
        return
    reason = output.plot(options.plot, rows, all_series, device)
    say(reason or f"plot: {options.plot}")


def _write_json(
    options: argparse.Namespace,
    rows: Sequence[Row],
    missing: dict[str, dict[str, str]],
    all_series: Sequence[growth.Series],
    ceilings: dict[torch.dtype, Ceilings],
    device: torch.device,
    seconds: float,
) -> None:
    target = output.result_path(device, "loss_throughput") if options.json == NO_NAME else Path(options.json)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    given.pop("json")
    given["plot"] = given["trace"] = None  # where this run put them is nobody's business
    document = output.document(
        device=device,
        arguments=given,
        ceilings=ceilings,
        rows=rows,
        missing=missing,
        all_series=all_series,
        seconds=seconds,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        Path(partial).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    say(f"json: {target}")


def _list(names: Sequence[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of some of these names."""

    def read(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in found if name not in names]
        if unknown or not found:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}; expected some of {', '.join(names)}")
        return found

    return read


if __name__ == "__main__":
    sys.exit(main())
