"""``in2nect::class_moments``: the intra-class loss (Eq. 6) with each class's mean exponential taken from its moments,
and the raw class sums of the inter-class loss (Eq. 3), in one operator; O(N d (K + d)), or O(N K d^2) with a covariance
a class.

    log D_i ~= LSE_k( u_i.c_k / tau ) + u_i^T Sigma u_i / (2 tau^2)        c_k, Sigma: the classes' means and covariance

One operator, because three passes over the features are enough for both losses and their gradient: one for the moments,
one for the log-sum-exps (which need all of them), one that writes the gradient (which needs the sums of all of those).
Each pass is a function of a backend; the algebra of K x d and d x d between them is here, the same for all.

At label resolution the interpolated rows are never held, nor a number a label pixel, but by the reference. What a row
is needed for is linear in it (sums, logits), or quadratic (norms, second moments): the first is the interpolation of
what the cells of the feature grid have, the second that of the products of neighbouring cells.
Once differentiable. Deterministic: cpp and triton always, the reference under torch.use_deterministic_algorithms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from in2nect import distributed, reference
from in2nect.labels import as_grid, check_inputs, check_values, valid_mask
from in2nect.ops._registration import accumulation_dtype, define, differentiable, once_differentiable
from in2nect.ops.backend import implementation, kernel, native_operator, select
from in2nect.ops.class_sums import check_unless_checked, rows_labels, through_normalization, to_features


class MomentsResult(NamedTuple):
    """What :func:`class_moments` returns."""

    loss: Tensor  # scalar
    sums: Tensor  # (K, d) of raw rows, or (0, d)
    counts: Tensor  # (K,) int64


def class_moments(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    resolution: str = "label",
    temperature: float = 1.0,
    covariance: str = "pooled",
    sums: bool = False,
    group: str | None = None,
) -> MomentsResult:
    """The intra-class loss of unit rows by moments, and each class's sum of raw rows.

    Args:
        features: (B, d, h, w) in any memory format, or (N, d).
        labels: (B, H, W) or (N,), uint8, int32 or int64.
        num_classes: K.
        ignore_index: label of pixels that belong to no class.
        resolution: "label" interpolates the features to the labels, "feature" picks labels at the feature grid.
        temperature: tau, at least ``reference.MINIMUM_TEMPERATURE[covariance]``.
        covariance: "pooled", one for all classes, or "class".
        sums: compute the second result; else it is (0, d).
        group: name of a process group whose ranks' batches are one (:func:`in2nect.distributed.group_name`).

    Returns:
        Loss and sums in float32, or float64 for float64 features.

    Raises:
        ValueError, TypeError: see :func:`in2nect.labels.check_inputs`, :func:`in2nect.labels.check_values` and
            :func:`in2nect.reference.check_settings`.
    """
    reference.check_settings("moments", covariance, temperature, normalize=True)
    check_inputs(features, labels, num_classes, resolution)
    grid, grid_labels = as_grid(features, labels)
    loss, class_sums, counts, *_ = torch.ops.in2nect.class_moments(
        grid, grid_labels, num_classes, ignore_index, resolution, temperature, covariance, sums, group
    )
    return MomentsResult(loss, class_sums, counts)


class _Classes(NamedTuple):
    """Coefficients of each class, (K,), and its centre, (K, d)."""

    weights: Tensor  # w = 1 / n, 0 where the class has no pixel
    anchors: Tensor  # a = w where the class has a pair, else 0
    pairs: Tensor  # 1 / (n (n - 1)), 0 where there is no pair
    present: Tensor
    centres: Tensor  # c

    @classmethod
    def of(cls, counts: Tensor, unit_sums: Tensor) -> _Classes:
        n = counts.to(unit_sums.dtype)
        weights = _weights(counts, n.dtype)
        anchors = torch.where(counts >= 2, weights, 0.0)
        pairs = torch.where(counts >= 2, 1 / (n * (n - 1)).clamp(min=1), 0.0)
        return cls(weights, anchors, pairs, counts >= 1, unit_sums * weights[:, None])

    @property
    def number(self) -> Tensor:
        """K', how many are present; 1 where none is."""
        return self.present.sum().clamp(min=1).to(self.weights.dtype)

    def pooled(self, second: Tensor) -> tuple[Tensor, Tensor]:
        """Sigma_bar and B, (d, d), from M2.

        ``B = sum_i a_i u_i u_i^T`` needs no pixel once M2 is there: it is M2 without the classes of a single one, of
        which ``u_i = c_k``.
        """
        single = self.centres * (self.weights - self.anchors)[:, None]
        of_anchors = torch.where((self.anchors > 0).any(), second - single.T @ self.centres, 0.0)  # 0 but for rounding
        return (second - self.centres.T @ self.centres) / self.number, of_anchors

    def covariances(self, second: Tensor) -> Tensor:
        """Sigma_k (K, d, d) from the classes' mean squares."""
        return second - self.centres[:, :, None] * self.centres[:, None, :]


def _class_moments(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    resolution: str,
    temperature: float,
    covariance: str,
    sums: bool,
    group: str | None = None,
) -> tuple[Tensor, ...]:
    run = select("class_moments", features.device)
    grid_labels = rows_labels(features, labels, resolution)
    if labels.is_cuda or grid_labels is labels:
        check_unless_checked(run, labels, num_classes, ignore_index)
    else:
        check_values(labels, num_classes, ignore_index)
    by_class = covariance == "class"
    settings = num_classes, ignore_index, sums, by_class
    if group is None:
        counts, class_sums, unit_sums, squares, second = run(features, grid_labels, *settings)
    else:
        counts = _global_counts(features, grid_labels, num_classes, ignore_index, group)
        weights = _weights(counts, accumulation_dtype(features.dtype))
        _, *moments = run(features, grid_labels, *settings, weights)
        class_sums, unit_sums, squares, second = distributed.sum_over_ranks(*moments, group=group)
    classes = _Classes.of(counts, unit_sums)
    mix = select("class_moments_mixtures", features.device)
    centres = classes.centres / temperature
    curvatures = classes.covariances(second) / (2 * temperature**2) if by_class else None
    log_d, mixed, mixed_second = mix(
        features, grid_labels, centres, curvatures, classes.present, classes.anchors, ignore_index
    )
    if group is not None:
        log_d, mixed, mixed_second = distributed.sum_over_ranks(log_d, mixed, mixed_second, group=group)
    if not by_class:
        sigma, anchors_second = classes.pooled(second)
        log_d = log_d + (sigma * anchors_second).sum() / (2 * temperature**2)
    positive = ((unit_sums.square().sum(1) - squares) * classes.pairs).sum() / temperature
    return log_d - positive, class_sums, counts, unit_sums, second, mixed, mixed_second


def _class_moments_fake(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    resolution: str,
    temperature: float,
    covariance: str,
    sums: bool,
    group: str | None = None,
) -> tuple[Tensor, ...]:
    dtype, d = accumulation_dtype(features.dtype), features.shape[1]
    by_class = covariance == "class"
    return (
        features.new_empty((), dtype=dtype),
        features.new_empty((num_classes if sums else 0, d), dtype=dtype),
        features.new_empty((num_classes,), dtype=torch.int64),
        features.new_empty((num_classes, d), dtype=dtype),
        features.new_empty((num_classes, d, d) if by_class else (d, d), dtype=dtype),
        features.new_empty((num_classes, d), dtype=dtype),
        features.new_empty((num_classes if by_class else 0, d, d), dtype=dtype),
    )


def _class_moments_backward(
    grad: Tensor,
    grad_sums: Tensor | None,
    features: Tensor,
    labels: Tensor,
    counts: Tensor,
    unit_sums: Tensor,
    second: Tensor,
    mixed: Tensor,
    mixed_second: Tensor,
    ignore_index: int,
    resolution: str,
    temperature: float,
    covariance: str,
) -> Tensor:
    """The last pass. A row's gradient is, with p_i the softmax of the log-sum-exp,

        du_i = a_i sum_k p_ik ( c_k / tau + 2 V_k u_i ) + H_y u_i + e_y + f_y u_i

    where V_k = Sigma_k / (2 tau^2) is there with a covariance a class alone; then ``H_k = w_k B_k / tau^2``, else
    ``H_k = a_k (Sigma_bar + B / K') / tau^2``, one matrix and a number a class. A single pixel is its class's centre,
    so that ``B (u_i - c_k)`` is zero there.
    """
    classes = _Classes.of(counts, unit_sums)
    grad = grad.to(unit_sums.dtype)
    own = 2 * classes.pairs / temperature  # f, of the positive term
    constant = classes.weights[:, None] * mixed / temperature - own[:, None] * unit_sums  # e
    if covariance == "class":
        curvatures = classes.covariances(second) / (2 * temperature**2)
        matrices = classes.weights[:, None, None] * mixed_second / temperature**2
        scales = torch.ones_like(classes.weights)
        constant = constant - (matrices @ classes.centres[:, :, None])[:, :, 0]
    else:
        curvatures = None
        sigma, anchors_second = classes.pooled(second)
        by_all = anchors_second / (classes.number * temperature**2)
        matrices = (sigma / temperature**2 + by_all)[None]
        scales = classes.anchors
        constant = constant - scales[:, None] * (classes.centres @ by_all)
    run = select("class_moments_backward", features.device)
    return run(
        features,
        rows_labels(features, labels, resolution),
        classes.centres / temperature,
        curvatures,
        classes.present,
        grad * classes.anchors,
        matrices,
        grad * scales,
        grad * constant,
        grad * own,
        None if grad_sums is None else grad_sums.contiguous(),
        ignore_index,
    )


def _class_moments_backward_fake(
    grad: Tensor,
    grad_sums: Tensor | None,
    features: Tensor,
    labels: Tensor,
    counts: Tensor,
    unit_sums: Tensor,
    second: Tensor,
    mixed: Tensor,
    mixed_second: Tensor,
    ignore_index: int,
    resolution: str,
    temperature: float,
    covariance: str,
) -> Tensor:
    return torch.empty_like(features)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    features, labels, _, ignore_index, resolution, temperature, covariance, sums, group = inputs
    _, _, *state = output
    ctx.mark_non_differentiable(*state)
    ctx.save_for_backward(features, labels, *state)
    ctx.settings = (ignore_index, resolution, temperature, covariance)
    ctx.with_sums = sums
    ctx.group = group
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_sums: Tensor | None, *_: Any) -> tuple:
    features, labels, *state = ctx.saved_tensors
    none = (None,) * 8
    grad_sums = grad_sums if ctx.with_sums else None
    if grad is None and grad_sums is None:
        return None, *none
    if grad is None:
        grad = features.new_zeros((), dtype=accumulation_dtype(features.dtype))
    ranks = distributed.number_of_ranks(ctx.group)  # why, is in in2nect/distributed.py
    if ranks > 1:
        grad, grad_sums = ranks * grad, None if grad_sums is None else ranks * grad_sums
    backward = torch.ops.in2nect.class_moments_backward
    return backward(grad, grad_sums, features, labels, *state, *ctx.settings), *none


define(
    "class_moments(Tensor features, Tensor labels, int num_classes, int ignore_index, str resolution, "
    "float temperature, str covariance, bool sums, str? group=None) -> (Tensor loss, Tensor sums, Tensor counts, "
    "Tensor unit_sums, Tensor second, Tensor mixed, Tensor mixed_second)",
    _class_moments,
    _class_moments_fake,
)
define(
    "class_moments_backward(Tensor grad, Tensor? grad_sums, Tensor features, Tensor labels, Tensor counts, "
    "Tensor unit_sums, Tensor second, Tensor mixed, Tensor mixed_second, int ignore_index, str resolution, "
    "float temperature, str covariance) -> Tensor",
    _class_moments_backward,
    _class_moments_backward_fake,
)
differentiable("class_moments", _backward, _setup_context)
once_differentiable("class_moments_backward")


def _global_counts(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, group: str) -> Tensor:
    """Pixels of each class on all ranks, (K,): a pass of its own, since the second moments are weighted by them.

    Counting is class_sums's, of a single channel.
    """
    count = select("class_sums", features.device)
    _, counts, _ = count(features[:, :1], labels, num_classes, ignore_index, False, False)
    return distributed.sum_over_ranks(counts, group=group)[0]


def _weights(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """w = 1 / n of each class, (K,); 0 where it has no pixel."""
    return torch.where(counts >= 1, 1 / counts.clamp(min=1).to(dtype), 0.0)


@implementation("class_moments", "reference")
def _reference(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    sums: bool,
    by_class: bool,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Counts (K,), raw sums (K, d) or (0, d), sums (K, d) and squares (K,) of unit rows, and second moments: of each
    class its sum of ``w u u^T`` (K, d, d), or the sum of these (d, d), with w of weights (K,), else ``1 / counts``."""
    raw, rows, one_hot = _rows(features, labels, num_classes, ignore_index)
    counts = (one_hot != 0).sum(0)
    squares = one_hot.T @ rows.square().sum(1)
    shares = one_hot / counts.clamp(min=1) if weights is None else one_hot * weights
    second = (
        torch.stack([(rows * share[:, None]).T @ rows for share in shares.T])
        if by_class
        else (rows * shares.sum(1, keepdim=True)).T @ rows
    )
    raw_sums = one_hot.T @ raw if sums else raw.new_empty(0, raw.shape[1])
    return counts, raw_sums, one_hot.T @ rows, squares, second


@implementation("class_moments_mixtures", "reference")
def _reference_mixtures(
    features: Tensor,
    labels: Tensor,
    centres: Tensor,
    curvatures: Tensor | None,
    present: Tensor,
    anchors: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i a_i LSE_i`` of ``u.centres_k + u^T curvatures_k u`` over the present classes, and with p its softmax
    ``G_k = sum_i a_i p_ik u_i`` (K, d) and, with curvatures, ``B_k = sum_i a_i p_ik u_i u_i^T`` (K, d, d), else (0, d,
    d)."""
    _, rows, one_hot = _rows(features, labels, len(centres), ignore_index)
    row_anchors = one_hot @ anchors
    exponents = _exponents(rows, centres, curvatures, present)
    log_d = torch.where(row_anchors > 0, row_anchors * torch.logsumexp(exponents, 1), 0.0).sum()
    shares = row_anchors[:, None] * exponents.softmax(1)  # (N, K)
    if curvatures is None:
        return log_d, shares.T @ rows, rows.new_empty(0, rows.shape[1], rows.shape[1])
    return log_d, shares.T @ rows, torch.stack([(rows * share[:, None]).T @ rows for share in shares.T])


@implementation("class_moments_backward", "reference")
def _reference_backward(
    features: Tensor,
    labels: Tensor,
    centres: Tensor,
    curvatures: Tensor | None,
    present: Tensor,
    anchors: Tensor,
    matrices: Tensor,
    scales: Tensor,
    constant: Tensor,
    own: Tensor,
    grad_sums: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Gradient of the features, in their dtype and layout, from ``du_i = a_y sum_k p_ik (centres_k + 2 curvatures_k
    u_i) + scales_y matrices_y u_i + constant_y + own_y u_i``, with matrices (K, d, d) or one for all (1, d, d), and
    raw rows' ``grad_sums_y``. p as in the mixtures."""
    raw, rows, one_hot = _rows(features, labels, len(centres), ignore_index)
    shares = (one_hot @ anchors)[:, None] * _exponents(rows, centres, curvatures, present).softmax(1)
    grad = shares @ centres + one_hot @ constant + (one_hot @ own)[:, None] * rows
    for k, curvature in enumerate(curvatures if curvatures is not None else ()):
        grad = grad + shares[:, k, None] * (rows @ (2 * curvature))
    row_scales = one_hot * scales if len(matrices) > 1 else one_hot @ scales[:, None]
    for matrix, scale in zip(matrices, row_scales.T, strict=True):
        grad = grad + scale[:, None] * (rows @ matrix)
    grad = through_normalization(grad, rows, raw)
    if grad_sums is not None:
        grad = grad + one_hot @ grad_sums
    return to_features(grad, features, *labels.shape[1:])


def _rows(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Raw and unit rows (N, d) of every pixel and their classes as one-hot rows (N, K); all 0 where ignored."""
    raw, flat = reference.all_rows(features, labels, resolution="label")
    valid = valid_mask(flat, num_classes, ignore_index)
    raw = torch.where(valid[:, None], raw, 0.0)  # weight 0 alone would let a NaN of an ignored pixel through
    classes = torch.arange(num_classes, device=flat.device)
    return raw, reference.unit_rows(raw), ((flat[:, None] == classes) & valid[:, None]).to(raw.dtype)


def _exponents(rows: Tensor, centres: Tensor, curvatures: Tensor | None, present: Tensor) -> Tensor:
    """(N, K); the lowest number where a class is absent, so that the softmax is finite where all are."""
    exponents = rows @ centres.T
    if curvatures is not None:
        exponents = exponents + torch.stack([((rows @ curvature) * rows).sum(1) for curvature in curvatures], 1)
    return exponents.masked_fill(~present, torch.finfo(rows.dtype).min)


def _native(*arguments: Any) -> tuple[Tensor, ...]:
    """The compiled first pass, which counts the labels that are none; check_values tells which those are."""
    *results, strays = torch.ops.in2nect_cpp.class_moments(*arguments)
    if strays:
        _, labels, num_classes, ignore_index, *_ = arguments
        check_values(labels, num_classes, ignore_index)
    return tuple(results)


_native.checks_labels = "cpu"  # type: ignore[attr-defined]
_triton: Any = kernel("class_moments")
_triton.checks_labels = "cuda"  # by assertions on the device
implementation("class_moments", "cpp")(_native)
implementation("class_moments", "triton")(_triton)
for _name in ("class_moments_mixtures", "class_moments_backward"):
    implementation(_name, "cpp")(native_operator("cpp", _name))
    implementation(_name, "triton")(kernel("class_moments", _name))
