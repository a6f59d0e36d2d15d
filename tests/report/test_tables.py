"""Tables say what the scores are, and say nothing where there are none."""

import torch
from rich.console import Console

from in2nect.metrics import SegmentationScores
from in2nect.report.tables import comparison_markdown, comparison_table, percent, scores_table

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
