"""Tables say what the scores are, and say nothing where there are none."""

import csv
import io

import torch
from rich.console import Console

from in2nect.metrics import SegmentationScores
from in2nect.report.tables import comparison_markdown, comparison_table, percent, scores_csv, scores_table

NAMES = ["field", "road", "water"]
SCORES = SegmentationScores.from_confusion(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))


def text(table: object) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_scores_table_has_a_row_a_class_and_a_dash_for_the_absent_one() -> None:
    lines = text(scores_table(SCORES, NAMES, "test")).splitlines()
    field, water = (next(line for line in lines if name in line) for name in ("field", "water"))
    assert field.replace("│", " ").split() == ["field", "75.00", "85.71", "100.00", "75.00", "50.00"]
    assert water.split().count("–") == 4
    assert any("overall accuracy" in line and "87.50" in line for line in lines)


def test_scores_table_says_what_a_mean_is_over() -> None:
    scores = SegmentationScores.from_confusion(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 2, 0]]), (True, True, False))
    lines = [line.replace("│", " ").split() for line in text(scores_table(scores, NAMES, "test")).splitlines()]
    assert ["mIoU,", "AF", "without", "water", "66.07", "79.22"] in lines
    assert ["mIoU,", "AF", "of", "all", "3", "44.05", "52.81"] in lines


def test_csv_has_a_row_a_class_and_the_means() -> None:
    rows = list(csv.reader(io.StringIO(scores_csv(SCORES, NAMES))))
    assert rows[0] == ["class", "averaged", "iou", "f1", "precision", "recall", "accuracy", "pixels"]
    assert rows[1] == ["field", "yes", "0.75", "0.8571428571428571", "1.0", "0.75", "", "4"]
    assert rows[3] == ["water", "yes", "", "", "", "", "", "0"]
    assert [row[0] for row in rows[4:]] == ["mean", "mean of all classes", "all pixels"]
    assert float(rows[4][2]) == float(SCORES.mean_iou) and rows[6][6:] == ["0.875", "8"]
    assert {len(row) for row in rows} == {8}


def test_comparison_puts_runs_side_by_side() -> None:
    other = SegmentationScores.from_confusion(torch.tensor([[4, 0, 0], [0, 4, 0], [0, 0, 0]]))
    runs = {
        "plain": {**SCORES.to_dict(NAMES), "collapse": {"delta_inter": 0.25}},
        "tuned": {**other.to_dict(NAMES), "collapse": {"delta_inter": 0.125}},
    }
    lines = comparison_markdown(runs).splitlines()
    assert lines[0] == "|  | plain | tuned |" and lines[1] == "| --- | ---: | ---: |"
    assert "| IoU field | 75.00 | 100.00 |" in lines
    assert "| IoU water | – | – |" in lines
    assert "| OA | 87.50 | 100.00 |" in lines
    assert "| delta_inter | 0.2500 | 0.1250 |" in lines
    assert "0.1250" in text(comparison_table(runs, "both"))


def test_percent() -> None:
    assert [percent(value) for value in (0.1234, None, float("nan"))] == ["12.34", "–", "–"]
