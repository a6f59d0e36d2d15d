"""In2NeCT: neural-collapse tuning for semantic segmentation of imbalanced remote-sensing images.

The losses need torch alone. The pipeline around them (models, data, training, prediction, report) is imported by
name: ``import in2nect.models``. Names are loaded on first use, and torch with them, so that the command line can answer
a question about itself, and set what OpenMP reads when torch is loaded, before torch is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from in2nect import _kernels_path

if TYPE_CHECKING:
    from in2nect import functional, reference
    from in2nect.etf import EtfClassifier, simplex_etf
    from in2nect.loss import In2NeCTLoss, In2NeCTTerms, InterClassLoss, IntraClassLoss
    from in2nect.ops import use_backend
    from in2nect.tap import RepresentationTap

__version__ = "0.1.0"
__all__ = [
    "EtfClassifier",
    "In2NeCTLoss",
    "In2NeCTTerms",
    "InterClassLoss",
    "IntraClassLoss",
    "RepresentationTap",
    "functional",
    "reference",
    "simplex_etf",
    "use_backend",
]

_MODULES = {
    "EtfClassifier": "etf",
    "simplex_etf": "etf",
    "In2NeCTLoss": "loss",
    "In2NeCTTerms": "loss",
    "InterClassLoss": "loss",
    "IntraClassLoss": "loss",
    "use_backend": "ops",
    "RepresentationTap": "tap",
}

_kernels_path.register()


def __getattr__(name: str) -> Any:
    if name in ("functional", "reference"):
        return import_module(f"in2nect.{name}")
    if name in _MODULES:
        return getattr(import_module(f"in2nect.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'in2nect' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
