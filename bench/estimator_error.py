"""How far each estimator of the intra-class loss is from the exact one, in gradient and in loss, and what each costs.

    python bench/estimator_error.py                                tables, checks, a picture; 15 minutes on a core
    python bench/estimator_error.py --no-trained --pixels 4096     without a training; 2 minutes
    python bench/estimator_error.py --images DIR --classes-file configs/classes/dubai.yaml --train-steps 240 --json

It compares on synthetic features (well and badly collapsed, multimodal, few-dimensional, non-negative) and on those of
a UNetFormer that it trains for a moment. Errors are relative: |g - g_exact| / |g_exact| of the gradient with respect
to the features, (L - L_exact) / L_exact of the loss; random estimators are drawn several times. The noise of random
ones averages out over pixels: beside every pixel's gradient stands that of its sums over the classes. It ends with
checks of the default estimator, and with 1 where one fails. The training takes the extra `train`, the picture
matplotlib.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

# Threads of libgomp that wait spin for long by default, and with other processes about take a core from them.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is loaded

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
try:
    import in2nect  # noqa: F401
except ImportError:
    sys.path.insert(0, str(ROOT))

import estimator_report as report  # noqa: E402
import output  # noqa: E402
from distributions import FeatureSet, subsample, synthetic_sets  # noqa: E402
from estimators import (  # noqa: E402
    REMAINDERS,
    Estimator,
    Remainder,
    class_sums,
    draw,
    estimators,
    exact_log_d,
    exact_loss,
    mean_and_error,
    moments,
    relative_norm,
    sampled,
    sampled_by_hand,
    sampled_log_d,
    with_remainder,
)
from output import say  # noqa: E402
from problems import Inputs  # noqa: E402
from timing import settle_allocator, time_runs  # noqa: E402
from trained_features import TrainingSettings, trained_features  # noqa: E402

from in2nect import reference  # noqa: E402
from in2nect.files import replacing  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
TEMPERATURES = (1.0, 0.5, 0.3, 0.2)
PER_CLASS = (64, 256)
SWEEP = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # of m, for the cost
REMAINDER_PER_CLASS = (64, 256, 1024)
DELTA_PER_CLASS = (16, 64, 256)
DELTA_ANCHORS = 256  # a class; the bias of log D is a mean over them
DELTA_SEEDS = 200  # of keys
SECONDS = 1.0  # of runs a timed estimator
FOLDER = ROOT / "runs" / "bench"
NO_NAME = ""  # of --json


@dataclass(frozen=True)
class Exact:
    """The oracle's loss and gradient on a feature set."""

    loss: float
    gradient: Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 1 where a check of the default estimator fails."""
    begun = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    settle_allocator()
    device = torch.device("cpu")
    versions = output.versions()
    say(f"{output.device_name(device)}: torch {versions['torch']}, in2nect {versions['in2nect']}")
    sets, training, parameters = _feature_sets(options)
    subject = next((one for one in reversed(sets) if one.family == "trained"), None) or _by_name(sets, "spread 1")

    cost = measure_cost(subject, options.sweep, options.draws, options.seconds)
    say(report.cost_table(cost, subject.name) + "\n")
    compared = estimators(options.per_class) + equal_cost(cost, options.per_class)
    rows: list[dict[str, Any]] = []
    for features in sets:
        found = [row for tau in options.temperatures for row in compare(features, tau, compared, options.draws)]
        say(report.error_table(features.name, len(features.labels), found) + "\n")
        rows += found
    experiments = run_experiments(_experimental(sets, subject), options) if options.experiments else {}
    if experiments:
        say(report.experiments_table(experiments) + "\n")
    checks = report.checks(rows)
    say(report.checks_table(checks))
    seconds = time.monotonic() - begun
    if not options.no_picture:
        say(report.picture(options.picture, rows, cost, subject.name) or f"picture: {options.picture}")
    if options.json is not None:
        results = {
            "cost": cost,
            "rows": rows,
            "checks": checks,
            "training": training,
            "parameters": parameters,
            **experiments,
        }
        _write_json(options, device, versions, seconds, results)
    say(f"{seconds:.0f} s in all")
    return int(not all(check["passed"] for check in checks))


def compare(features: FeatureSet, tau: float, compared: Sequence[Estimator], draws: int) -> list[dict[str, Any]]:
    """One row an estimator: errors against the exact loss at this temperature."""
    exact = _exact(features, tau)
    about = {
        "features": features.name,
        "family": features.family,
        "spread": features.spread,
        "temperature": tau,
        "pixels": len(features.labels),
        "classes": features.classes,
        "delta_intra": _delta_intra(features),
        "exact_loss": exact.loss,
    }
    return [about | _errors(features, tau, one, exact, draws) for one in compared]


def measure_cost(features: FeatureSet, sweep: Sequence[int], draws: int, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of forward and backward, and gradient error, at temperature 1: `exact`, `moments` and `sampled` at
    several m, each m up to the first that takes every pixel."""
    z, y, k = features.features, features.labels, features.classes
    exact = _exact(features, 1.0)
    largest = int(torch.bincount(y).max())
    sizes = [m for position, m in enumerate(sweep) if position == 0 or sweep[position - 1] < largest]
    found = []
    oracle = Estimator("exact", lambda rows, labels, classes, tau, _: exact_loss(rows, labels, classes, tau))
    for one in [oracle, moments("pooled"), moments("class"), *(sampled(m) for m in sizes)]:
        generator = torch.Generator().manual_seed(0)

        def forward(inputs: Inputs, one: Estimator = one, draws: torch.Generator = generator) -> tuple[Tensor, ...]:
            return (one.loss(inputs.leaves[0], inputs.constants["labels"], k, 1.0, draws),)

        def backward(inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs[0], inputs.leaves)

        inputs = Inputs((z.clone().requires_grad_(),), {"labels": y}, None)
        times = time_runs(forward, backward, [inputs], z.device, seconds=seconds, least=3, most=200)
        errors = _errors(features, 1.0, one, exact, draws)
        found.append({"milliseconds": times.total, "repeats": times.repeats, **errors})
    return found


def equal_cost(cost: Sequence[dict[str, Any]], taken: Sequence[int]) -> list[Estimator]:
    """`sampled` at the m of the sweep whose cost is nearest to pooled moments', and to exact's; not again at an m that
    is taken already."""
    found: list[Estimator] = []
    for model in ("moments pooled", "exact"):
        m = report.equal_per_class(cost, model)
        if m is not None and m not in taken and m not in [one.per_class for one in found]:
            found.append(sampled(m))
    return found


def run_experiments(sets: Sequence[FeatureSet], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Both ideas on a few feature sets, at the highest temperature and at the lowest."""
    remainder, delta = [], []
    temperatures = sorted({max(options.temperatures), min(options.temperatures)}, reverse=True)
    for features in sets:
        for tau in temperatures:
            exact = _exact(features, tau)
            about = {"features": features.name, "temperature": tau}
            remainder += [about | row for row in _remainder(features, tau, exact, options)]
            delta += [about | row for row in _delta(features, tau, exact, options)]
    return {"remainder": remainder, "delta": delta}


def _remainder(features: FeatureSet, tau: float, exact: Exact, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Moments without and with a sampled remainder: how much of the gradient's error is bias, and how much is noise."""
    plain = moments("class")
    rows = [{"form": "none", "per_class": None, **_bias_and_noise(features, tau, plain.loss, exact, 1)}]
    for form, m in itertools.product(REMAINDERS, options.remainder_per_class):

        def loss(
            z: Tensor,
            y: Tensor,
            classes: int,
            tau: float,
            draws: torch.Generator,
            m: int = m,
            form: Remainder = form,
        ) -> Tensor:
            return with_remainder(z, y, classes, tau, m, draws, form=form)

        found = _bias_and_noise(features, tau, loss, exact, max(2, options.draws // 2))
        rows.append({"form": form, "per_class": m, **found})
    return rows


def _bias_and_noise(
    features: FeatureSet, tau: float, loss: Callable[..., Tensor], exact: Exact, draws: int
) -> dict[str, float]:
    gradients = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        gradients.append(
            _differentiated(
                lambda z, g=generator: loss(z, features.labels, features.classes, tau, g),  # type: ignore[misc]
                features.features,
            )[1]
        )
    mean = torch.stack(gradients).mean(0)
    error = sum(relative_norm(one - exact.gradient, exact.gradient) for one in gradients) / draws
    scatter = sum(relative_norm(one - mean, exact.gradient) ** 2 for one in gradients) / max(draws - 1, 1)
    bias = relative_norm(mean - exact.gradient, exact.gradient) ** 2 - scatter / draws  # the mean's own noise taken off
    return {"gradient_error": error, "gradient_bias": max(bias, 0.0) ** 0.5, "gradient_noise": scatter**0.5}


def _delta(features: FeatureSet, tau: float, exact: Exact, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Bias of log D over drawn keys without and with the correction, at fixed anchors; and the gradient's error."""
    y, classes = features.labels, features.classes
    u = reference.unit_rows(features.features)
    counts = torch.bincount(y, minlength=classes)
    anchors, _ = draw(y, classes, DELTA_ANCHORS, torch.Generator().manual_seed(1))
    wanted = exact_log_d(u, y, classes, tau)
    rows = []
    for m in options.delta_per_class:
        row: dict[str, Any] = {"per_class": m}
        for name, corrected in (("plain", False), ("corrected", True)):
            biases, errors = [], []
            for seed in range(options.delta_seeds):
                _, keys = draw(y, classes, m, torch.Generator().manual_seed(100 + seed))
                off = [
                    float((sampled_log_d(u[i], u, keys, counts, tau, corrected=corrected) - wanted[i]).mean())
                    for k, i in enumerate(anchors)
                    if counts[k] >= 2
                ]
                biases.append(sum(off) / exact.loss)
            for seed in range(options.draws):
                generator = torch.Generator().manual_seed(seed)
                _, gradient = _differentiated(
                    lambda z, m=m, g=generator, c=corrected: sampled_by_hand(z, y, classes, tau, m, g, corrected=c),  # type: ignore[misc]
                    features.features,
                )
                errors.append(relative_norm(gradient - exact.gradient, exact.gradient))
            row[f"{name}_bias"], row[f"{name}_bias_error"] = mean_and_error(biases)
            row[f"{name}_gradient_error"] = sum(errors) / len(errors)
        rows.append(row)
    return rows


def _errors(features: FeatureSet, tau: float, one: Estimator, exact: Exact, draws: int) -> dict[str, Any]:
    """Of every pixel's gradient, of its sums over the classes, where noise averages out, and of the loss."""
    errors, summed, biases = [], [], []
    exact_sums = class_sums(exact.gradient, features.labels, features.classes)
    for seed in range(draws if one.random else 1):
        generator = torch.Generator().manual_seed(seed)
        loss, gradient = _differentiated(
            lambda z, g=generator: one.loss(z, features.labels, features.classes, tau, g),  # type: ignore[misc]
            features.features,
        )
        off = gradient - exact.gradient
        errors.append(relative_norm(off, exact.gradient))
        summed.append(relative_norm(class_sums(off, features.labels, features.classes), exact_sums))
        biases.append((loss - exact.loss) / exact.loss)
    bias, bias_error = mean_and_error(biases)
    return {
        "estimator": one.name,
        "per_class": one.per_class,
        "refused": tau < one.lowest,
        "draws": len(errors),
        "gradient_error": mean_and_error(errors)[0],
        "class_gradient_error": mean_and_error(summed)[0],
        "bias": bias,
        "bias_error": bias_error,
    }


def _exact(features: FeatureSet, tau: float) -> Exact:
    return Exact(*_differentiated(lambda z: exact_loss(z, features.labels, features.classes, tau), features.features))


def _differentiated(loss: Callable[[Tensor], Tensor], features: Tensor) -> tuple[float, Tensor]:
    z = features.clone().requires_grad_()
    value = loss(z)
    return float(value.detach()), torch.autograd.grad(value, z)[0]


def _delta_intra(features: FeatureSet) -> float:
    y = features.labels
    return float(reference.collapse_degrees(features.features, y, features.classes)[1])


def _feature_sets(options: argparse.Namespace) -> tuple[list[FeatureSet], dict[str, Any] | None, list[dict[str, Any]]]:
    """All of them; and of the training what is known of it, and the errors in its parameters' gradient."""
    dtype = DTYPES[options.dtype]
    sets = synthetic_sets(options.pixels, options.dim, options.classes, options.seed, dtype)
    if options.no_trained:
        return sets, None, []
    name = "synthetic" if options.images is None else options.images.resolve().name
    settings = TrainingSettings(images=name, steps=options.train_steps, seed=options.seed)
    try:
        trained = trained_features(
            settings,
            folder=options.images,
            classes=options.classes_file,
            scratch=FOLDER / "estimator_error",
            cache=options.features_cache,
        )
    except ImportError as error:
        say(f"no trained features: {error}; pip install 'in2nect[train]', or --no-trained")
        return sets, None, []
    classes = len(trained.about["classes"])
    for one in trained.snapshots:
        rows, y = subsample(one.features, one.labels, options.pixels, options.seed)
        sets.append(FeatureSet(f"UNetFormer, step {one.step}", "trained", rows.to(dtype), y, classes))
    about = {"images": name, **trained.about}
    say(
        f"UNetFormer after {about['steps']} steps on {about['training_images']} images ({name}), "
        f"{about['training_seconds']:.0f} s: mIoU {about['test_mean_iou']:.1f} %\n"
    )
    say(report.parameters_table(trained.parameters) + "\n")
    return sets, about, trained.parameters


def _experimental(sets: Sequence[FeatureSet], subject: FeatureSet) -> list[FeatureSet]:
    names = ["spread 1", "16 modes a class"]
    return [one for one in sets if one.name in names] + ([subject] if subject.family == "trained" else [])


def _by_name(sets: Sequence[FeatureSet], name: str) -> FeatureSet:
    return next(one for one in sets if one.name == name)


def _write_json(
    options: argparse.Namespace,
    device: torch.device,
    versions: dict[str, Any],
    seconds: float,
    results: dict[str, Any],
) -> None:
    name = f"{date.today().isoformat()}-{output.slug(device)}-estimator_error.json"
    target = ROOT / "bench" / "results" / name if options.json == NO_NAME else Path(options.json)
    left_out = ("json", "images", "classes_file", "features_cache", "picture")  # where they lie is nobody's business
    given = {name: value for name, value in vars(options).items() if name not in left_out}
    document = {
        "schema": 1,
        "tool": "estimator_error",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": output.machine(device),
        "versions": versions,
        "arguments": given,
        "seconds": round(seconds, 1),
        **results,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        Path(partial).write_text(report.to_json(document))
    say(f"json: {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="estimator_error.py",
        description=__doc__,
        epilog=report.LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--temperatures",
        type=_numbers(float),
        default=list(TEMPERATURES),
        metavar="LIST",
        help=f"tau (default: {','.join(f'{t:g}' for t in TEMPERATURES)})",
    )
    what.add_argument(
        "--per-class",
        type=_numbers(int),
        default=list(PER_CLASS),
        metavar="LIST",
        help="m of `sampled`; besides, the m that cost what moments and what exact cost (default: "
        f"{_joined(PER_CLASS)})",
    )
    what.add_argument(
        "--sweep",
        type=_numbers(int),
        default=list(SWEEP),
        metavar="LIST",
        help=f"m of `sampled` whose costs are measured (default: {_joined(SWEEP)})",
    )
    what.add_argument(
        "--draws", type=int, default=8, metavar="S", help="of a random estimator, each by its own seed (default: 8)"
    )
    what.add_argument(
        "--experiments",
        action="store_true",
        help="two ideas that the package does not have: a sampled remainder of moments, and the delta method against "
        "the bias of the logarithm of sampled, at the highest and the lowest temperature; ten minutes more",
    )
    of_features = parser.add_argument_group("on which features")
    of_features.add_argument(
        "--pixels", type=int, default=16_384, metavar="N", help="rows of a feature set (default: %(default)s)"
    )
    of_features.add_argument(
        "--dim", type=int, default=64, metavar="D", help="of synthetic features (default: %(default)s)"
    )
    of_features.add_argument(
        "--classes", type=int, default=7, metavar="K", help="of synthetic features, long-tailed (default: %(default)s)"
    )
    of_features.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="of the features (default: %(default)s)"
    )
    of_features.add_argument("--seed", type=int, default=0, help="of features and training (default: %(default)s)")
    of_features.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="train UNetFormer on these: images/, labels/ and split.csv with splits train and test (default: synthetic "
        "scenes, drawn into runs/bench/estimator_error)",
    )
    of_features.add_argument(
        "--classes-file", type=Path, metavar="YAML", help="classes of --images (default: FOLDER/classes.yaml)"
    )
    of_features.add_argument(
        "--train-steps", type=int, default=100, metavar="N", help="of 8 crops of 256 x 256 (default: %(default)s)"
    )
    of_features.add_argument(
        "--features-cache",
        type=Path,
        metavar="FILE.npz",
        help="where the trained features are kept, and found again by a later call (default: nowhere)",
    )
    of_features.add_argument("--no-trained", action="store_true", help="synthetic features alone: nothing is trained")
    kept = parser.add_argument_group("what is kept, and how long it takes")
    kept.add_argument(
        "--json",
        nargs="?",
        const=NO_NAME,
        metavar="FILE",
        help="every figure, with machine, versions and arguments; without a name "
        "bench/results/YYYY-MM-DD-DEVICE-estimator_error.json (default: nothing is kept)",
    )
    kept.add_argument(
        "--picture",
        type=Path,
        default=FOLDER / "estimator_error.png",
        metavar="FILE.png",
        help="errors over spread, temperature, features and cost (default: runs/bench/estimator_error.png)",
    )
    kept.add_argument("--no-picture", action="store_true", help="draw nothing")
    kept.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help="of runs a timed estimator (default: %(default)g)"
    )
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    options.remainder_per_class, options.delta_per_class = list(REMAINDER_PER_CLASS), list(DELTA_PER_CLASS)
    options.delta_seeds = DELTA_SEEDS
    if options.classes < 2:
        parser.error(f"--classes {options.classes}: the losses compare classes and need at least 2")
    if options.pixels < 2 * options.classes:
        parser.error(f"--pixels {options.pixels}: {options.classes} classes need {2 * options.classes} at least")
    if options.dim < 2:
        parser.error(f"--dim {options.dim}: in one dimension unit rows are -1 or 1; give 2 or more")
    if options.draws < 1 or options.train_steps < 4:
        parser.error(f"--draws {options.draws}, --train-steps {options.train_steps}: expected 1 and 4 at least")
    if options.images is not None and not options.images.is_dir():
        parser.error(f"--images {options.images}: no such folder")
    if 1.0 not in options.temperatures:
        parser.error("--temperatures: the checks are at 1; add it to the list")


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A comma-separated list of positive numbers."""

    def read(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or min(values) <= 0:
            raise argparse.ArgumentTypeError(f"{text}; expected positive numbers, separated by commas")
        return values

    return read


def _joined(values: Sequence[int]) -> str:
    return ",".join(str(value) for value in values)


if __name__ == "__main__":
    sys.exit(main())
