"""Tables of segmentation scores: one run on the console, and several runs side by side on the console and as
Markdown. Rich alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from in2nect.metrics import SegmentationScores

_SUMMARIES = {"mIoU": "mean_iou", "mean F1": "mean_f1", "OA": "overall_accuracy"}


def scores_table(scores: SegmentationScores, names: Sequence[str], title: str) -> Table:
    """Per-class IoU, F1, precision, recall and share of the pixels, then mIoU, mean F1 and overall accuracy, in per
    cent.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for column in ("IoU", "F1", "precision", "recall", "pixels"):
        table.add_column(column, justify="right")
    share = scores.confusion.sum(1) / scores.confusion.sum()
    for row in zip(names, scores.iou, scores.f1, scores.precision, scores.recall, share, strict=True):
        table.add_row(row[0], *(percent(float(value)) for value in row[1:]))
    table.add_section()
    table.add_row("mean", percent(float(scores.mean_iou)), percent(float(scores.mean_f1)))
    table.add_row("overall accuracy", percent(float(scores.overall_accuracy)))
    return table


def comparison_rows(runs: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a column for each run.

    Args:
        runs: by name, `SegmentationScores.to_dict()` of the run, with a mapping `collapse` of collapse degrees where
            they were taken.
    """
    first = next(iter(runs.values()))
    rows = [
        [f"IoU {name}", *(percent(run["classes"][name]["iou"]) for run in runs.values())] for name in first["classes"]
    ]
    rows += [[label, *(percent(run[key]) for run in runs.values())] for label, key in _SUMMARIES.items()]
    for degree in first.get("collapse", {}):
        rows.append([degree, *(f"{run['collapse'][degree]:.4f}" for run in runs.values())])
    return ["", *runs], rows


def comparison_table(runs: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Several runs side by side on the console; `runs` as in `comparison_rows`."""
    head, rows = comparison_rows(runs)
    table = Table(title=title, title_justify="left")
    for position, column in enumerate(head):
        table.add_column(column, justify="right" if position else "left")
    for row in rows:
        if row[0] == next(iter(_SUMMARIES)):
            table.add_section()
        table.add_row(*row)
    return table


def comparison_markdown(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Several runs side by side as a Markdown table; `runs` as in `comparison_rows`."""
    head, rows = comparison_rows(runs)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def percent(value: float | None) -> str:
    """A share as a percentage with two digits; a dash where there is no value."""
    return "–" if value is None or value != value else f"{100 * value:.2f}"
