"""In2NeCT: neural-collapse tuning for semantic segmentation of imbalanced remote-sensing images.

Importing this needs torch alone. The pipeline around the losses (models, data, training, prediction, report) is
imported by name: ``import in2nect.models``.
"""

from in2nect import _kernels_path, functional, reference
from in2nect.etf import EtfClassifier, simplex_etf
from in2nect.loss import In2NeCTLoss, In2NeCTTerms, InterClassLoss, IntraClassLoss
from in2nect.ops import use_backend
from in2nect.tap import RepresentationTap

_kernels_path.register()

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
