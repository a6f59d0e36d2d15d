"""The operators (PyTorch's namespace ``in2nect::``): one file each, with schema, fake, autograd and backends."""

from in2nect.ops._registration import accumulation_dtype
from in2nect.ops.backend import use_backend, warn_slow
from in2nect.ops.class_moments import class_moments
from in2nect.ops.class_sums import class_sums
from in2nect.ops.gather_rows import gather_rows
from in2nect.ops.intra_exact import intra_exact
from in2nect.ops.pair_logsumexp import pair_logsumexp
from in2nect.ops.sample_pixels import sample_global_pixels, sample_pixels

__all__ = [
    "accumulation_dtype",
    "class_moments",
    "class_sums",
    "gather_rows",
    "intra_exact",
    "pair_logsumexp",
    "sample_global_pixels",
    "sample_pixels",
    "use_backend",
    "warn_slow",
]
