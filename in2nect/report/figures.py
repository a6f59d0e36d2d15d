"""The comparison picture: a scene beside its labels and every run's prediction, IoU per class, losses, and how far
the class means have collapsed. And the confusion matrix of one run.

matplotlib without a display, and without pyplot's global state. About two seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, GridSpecBase
from matplotlib.patches import Patch
from numpy.typing import NDArray

from in2nect.data.classes import Classes
from in2nect.files import replacing

Curve = Sequence[tuple[int, float]]
"""(step, value) pairs."""

_RUN_COLORS = ("#8c8c8c", "#c44e52", "#4c72b0", "#55a868")  # first the baseline, which stands back
_IGNORED = (0, 0, 0)
_SMOOTHING = 0.8  # of the exponential mean that is drawn over the raw losses
_FONT = 9
_CELL = 0.86  # inches: eleven characters, the pixels of a whole data set, in the font of its count
_LARGEST_MATRIX = 22.0  # inches; beyond it, at 26 classes, cells are too small to write in
_NOTHING = "#dddddd"  # a class that is not labelled has no shares


@dataclass(frozen=True)
class RunFigures:
    """What is drawn of a run.

    Attributes:
        prediction: uint8 (H, W) class codes of the scene.
        iou: per class, NaN where there is none.
        mean_iou: their mean.
        curves: by name, the loss terms: seg, inter, intra.
        cosines: (K, K) between centred class means.
        delta_inter: the run's inter-class collapse degree.
    """

    prediction: NDArray[np.uint8]
    iou: Sequence[float]
    mean_iou: float
    curves: Mapping[str, Curve]
    cosines: NDArray[np.float64]
    delta_inter: float


def comparison_figure(
    target: str | Path,
    *,
    image: NDArray[np.uint8],
    label: NDArray[np.uint8],
    runs: Mapping[str, RunFigures],
    frequencies: Sequence[float],
    classes: Classes,
    title: str,
) -> None:
    """Draws runs beside one another and writes the picture.

    Args:
        target: the picture; its suffix chooses the format.
        image: (H, W, 3) of the scene.
        label: (H, W) class codes, `classes.ignore_index` where unlabelled.
        runs: by name, the baseline first; at most four.
        frequencies: each class's share of the test pixels.
        classes: names and colours.
        title: one line above everything.
    """
    figure = Figure(figsize=(4.2 * (2 + len(runs)), 9.8), dpi=110)
    margins = {"left": 0.035, "right": 0.965, "top": 0.9, "bottom": 0.1}
    rows = GridSpec(2, 1, figure=figure, height_ratios=[1.25, 1], hspace=0.26, **margins)
    pictures = rows[0].subgridspec(1, 2 + len(runs), wspace=0.04)
    captions = ["image", "labels", *(f"{name}: mIoU {100 * run.mean_iou:.1f} %" for name, run in runs.items())]
    painted = [image, *(paint(codes, classes) for codes in (label, *(run.prediction for run in runs.values())))]
    for position, (caption, picture) in enumerate(zip(captions, painted, strict=True)):
        _picture(figure.add_subplot(pictures[position]), picture, caption)
    _legend(figure, classes)
    charts = rows[1].subgridspec(1, 3, width_ratios=[2.0, 1.0, 0.62], wspace=0.2)
    _iou_bars(figure.add_subplot(charts[0]), runs, frequencies, classes)
    _losses(figure, charts[1].subgridspec(2, 1, hspace=0.45), runs)
    _cosines(figure, charts[2].subgridspec(len(runs), 2, width_ratios=[1, 0.05], hspace=0.2, wspace=0.1), runs, classes)
    figure.suptitle(title, x=0.04, y=0.972, ha="left", fontsize=14, fontweight="bold")
    with replacing(target) as partial:
        figure.savefig(partial)


def confusion_figure(
    target: str | Path, *, confusion: NDArray[np.int64], names: Sequence[str], title: str, subtitle: str = ""
) -> None:
    """Draws a confusion matrix: coloured by the share of the labelled class (a row adds up to 100 %), with that share
    and the pixels written in each cell.

    Args:
        target: the picture; its suffix chooses the format.
        confusion: (K, K) pixels; row: labelled class, column: predicted class.
        names: of the classes.
        title, subtitle: above it; the second is small.
    """
    count = len(names)
    labelled = confusion.sum(1, keepdims=True)
    shares = np.divide(confusion, labelled, out=np.full(confusion.shape, np.nan), where=labelled > 0)
    side = max(3.0, min(_CELL * count, _LARGEST_MATRIX))
    figure = Figure(figsize=(side + 3.2, side + 2.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(_NOTHING)
    picture = axes.imshow(np.ma.masked_invalid(100 * shares), vmin=0, vmax=100, cmap="Blues")
    axes.set_xticks(range(count), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=_FONT)
    axes.set_yticks(range(count), names, fontsize=_FONT)
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(1, count) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, count) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    if _CELL * count <= _LARGEST_MATRIX:
        for (row, column), share in np.ndenumerate(shares):
            _cell(axes, row, column, share, int(confusion[row, column]))
    axes.set_title(subtitle, fontsize=_FONT, loc="left", color="#555555")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("% of the labelled class", fontsize=_FONT)
    bar.ax.tick_params(labelsize=_FONT)
    with replacing(target) as partial:
        figure.savefig(partial)


def paint(codes: NDArray[np.uint8], classes: Classes) -> NDArray[np.uint8]:
    """(H, W, 3) colours of (H, W) class codes; ignored pixels are black."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: classes.num_classes] = classes.colors
    palette[classes.ignore_index] = _IGNORED
    return palette[codes]


def smoothed(curve: Curve) -> list[float]:
    """Exponential mean of a curve's values, without the bias of its start."""
    mean = weight = 0.0
    result = []
    for _, value in curve:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        result.append(mean / weight)
    return result


def _cell(axes: Axes, row: int, column: int, share: float, pixels: int) -> None:
    color = "white" if share > 0.55 else "#222222"
    text = "–" if np.isnan(share) else f"{100 * share:.1f} %"
    axes.text(column, row - 0.13, text, ha="center", va="center", color=color, fontsize=_FONT)
    axes.text(column, row + 0.21, f"{pixels:,}", ha="center", va="center", color=color, fontsize=7.5)


def _picture(axes: Axes, picture: NDArray[np.uint8], caption: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(caption, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])


def _legend(figure: Figure, classes: Classes) -> None:
    handles = [
        Patch(facecolor=_unit(color), edgecolor="#555555", linewidth=0.6, label=name)
        for name, color in zip(classes.names, classes.colors, strict=True)
    ]
    figure.legend(handles=handles, loc="center", bbox_to_anchor=(0.5, 0.475), ncols=len(handles), frameon=False)


def _iou_bars(axes: Axes, runs: Mapping[str, RunFigures], frequencies: Sequence[float], classes: Classes) -> None:
    width = 0.8 / len(runs)
    centres = np.arange(classes.num_classes)
    for position, (name, run) in enumerate(runs.items()):
        heights = 100 * np.nan_to_num(np.asarray(run.iou, dtype=float))
        offset = (position - (len(runs) - 1) / 2) * width
        bars = axes.bar(centres + offset, heights, 0.94 * width, color=_RUN_COLORS[position], label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    ticks = [f"{name}\n{100 * share:.1f} %" for name, share in zip(classes.names, frequencies, strict=True)]
    axes.set_xticks(centres, ticks, fontsize=_FONT)
    axes.set_ylim(0, 109)
    axes.set_title("IoU per class, %  (below: share of the test pixels)", fontsize=11)
    axes.legend(frameon=False, loc="upper right", ncols=len(runs), fontsize=_FONT)
    _plain(axes)


def _losses(figure: Figure, cells: GridSpecBase, runs: Mapping[str, RunFigures]) -> None:
    above, below = figure.add_subplot(cells[0]), figure.add_subplot(cells[1])
    for position, (name, run) in enumerate(runs.items()):
        _curve(above, run.curves.get("seg", ()), _RUN_COLORS[position], name)
        _curve(below, run.curves.get("inter", ()), "#dd8452", f"inter-class, {name}")
        _curve(below, run.curves.get("intra", ()), "#8172b3", f"intra-class above its floor, {name}")
    above.set_title("segmentation loss", fontsize=11)
    below.set_title("losses on the representation", fontsize=11)
    below.set_xlabel("step", fontsize=_FONT)
    for axes in (above, below):
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
        _plain(axes)


def _curve(axes: Axes, curve: Curve, color: str, name: str) -> None:
    if not curve:
        return
    steps = [step for step, _ in curve]
    axes.plot(steps, [value for _, value in curve], color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(curve), color=color, linewidth=1.6, label=name)


def _cosines(figure: Figure, cells: GridSpecBase, runs: Mapping[str, RunFigures], classes: Classes) -> None:
    """Of a perfect simplex ETF, every entry off the diagonal is -1/(K-1)."""
    for position, (name, run) in enumerate(runs.items()):
        axes = figure.add_subplot(cells[position, 0])
        picture = axes.imshow(run.cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        last = position == len(runs) - 1
        axes.set_xticks(range(classes.num_classes), classes.names if last else [], rotation=90, fontsize=7)
        axes.set_yticks(range(classes.num_classes), classes.names, fontsize=7)
        axes.set_title(f"{name}: δ_inter {run.delta_inter:.3f}", fontsize=9)
        axes.tick_params(length=0)
    bar = figure.colorbar(picture, cax=figure.add_subplot(cells[:, 1]))
    target = -1 / (classes.num_classes - 1)
    bar.ax.axhline(target, color="black", linewidth=1.2)
    bar.set_label(f"cosine between centred class means\n(line: simplex ETF, {target:.2f})", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _unit(color: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
