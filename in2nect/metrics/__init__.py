"""Metrics: segmentation scores from one confusion matrix, and the degrees of neural collapse. Each name is imported
on first use, because CollapseMetrics needs torch alone while SegmentationMetrics brings torchmetrics along.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from in2nect.metrics.collapse import CollapseMetrics
    from in2nect.metrics.segmentation import SegmentationMetrics, SegmentationScores

__all__ = ["CollapseMetrics", "SegmentationMetrics", "SegmentationScores"]

_MODULES = {
    "CollapseMetrics": "in2nect.metrics.collapse",
    "SegmentationMetrics": "in2nect.metrics.segmentation",
    "SegmentationScores": "in2nect.metrics.segmentation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
