"""Tables of segmentation scores: one run on the console and as CSV, and several runs side by side on the console and
as Markdown. Rich alone.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from in2nect.metrics import SegmentationScores

_SUMMARIES = {"mIoU": "mean_iou", "mean F1": "mean_f1", "OA": "overall_accuracy"}


def scores_table(scores: SegmentationScores, names: Sequence[str], title: str) -> Table:
    """Per-class IoU, F1, precision, recall and share of the pixels, then mIoU and AF of the protocol's classes (and,
    where it leaves some out, of all), and overall accuracy, in per cent.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for column in ("IoU", "F1", "precision", "recall", "pixels"):
        table.add_column(column, justify="right")
    share = scores.confusion.sum(1) / scores.confusion.sum()
    for row in zip(names, scores.iou, scores.f1, scores.precision, scores.recall, share, strict=True):
        table.add_row(row[0], *(percent(float(value)) for value in row[1:]))
    table.add_section()
    left_out = [name for name, part in zip(names, scores.averaged.tolist(), strict=True) if not part]
    without = f" without {', '.join(left_out)}" if left_out else ""
    table.add_row(f"mIoU, AF{without}", percent(float(scores.mean_iou)), percent(float(scores.mean_f1)))
    if left_out:
        table.add_row(
            f"mIoU, AF of all {len(names)}", percent(float(scores.mean_iou_all)), percent(float(scores.mean_f1_all))
        )
    table.add_row("OA, overall accuracy", percent(float(scores.overall_accuracy)))
    return table


def scores_csv(scores: SegmentationScores, names: Sequence[str]) -> str:
    """A row a class, then `mean` (of the classes that are averaged), `mean of all classes` and `all pixels`; fractions
    in full precision, empty where there is no value.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "averaged", "iou", "f1", "precision", "recall", "accuracy", "pixels"])
    columns = [scores.iou, scores.f1, scores.precision, scores.recall]
    pixels = scores.confusion.sum(1).tolist()
    for name, part, count, *values in zip(names, scores.averaged.tolist(), pixels, *columns, strict=True):
        writer.writerow([name, "yes" if part else "no", *map(_number, values), "", count])
    writer.writerow(["mean", "", _number(scores.mean_iou), _number(scores.mean_f1), "", "", "", ""])
    writer.writerow(["mean of all classes", "", _number(scores.mean_iou_all), _number(scores.mean_f1_all), *[""] * 4])
    writer.writerow(["all pixels", *[""] * 5, _number(scores.overall_accuracy), sum(pixels)])
    return text.getvalue()


def _number(value: Any) -> str:
    number = float(value)
    return "" if number != number else repr(number)


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
