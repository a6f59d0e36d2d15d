"""What bench/estimator_error.py shows: aligned tables, checks of the default estimator, and a picture."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]

DEFAULT = "moments pooled"
SPREAD_FAMILIES = ("raw", "relu6")
# Of the default estimator at temperature 1: what docs/estimators.md promises.
GRADIENT_LIMIT, BIAS_LIMIT, TRAINED_LIMIT = 0.01, 5e-4, 0.03
_NAME = 28
_CELL = 28

LEGEND = (
    "Each cell is the relative error of the gradient (of random estimators the mean of several draws), and the\n"
    "relative bias of the loss ± its standard error. (refused): the package raises an error at this temperature, and\n"
    "the figure says why. `everything sampled` is not in the package: the loss of a sample, positives sampled too."
)

_COLORS = {"moments pooled": "#2f7d4f", "moments class": "#74b816", "exact": "#222222"}
_SAMPLED_COLORS = ("#f4a261", "#e76f51", "#b5382a", "#7a1f3d")
_EVERYTHING_COLOR = "#8d99ae"


def error_table(name: str, pixels: int, rows: Rows) -> str:
    """Estimators down, temperatures across."""
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    delta = rows[0]["delta_intra"]
    lines = [f"{name}: N = {pixels:,}, K = {rows[0]['classes']}, delta_intra {delta:.3f}"]
    lines.append("estimator".ljust(_NAME) + "".join(f"tau = {tau:g}".rjust(_CELL) for tau in temperatures))
    for estimator in dict.fromkeys(row["estimator"] for row in rows):
        cells = [_error_cell(row) for row in rows if row["estimator"] == estimator]
        lines.append(estimator.ljust(_NAME) + "".join(cell.rjust(_CELL) for cell in cells))
    return "\n".join(lines)


def cost_table(cost: Rows, name: str) -> str:
    lines = [f"cost on {name}, tau = 1: forward and backward"]
    lines.append("estimator".ljust(_NAME) + "ms".rjust(10) + "gradient error".rjust(18) + "of class sums".rjust(18))
    for row in cost:
        errors = [row["gradient_error"], row["class_gradient_error"]]
        cells = "".join(digits(error).rjust(18) for error in errors)
        lines.append(row["estimator"].ljust(_NAME) + digits(row["milliseconds"]).rjust(10) + cells)
    for model in ("moments pooled", "exact"):
        m = equal_per_class(cost, model)
        if m is not None:
            error = next(row["gradient_error"] for row in cost if row["per_class"] == m)
            lines.append(f"at the cost of {model}: sampled {m}, gradient error {digits(error)}")
    return "\n".join(lines)


def parameters_table(rows: Rows) -> str:
    """What is left of the error once the network has taken it to its parameters."""
    lines = [f"after the last step, on all {rows[0]['pixels']:,} pixels of a batch: relative error of the gradient"]
    heads = "".join(head.rjust(14) for head in ("pixels", "class sums", "parameters"))
    lines.append("estimator".ljust(_NAME) + "tau".rjust(8) + heads)
    for row in rows:
        errors = [row[key] for key in ("gradient_error", "class_gradient_error", "parameter_error")]
        cells = "".join(digits(error).rjust(14) for error in errors)
        lines.append(row["estimator"].ljust(_NAME) + f"{row['temperature']:g}".rjust(8) + cells)
    return "\n".join(lines)


def equal_per_class(cost: Rows, model: str) -> int | None:
    """The m of `sampled` whose cost is nearest to that of ``model``, as a ratio."""
    target = next((row["milliseconds"] for row in cost if row["estimator"] == model), None)
    sampled = [row for row in cost if row["per_class"] is not None]
    if target is None or not sampled:
        return None
    return min(sampled, key=lambda row: abs(math.log(row["milliseconds"] / target)))["per_class"]


def experiments_table(experiments: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["moments class with a sampled remainder: gradient error, and its parts"]
    lines.append("features".ljust(_NAME) + _across("tau", "m", "error", "bias", "noise", "remainder", width=16))
    for row in experiments["remainder"]:
        m = "none" if row["per_class"] is None else str(row["per_class"])
        parts = [digits(row[f"gradient_{part}"]) for part in ("error", "bias", "noise")]
        lines.append(
            row["features"].ljust(_NAME) + _across(f"{row['temperature']:g}", m, *parts, row["form"], width=16)
        )
    lines += ["", "sampled, without and with the delta method: bias of the loss ± standard error, and gradient error"]
    lines.append("features".ljust(_NAME) + _across("tau", "m", "bias", "corrected", "gradient", "corrected", width=20))
    for row in experiments["delta"]:
        biases = [f"{row[f'{name}_bias']:+.1e} ± {row[f'{name}_bias_error']:.0e}" for name in ("plain", "corrected")]
        gradients = [digits(row[f"{name}_gradient_error"]) for name in ("plain", "corrected")]
        lines.append(
            row["features"].ljust(_NAME)
            + _across(f"{row['temperature']:g}", str(row["per_class"]), *biases, *gradients, width=20)
        )
    return "\n".join(lines)


def checks(rows: Rows, estimator: str = DEFAULT) -> list[dict[str, Any]]:
    """Whether an estimator keeps what is promised of the default one at temperature 1, beside `sampled`."""
    at_one = [row for row in rows if row["temperature"] == 1.0]
    spreads = [row for row in at_one if row["family"] in SPREAD_FAMILIES]
    trained = [row for row in at_one if row["family"] == "trained"]
    found = [
        _check("gradient error over spreads, raw and ReLU6", spreads, estimator, "gradient_error", GRADIENT_LIMIT),
        _check("loss bias over spreads, raw and ReLU6", spreads, estimator, "bias", BIAS_LIMIT),
    ]
    if trained:
        found.append(_check("gradient error on UNetFormer", trained, estimator, "gradient_error", TRAINED_LIMIT))
    return found


def checks_table(found: Rows) -> str:
    lines = ["checks at tau = 1: the worst of the features named"]
    for check in found:
        verdict = "pass" if check["passed"] else "FAIL"
        beside = ", ".join(f"{name} {digits(value)}" for name, value in check["beside"].items())
        lines.append(
            f"{verdict}  {check['estimator']}, {check['name']}: {digits(check['worst'])} <= {check['limit']:g}"
        )
        lines.append(f"      beside it: {beside}")
    return "\n".join(lines)


def picture(target: Path, rows: Rows, cost: Rows, subject: str) -> str | None:
    """Four panels; the reason where matplotlib lacks."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no picture: {error}; pip install matplotlib"
    from in2nect.files import replacing

    names = _ordered(row["estimator"] for row in rows)
    style = _styles(names)
    figure = Figure(figsize=(11.6, 9.2), dpi=90, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.08))
    _over_spread(figure.add_subplot(grid[0, 0]), rows, names, style)
    _over_temperature(figure.add_subplot(grid[0, 1]), rows, names, style, subject)
    _over_features(figure.add_subplot(grid[1, 0]), rows, names, style)
    _over_cost(figure.add_subplot(grid[1, 1]), cost, style, subject)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=style[n][0], marker=style[n][1], markersize=6, label=n) for n in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        figure.savefig(partial)
    return None


def digits(value: float) -> str:
    """Three significant digits, without an exponent above 1e-4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def to_json(document: dict[str, Any]) -> str:
    """One line a row, so that hundreds of rows can be read and compared."""
    parts = []
    for key, value in rounded(document).items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value) + "\n]"
        parts.append(f'"{key}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def rounded(value: Any) -> Any:
    """Five significant digits, for JSON; what is not finite becomes None, since JSON knows no word for it."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _check(name: str, rows: Rows, estimator: str, key: str, limit: float) -> dict[str, Any]:
    def worst(of: str) -> float:
        # a NaN is never the largest, and never passes
        values = [abs(row[key]) for row in rows if row["estimator"] == of]
        return math.nan if any(math.isnan(value) for value in values) else max(values, default=math.nan)

    beside = [row["estimator"] for row in rows if row["estimator"].startswith("sampled")]
    return {
        "name": name,
        "estimator": estimator,
        "worst": worst(estimator),
        "limit": limit,
        "passed": worst(estimator) <= limit,
        "beside": {other: worst(other) for other in dict.fromkeys(beside)},
    }


def _error_cell(row: dict[str, Any]) -> str:
    error = digits(row["gradient_error"])
    if row["refused"]:
        return f"{error} (refused)"
    bias = f"{row['bias']:+.0e}"
    return f"{error}  {bias}" + (f" ± {row['bias_error']:.0e}" if row["bias_error"] is not None else " " * 8)


def _across(*cells: str, width: int = 12) -> str:
    return "".join(cell.rjust(8 if position < 2 else width) for position, cell in enumerate(cells))


def _ordered(names: Iterable[str]) -> list[str]:
    """moments, `sampled` by m, the rest."""

    def place(name: str) -> tuple[int, int]:
        kind, _, m = name.partition(" ")
        return {"moments": 0, "sampled": 1}.get(kind, 2), int(m) if m.isdigit() else 0

    return sorted(dict.fromkeys(names), key=place)


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker; `sampled` darkens with m."""
    found, shades = {}, itertools.cycle(_SAMPLED_COLORS)
    for name in names:
        if name.startswith("sampled"):
            found[name] = next(shades), "o"
        elif name in _COLORS:
            found[name] = _COLORS[name], "s" if name == DEFAULT else "D"
        else:
            found[name] = _EVERYTHING_COLOR, "x"
    return found


def _over_spread(axes: Any, rows: Rows, names: Sequence[str], style: dict[str, tuple[str, str]]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name in names:
        for family, line in zip(SPREAD_FAMILIES, ("-", "--")):
            chosen = [r for r in rows if r["estimator"] == name and r["family"] == family and r["temperature"] == 1.0]
            color, marker = style[name]
            axes.plot(
                [row["spread"] for row in chosen],
                [row["gradient_error"] for row in chosen],
                color=color,
                linestyle=line,
                marker=marker,
                markersize=4,
                linewidth=1.5,
            )
    _finish(axes, "Well to badly collapsed, tau = 1; dashed: after ReLU6", "spread within the classes")
    ticks = sorted({row["spread"] for row in rows if row["spread"] is not None})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_ylabel("relative error of the gradient", fontsize=9)


def _over_temperature(
    axes: Any, rows: Rows, names: Sequence[str], style: dict[str, tuple[str, str]], subject: str
) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    other = next((row["features"] for row in rows if row["spread"] == 1.0), subject)
    for name, (features, line) in itertools.product(names, {subject: "-", other: "--"}.items()):
        chosen = [row for row in rows if row["estimator"] == name and row["features"] == features]
        color, marker = style[name]
        x, y = [row["temperature"] for row in chosen], [row["gradient_error"] for row in chosen]
        axes.plot(x, y, color=color, linewidth=1.5, linestyle=line)
        for refused, fill in ((False, color), (True, "white")):
            points = [(a, b) for a, b, row in zip(x, y, chosen) if row["refused"] == refused]
            axes.plot(
                [a for a, _ in points],
                [b for _, b in points],
                color=color,
                marker=marker,
                markersize=5,
                markerfacecolor=fill,
                linestyle="none",
            )
    dashed = f"; dashed: {other}" if other != subject else ""
    _finish(axes, f"{subject}{dashed}; hollow: refused", "temperature tau")
    ticks = sorted({row["temperature"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.invert_xaxis()


def _over_features(axes: Any, rows: Rows, names: Sequence[str], style: dict[str, tuple[str, str]]) -> None:
    chosen = [row for row in rows if row["family"] not in SPREAD_FAMILIES and row["temperature"] == 1.0]
    sets = list(dict.fromkeys(row["features"] for row in chosen))
    for name in names:
        color, marker = style[name]
        points = [(row["gradient_error"], sets.index(row["features"])) for row in chosen if row["estimator"] == name]
        axes.plot(
            [a for a, _ in points], [b for _, b in points], color=color, marker=marker, markersize=5, linestyle="none"
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_per_cent)
    _finish(axes, "Other features, tau = 1", "relative error of the gradient")
    axes.set_yticks(range(len(sets)), sets)
    axes.set_ylim(len(sets) - 0.5, -0.5)


def _over_cost(axes: Any, cost: Rows, style: dict[str, tuple[str, str]], subject: str) -> None:
    sampled = [row for row in cost if row["per_class"] is not None and row["gradient_error"] > 1e-5]
    for key, line in (("gradient_error", "-"), ("class_gradient_error", "--")):
        axes.plot(
            [row["milliseconds"] for row in sampled],
            [row[key] for row in sampled],
            color=_SAMPLED_COLORS[1],
            linestyle=line,
            marker="o",
            markersize=5,
            linewidth=1.5,
        )
    for row in cost:
        if row["estimator"].startswith("moments"):
            color, marker = style[row["estimator"]]
            axes.plot(row["milliseconds"], row["gradient_error"], color=color, marker=marker, markersize=7, zorder=3)
            axes.plot(
                row["milliseconds"],
                row["class_gradient_error"],
                color=color,
                marker=marker,
                markersize=7,
                markerfacecolor="white",
            )
    for row in sampled:
        axes.annotate(
            f"m = {row['per_class']:,}",
            (row["milliseconds"], row["gradient_error"]),
            textcoords="offset points",
            xytext=(7, 4),
            fontsize=8.5,
            color=_SAMPLED_COLORS[2],
        )
    exact = next(row for row in cost if row["estimator"] == "exact")
    axes.axvline(exact["milliseconds"], color=_COLORS["exact"], linestyle=":", linewidth=1.2)
    axes.text(exact["milliseconds"], 0.02, " exact", transform=axes.get_xaxis_transform(), fontsize=8.5)
    axes.set_yscale("log")
    _finish(axes, f"{subject}, tau = 1; dashed, hollow: class sums", "ms: forward and backward")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:,g}" if str(value)[0] in "25" else "")
    axes.margins(x=0.12)


def _finish(axes: Any, title: str, x: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(_per_cent)
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(axis="both", which="both", labelsize=8.5)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)


def _per_cent(value: float, _: int) -> str:
    return f"{100 * value:g} %"
