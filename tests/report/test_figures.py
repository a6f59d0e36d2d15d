"""The comparison picture, its colours and its curves."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from in2nect.data.classes import Classes
from in2nect.report.figures import RunFigures, comparison_figure, confusion_figure, paint, smoothed

CLASSES = Classes(("field", "road", "water"), ((0, 128, 0), (128, 128, 128), (0, 0, 255)))


def test_paint_uses_the_palette_and_black_for_ignored_pixels() -> None:
    painted = paint(np.array([[0, 2], [1, 255]], dtype=np.uint8), CLASSES)
    assert painted.tolist() == [[[0, 128, 0], [0, 0, 255]], [[128, 128, 128], [0, 0, 0]]]


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert smoothed([(0, 2.0), (1, 2.0), (5, 2.0)]) == pytest.approx([2, 2, 2])
    assert smoothed([(0, 0.0), (1, 1.0)])[1] == pytest.approx(0.2 / 0.36)


def test_comparison_shows_every_prediction(tmp_path: Path) -> None:
    """Painted with the classes' colours: the first prediction is all field, the second all water."""
    curves = {"seg": [(0, 1.0), (1, 0.5)]}
    runs = {
        name: RunFigures(
            np.full((40, 50), code, dtype=np.uint8), [0.5, float("nan"), 0.2], 0.35, curves, np.eye(3), 0.1
        )
        for name, code in (("plain", 0), ("tuned", 2))
    }
    target = tmp_path / "report.png"
    image, label = np.full((40, 50, 3), 200, dtype=np.uint8), np.full((40, 50), 1, dtype=np.uint8)
    comparison_figure(
        target, image=image, label=label, runs=runs, frequencies=[0.5, 0.2, 0.3], classes=CLASSES, title="both"
    )
    pixels = (imread(target)[..., :3] * 255).round().astype(int)
    for color in ((200, 200, 200), (128, 128, 128), (0, 128, 0), (0, 0, 255)):
        assert (pixels == color).all(-1).mean() > 0.03, color
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


@pytest.mark.parametrize("count", [2, 7, 40])
def test_confusion_is_coloured_by_row(count: int, tmp_path: Path) -> None:
    """Labels of the last class, of which there are none, are grey; a class that is always found is dark."""
    confusion = np.diag(np.full(count, 10**9))
    confusion[-1] = 0
    target = tmp_path / "confusion.png"
    names = [f"class {code}" for code in range(count)]
    confusion_figure(target, confusion=confusion, names=names, title="all", subtitle="below")
    pixels = (imread(target)[..., :3] * 255).round().astype(int)
    grey, dark = ((pixels == color).all(-1).mean() for color in ((221, 221, 221), (8, 48, 107)))
    assert grey > 0.2 / count and dark > 0.2 / count  # a row; the diagonal, a cell a row
