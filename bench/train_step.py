"""What the losses add to a training step: one step of a host network with them against one without, in turns.

    python bench/train_step.py                                            2 x 512^2 on a CPU; a minute or two
    python bench/train_step.py --size 1024 --batch 16 --device cuda --json        table 4 of the paper, redone
    python bench/train_step.py --size 512 1024 --batch 1 2 4 8 16 --estimator moments sampled --resolution feature

The paper's table 4 reports 10.5 % more time an image with the losses, at 16 x 1024 x 1024. A step is what the trainer
does: forward under autocast, cross-entropy of the logits and of the auxiliary head, the losses in float32, backward,
optimiser. Images are random; labels are patches of long-tailed classes, some ignored. The network needs in2nect[train].
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

# Threads of libgomp that wait spin for long by default, and with other processes about take a core from them.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is loaded

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
try:
    import in2nect  # noqa: F401
except ImportError:
    sys.path.insert(0, str(ROOT))
try:
    import timm
except ImportError:
    sys.exit("train_step.py: the networks need timm; pip install 'in2nect[train]', or make setup")

import output  # noqa: E402
from arguments import positive  # noqa: E402
from output import say  # noqa: E402
from problems import DTYPE_NAMES, DTYPES  # noqa: E402
from rows import failure  # noqa: E402
from timing import extra_memory, settle_allocator, time_in_turns  # noqa: E402

from in2nect.files import write_json  # noqa: E402
from in2nect.loss import In2NeCTLoss  # noqa: E402
from in2nect.models import TrainingOutput, create_model, list_models  # noqa: E402
from in2nect.ops import backend  # noqa: E402
from in2nect.tap import RepresentationTap  # noqa: E402
from in2nect.training.losses import SegmentationLoss  # noqa: E402
from in2nect.training.settings import LossSettings, OptimizerSettings  # noqa: E402

ESTIMATORS: dict[str, dict[str, str]] = {
    "moments": {"estimator": "moments"},
    "moments_class": {"estimator": "moments", "covariance": "class"},
    "sampled": {"estimator": "sampled"},
    "exact": {"estimator": "exact"},
}
DEFAULT_ESTIMATORS = {"cpu": ["moments"], "cuda": list(ESTIMATORS)}
RESOLUTIONS = ("feature", "label")
SIZES = {"cpu": [512], "cuda": [512, 1024]}
BATCHES = {"cpu": [2], "cuda": [16]}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
EXACT_PIXELS = {"cpu": 32_768, "cuda": 1_048_576}  # whose square exact costs
SECONDS = {"cpu": 10.0, "cuda": 5.0}  # of rounds a row
BUDGET = {"cpu": 100.0, "cuda": 900.0}
WARM_UPS = {"cpu": 1, "cuda": 3}  # steps in which memory is got, and algorithms are chosen
LEAST_ROUNDS = 3
PATCH = 32  # pixels a side, about, of the label map's patches
IGNORED = 0.05  # of the pixels
IGNORE_INDEX = 255
NO_NAME = ""  # of --json


@dataclass(frozen=True)
class Case:
    """A network at one size."""

    network: str
    encoder: str | None
    size: int
    batch: int
    device: torch.device
    dtype: torch.dtype  # of the forward pass; weights and losses are in float32
    layout: str
    compiled: bool
    optimizer: str
    classes: int
    seed: int


@dataclass
class Row:
    """A pair of tasks that were timed in turns: `without` the losses and `with_` them (or the tap)."""

    case: Case
    task: str  # "step" or "inference"
    estimator: str | None = None
    resolution: str | None = None
    pixels: int | None = None  # N of the losses, ignored ones included
    status: str = "failed"  # or "timed", "wrong", "out of memory", "left out"
    why: str | None = None
    without_ms: list[float] = field(default_factory=list)  # one a round, as the next two
    with_ms: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)  # forward and backward of the losses on their own
    without_bytes: int | None = None
    with_bytes: int | None = None
    memory_how: str | None = None
    outputs_equal: bool | None = None  # of inference

    @property
    def name(self) -> str:
        return "inference, tapped" if self.task == "inference" else f"{self.estimator}, {self.resolution}"

    def overhead(self) -> dict[str, float] | None:
        """Percent that `with_` takes more: quartiles of the rounds' ratios."""
        if not self.with_ms:
            return None
        return quartiles([100 * (b / a - 1) for a, b in zip(self.without_ms, self.with_ms, strict=True)])

    def share(self) -> float | None:
        """Percent of the step with the losses that they take on their own."""
        if not self.alone_ms:
            return None
        return 100 * median(self.alone_ms) / median(self.with_ms)

    def to_json(self) -> dict[str, Any]:
        case = asdict(self.case) | {"device": str(self.case.device), "dtype": DTYPE_NAMES[self.case.dtype]}
        own = {name: value for name, value in vars(self).items() if name != "case"}
        medians = {
            f"{name}_median": median(getattr(self, name)) if getattr(self, name) else None
            for name in ("without_ms", "with_ms", "alone_ms")
        }
        return case | own | medians | {"overhead_percent": self.overhead(), "alone_percent": self.share()}


class Host:
    """A network with its optimiser and one batch, trained as ``in2nect.training.module`` does it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(case.seed)
        model = create_model(case.network, case.classes, encoder=case.encoder)
        self.model = model.to(case.device, memory_format=LAYOUTS[case.layout])  # type: ignore[call-overload]
        self.settings = LossSettings()
        self.segmentation_loss = SegmentationLoss(self.settings, IGNORE_INDEX)
        generator = torch.Generator().manual_seed(case.seed)
        images = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
        self.images = images.to(case.device, memory_format=LAYOUTS[case.layout])
        self.labels = make_labels(case, generator).to(case.device)
        self.forward = torch.compile(model.forward_training) if case.compiled else model.forward_training
        settings, parameters = OptimizerSettings(), self.model.parameters()
        self.optimizer: torch.optim.Optimizer
        if case.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=settings.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)

    def criterion(self, estimator: str, resolution: str) -> In2NeCTLoss:
        options: dict[str, Any] = {**ESTIMATORS[estimator], "resolution": resolution}
        width = self.model.representation.width
        return In2NeCTLoss(self.case.classes, width, ignore_index=IGNORE_INDEX, **options).to(self.case.device)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        enabled = enabled and self.case.dtype == torch.bfloat16
        return torch.autocast(self.case.device.type, torch.bfloat16, enabled=enabled)

    def loss(self, criterion: nn.Module | None) -> Tensor:
        """The forward half of a step."""
        with self.autocast():
            result: TrainingOutput = self.forward(self.images)
        total = self.segmentation_loss(result.logits.float(), self.labels)
        if result.auxiliary is not None:
            auxiliary = self.segmentation_loss.cross_entropy(result.auxiliary.float(), self.labels)
            total = total + self.settings.auxiliary_weight * auxiliary
        if criterion is not None:
            total = total + criterion(result.features.float(), self.labels).total
        return total

    def update(self, total: Tensor) -> None:
        """The backward half. Gradients are dropped where Lightning drops them, behind the forward pass."""
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()

    def step(self, criterion: nn.Module | None) -> Tensor:
        total = self.loss(criterion)
        self.update(total)
        return total.detach()

    def features(self) -> Tensor:
        """The representation of the batch, cut off from the network; eager, since without gradients it would be
        compiled once more."""
        with torch.no_grad(), self.autocast():
            return self.model.forward_training(self.images).features.detach()

    def memory(self, criterion: nn.Module | None) -> tuple[int | None, str]:
        """Bytes at the peak of a step beyond what there is between steps: weights, gradients, optimiser, batch."""

        def backward(_: Any, totals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self.update(totals[0])
            return ()

        return extra_memory(lambda _: (self.loss(criterion),), backward, None, self.case.device)  # type: ignore[arg-type]


def make_labels(case: Case, generator: torch.Generator) -> Tensor:
    """(B, size, size) uint8: smooth random fields, a class each, of which the highest wins; class k has odds of about
    1 / (k + 1). A field more tells the ignored pixels."""
    cells = math.ceil(case.size / PATCH) + 1
    fields = torch.randn(case.batch, case.classes + 1, cells, cells, generator=generator)
    odds = 1.0 / torch.arange(1, case.classes + 1)
    fields[:, :-1] += odds.log()[:, None, None] / 2
    labels = torch.empty(case.batch, case.size, case.size, dtype=torch.uint8)
    for label, one in zip(labels, fields):  # an image at a time: the fields of 16 x 1024^2 would be half a GiB
        fine = nn.functional.interpolate(one[None], size=label.shape, mode="bilinear", align_corners=False)[0]
        label.copy_(fine[:-1].argmax(0))
        edge = fine[-1].flatten().kthvalue(math.ceil((1 - IGNORED) * label.numel())).values
        label[fine[-1] > edge] = IGNORE_INDEX
    return labels


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; 1 where nothing could be timed, or the tap changed what a network predicts."""
    begun = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        settle_allocator()
    versions = output.versions()
    say(f"{output.device_name(device)}: torch {versions['torch']}, in2nect {versions['in2nect']}\n")
    rows: list[Row] = []
    for case in _cases(options, device):
        rows += measure_case(case, options, begun + options.budget)
    say(LEGEND)
    if options.json is not None:
        _write_json(options, rows, device, time.monotonic() - begun)
    say(f"{time.monotonic() - begun:.0f} s in all")
    return int(any(row.status == "wrong" for row in rows) or not any(row.status == "timed" for row in rows))


def measure_case(case: Case, options: argparse.Namespace, end: float) -> list[Row]:
    """The table of a network at one size, each row shown as it comes."""
    if case.compiled:
        torch.compiler.reset()  # sizes are compiled one by one, and torch gives up after eight
    steps = [
        Row(case, "step", estimator, resolution) for resolution in options.resolution for estimator in options.estimator
    ]
    inference = Row(case, "inference")
    host: Host | None = None
    say(f"{_title(case)}\n{_HEAD}")
    for row in (*steps, inference):
        if time.monotonic() > end:
            row.status, row.why = "left out", "the time is spent (--budget)"
        else:
            try:
                host = host or Host(case)
                if row.task == "step":
                    _measure_step(row, host, options)
                else:
                    _measure_inference(row, host, options)
            except Exception as error:
                row.status, row.why = failure(error)
                host = None  # it may be in the middle of a step
            gc.collect()
            if case.device.type == "cuda":
                torch.cuda.empty_cache()
        say(table_row(row))
    say("")
    return [*steps, inference]


def _measure_step(row: Row, host: Host, options: argparse.Namespace) -> None:
    case = row.case
    assert row.estimator is not None and row.resolution is not None
    features = host.features().requires_grad_()
    grid = host.labels if row.resolution == "label" else features[:, 0]
    row.pixels = grid.numel()
    if row.estimator == "exact" and row.pixels > options.exact_pixels:
        row.status, row.why = "left out", f"every pair of {row.pixels:,} pixels; more than --exact-pixels"
        return
    criterion = host.criterion(row.estimator, row.resolution)

    def alone() -> None:
        torch.autograd.grad(criterion(features.float(), host.labels).total, features)

    tasks = [lambda: host.step(None), lambda: host.step(criterion), alone]
    _warm_up(tasks, case.device)
    times = time_in_turns(tasks, case.device, **_rounds(options))
    row.without_ms, row.with_ms, row.alone_ms = ([one[i] for one in times] for i in range(3))
    if not math.isfinite(float(host.step(criterion))):
        row.why = "the loss of the network is not finite"
        return
    row.without_bytes, row.memory_how = host.memory(None)
    row.with_bytes, _ = host.memory(criterion)
    row.status = "timed"


def _measure_inference(row: Row, host: Host, options: argparse.Namespace) -> None:
    plain = copy.deepcopy(host.model).eval()
    tapped = host.model.eval()
    tap = RepresentationTap(tapped)
    try:
        with torch.inference_mode(), host.autocast():
            tasks = [lambda: plain(host.images), lambda: tapped(host.images)]
            row.outputs_equal = torch.equal(*(task() for task in tasks))
            _warm_up(tasks, row.case.device)
            times = time_in_turns(tasks, row.case.device, **_rounds(options))
    finally:
        tap.remove()
    row.without_ms, row.with_ms = ([one[i] for one in times] for i in range(2))
    row.status = "timed" if row.outputs_equal else "wrong"
    row.why = None if row.outputs_equal else "the tapped network gives other logits"


def _warm_up(tasks: Sequence[Callable[[], object]], device: torch.device) -> None:
    for _ in range(WARM_UPS[device.type]):
        for task in tasks:
            task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rounds(options: argparse.Namespace) -> dict[str, Any]:
    return {"seconds": options.seconds, "least": min(LEAST_ROUNDS, options.rounds), "most": options.rounds}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile, interpolated."""
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double())
    return dict(zip(("q25", "median", "q75"), found.tolist()))


def median(values: Sequence[float]) -> float:
    return quartiles(values)["median"]


_NAME = 24
_COLUMNS = (
    ("N", 11),
    ("without ms", 12),
    ("with ms", 10),
    ("overhead %", 27),
    ("alone ms", 10),
    ("share %", 8),
    ("MiB", 8),
    ("more", 8),
)
_HEAD = "losses, resolution".ljust(_NAME) + "".join(name.rjust(width) for name, width in _COLUMNS)
LEGEND = (
    "without, with: a step without and with the losses; medians of rounds in which they take turns. overhead: median\n"
    "of the rounds' ratios, and their quartiles. alone: the losses' forward and backward on features cut off from the\n"
    "network, and their share of the step with them. N: pixels of the losses. MiB: the peak of a step without the\n"
    "losses, beyond weights, gradients, optimiser and batch; more: what they add. inference: the network in eval\n"
    "mode with a tap on it and without, whose logits must be the same bit for bit."
)


def _title(case: Case) -> str:
    how = "compiled" if case.compiled else "eager"
    return (
        f"{case.network}, {case.encoder or 'its own encoder'}: {case.batch} x 3 x {case.size} x {case.size}, "
        f"{DTYPE_NAMES[case.dtype]}, {case.layout}, {case.optimizer}, K = {case.classes}, {how}"
    )


def table_row(row: Row) -> str:
    """One line, or more where a reason is long."""
    overhead = row.overhead()
    if row.status != "timed" or overhead is None:
        return output.wrapped(row.name.ljust(_NAME), f"  {row.status}: {row.why}")
    share = row.share()
    more = None if row.with_bytes is None or row.without_bytes is None else row.with_bytes - row.without_bytes
    cells = [
        "-" if row.pixels is None else f"{row.pixels:,}",
        output.digits(median(row.without_ms)),
        output.digits(median(row.with_ms)),
        f"{overhead['median']:+.1f} ({overhead['q25']:+.1f} to {overhead['q75']:+.1f})",
        "-" if share is None else output.digits(median(row.alone_ms)),
        "-" if share is None else f"{share:.1f}",
        "-" if row.without_bytes is None else f"{row.without_bytes / 2**20:,.0f}",
        "-" if more is None else f"{more / 2**20:+,.0f}",
    ]
    return row.name.ljust(_NAME) + "".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS))


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    case = Case(
        network=options.network,
        encoder=options.encoder,
        size=1,
        batch=1,
        device=device,
        dtype=DTYPES[options.dtype],
        layout=options.layout,
        compiled=options.compile,
        optimizer=options.optimizer,
        classes=options.classes,
        seed=options.seed,
    )
    return [replace(case, size=size, batch=batch) for size in options.size for batch in options.batch]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_step.py",
        description=__doc__,
        epilog=f"the columns:\n{LEGEND}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--network", default="unetformer", metavar="NAME", help="the host (default: %(default)s)")
    what.add_argument(
        "--encoder",
        metavar="NAME",
        help="timm's name of its encoder (default: the network's own; unetformer: resnet18)",
    )
    what.add_argument("--size", type=positive, nargs="+", metavar="S", help=_by_device(SIZES, "side of the images"))
    what.add_argument("--batch", type=positive, nargs="+", metavar="B", help=_by_device(BATCHES, "images a step"))
    what.add_argument("--classes", type=positive, default=7, metavar="K", help="long-tailed (default: %(default)s)")
    what.add_argument(
        "--optimizer", choices=("adamw", "sgd"), default="adamw", help="with momentum, if sgd (default: %(default)s)"
    )
    what.add_argument("--seed", type=int, default=0, help="of weights, images and labels (default: %(default)s)")
    losses = parser.add_argument_group("with which losses; a row for each estimator and resolution")
    losses.add_argument(
        "--estimator",
        nargs="+",
        choices=tuple(ESTIMATORS),
        help="of the intra-class loss; moments_class: with a covariance a class (default: moments; on cuda, all)",
    )
    losses.add_argument(
        "--resolution",
        nargs="+",
        choices=RESOLUTIONS,
        default=list(RESOLUTIONS),
        help="where the losses count pixels: at the feature grid, or at the labels, as the paper (default: both)",
    )
    losses.add_argument(
        "--exact-pixels", type=positive, metavar="N", help=_by_device(EXACT_PIXELS, "leave exact out above N pixels")
    )
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), help="where it is trained (default: cuda where there is one)")
    how.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="of the forward pass; bf16 is autocast's (default: bf16 on cuda, fp32 on cpu)",
    )
    how.add_argument(
        "--layout", choices=tuple(LAYOUTS), default="channels_last", help="memory format (default: %(default)s)"
    )
    how.add_argument(
        "--compile",
        action="store_true",
        help="compile the forward pass of the step with torch.compile, as the trainer's model.compile; inference is "
        "timed as it is. On a CPU that takes minutes a size: raise --budget",
    )
    how.add_argument("--seconds", type=float, metavar="S", help=_by_device(SECONDS, "of rounds a row"))
    how.add_argument(
        "--rounds",
        type=positive,
        default=50,
        metavar="R",
        help=f"a row, at most; {LEAST_ROUNDS} at least (default: %(default)s)",
    )
    how.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help=_by_device(BUDGET, "seconds in all, beyond which no row is begun, and rows say so"),
    )
    kept = parser.add_argument_group("what is kept")
    kept.add_argument(
        "--json",
        nargs="?",
        const=NO_NAME,
        metavar="FILE",
        help="every time of every round, with machine, versions and arguments; without a name "
        "bench/results/YYYY-MM-DD-DEVICE-train_step.json (default: nothing is kept)",
    )
    return parser


def _by_device(defaults: dict[str, Any], text: str) -> str:
    def shown(value: Any) -> str:
        return " ".join(str(one) for one in value) if isinstance(value, list) else f"{value:g}"

    return f"{text} (default: {shown(defaults['cpu'])} on cpu, {shown(defaults['cuda'])} on cuda)"


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in what depends on the device, and refuse what cannot be."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; --device cpu runs everywhere")
    for name, defaults in (
        ("size", SIZES),
        ("batch", BATCHES),
        ("estimator", DEFAULT_ESTIMATORS),
        ("exact_pixels", EXACT_PIXELS),
        ("seconds", SECONDS),
        ("budget", BUDGET),
    ):
        if getattr(options, name) is None:
            setattr(options, name, defaults[options.device])
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    if options.network not in list_models():
        parser.error(f"--network {options.network}: expected one of {', '.join(list_models())}")
    if options.classes < 2:
        parser.error(f"--classes {options.classes}: the losses compare classes and need at least 2")
    if options.device == "cuda" and backend.interpreted():
        parser.error("TRITON_INTERPRET=1 is set: Triton's kernels would be interpreted. Unset it")


def _write_json(options: argparse.Namespace, rows: Sequence[Row], device: torch.device, seconds: float) -> None:
    target = output.result_path(device, "train_step") if options.json == NO_NAME else Path(options.json)
    given = {name: value for name, value in vars(options).items() if name != "json"}
    document = output.heading("train_step", device, given, seconds)
    document["versions"]["timm"] = timm.__version__
    write_json(target, output.finite(document | {"rows": [row.to_json() for row in rows]}))
    say(f"json: {target}")


if __name__ == "__main__":
    sys.exit(main())
