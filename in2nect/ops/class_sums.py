"""``in2nect::class_sums``: per-class sums, counts and sums of squared norms of the rows under a label map; O(N d).

The numerators of Eq. 3 (raw rows) and the S_k of the exact positive term of Eq. 6 (unit rows). Linear in raw rows, so
that operator can be differentiated any number of times; unit rows and squares once.
Deterministic: cpp, cuda and triton always, for any number of threads; the reference under
torch.use_deterministic_algorithms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from in2nect import distributed, reference
from in2nect.labels import as_grid, check_inputs, check_values, to_feature_grid, valid_mask
from in2nect.ops._registration import accumulation_dtype, define, differentiable
from in2nect.ops.backend import implementation, kernel, select, warn_slow


def class_sums(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    resolution: str = "label",
    normalize: bool = False,
    squares: bool = False,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (K, d), counts (K,) int64 and sums of squared norms (K,) of each class's rows.

    Args:
        features: (B, d, h, w) in any memory format, or (N, d).
        labels: (B, H, W) or (N,), uint8, int32 or int64.
        num_classes: K.
        ignore_index: label of pixels that belong to no class.
        resolution: "label" interpolates the features to the labels, "feature" picks labels at the feature grid.
        normalize: sum unit rows ``z / max(||z||, 1e-12)`` in place of ``z``.
        squares: compute the third result; else it is empty.
        group: name of a process group whose ranks' rows are summed too (:func:`in2nect.distributed.group_name`).

    Returns:
        Sums and squares in float32, or float64 for float64 features.

    Raises:
        ValueError, TypeError: see :func:`in2nect.labels.check_inputs` and :func:`in2nect.labels.check_values`.
    """
    check_inputs(features, labels, num_classes, resolution)
    grid, grid_labels = as_grid(features, labels)
    return torch.ops.in2nect.class_sums(
        grid, grid_labels, num_classes, ignore_index, resolution, normalize, squares, group
    )


def _class_sums(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    resolution: str,
    normalize: bool,
    squares: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    run = select("class_sums", features.device)
    grid_labels = rows_labels(features, labels, resolution)
    if labels.is_cuda or grid_labels is labels:
        check_unless_checked(run, labels, num_classes, ignore_index)
    else:  # a kernel would see those alone that were picked
        check_values(labels, num_classes, ignore_index)
    sums, counts, squared = run(features, grid_labels, num_classes, ignore_index, normalize, squares)
    if group is not None:
        sums, counts, squared = distributed.sum_over_ranks(sums, counts, squared, group=group)
    return sums, counts, squared


def _class_sums_fake(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    resolution: str,
    normalize: bool,
    squares: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty((num_classes, features.shape[1]), dtype=dtype),
        features.new_empty((num_classes,), dtype=torch.int64),
        features.new_empty((num_classes if squares else 0,), dtype=dtype),
    )


def _class_sums_backward(
    grad_sums: Tensor,
    grad_squares: Tensor | None,
    features: Tensor,
    labels: Tensor,
    ignore_index: int,
    resolution: str,
    normalize: bool,
    group: str | None = None,
) -> Tensor:
    labels = rows_labels(features, labels, resolution)
    run = select("class_sums_backward", features.device)
    ranks = distributed.number_of_ranks(group)
    if ranks > 1:
        grad_sums, grad_squares = ranks * grad_sums, None if grad_squares is None else ranks * grad_squares
    return run(grad_sums, grad_squares, features, labels, ignore_index, normalize)


def _class_sums_backward_fake(
    grad_sums: Tensor,
    grad_squares: Tensor | None,
    features: Tensor,
    labels: Tensor,
    ignore_index: int,
    resolution: str,
    normalize: bool,
    group: str | None = None,
) -> Tensor:
    return torch.empty_like(features)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    features, labels, num_classes, ignore_index, resolution, normalize, squares, group = inputs
    ctx.save_for_backward(features, labels)
    ctx.settings = (ignore_index, resolution, normalize, group)
    ctx.squares = squares
    ctx.set_materialize_grads(False)
    ctx.sums_shape = (num_classes, features.shape[1])


def _backward(ctx: Any, grad_sums: Tensor | None, _: Any, grad_squares: Tensor | None) -> tuple:
    features, labels = ctx.saved_tensors
    none = (None,) * 7
    grad_squares = grad_squares if ctx.squares else None
    if grad_sums is None and grad_squares is None:
        return None, *none
    if grad_sums is None:
        grad_sums = features.new_zeros(ctx.sums_shape, dtype=accumulation_dtype(features.dtype))
    return torch.ops.in2nect.class_sums_backward(grad_sums, grad_squares, features, labels, *ctx.settings), *none


def _setup_second(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad_sums, grad_squares, _, labels, ignore_index, resolution, normalize, group = inputs
    if normalize or grad_squares is not None:
        ctx.linear = False
        return
    ctx.linear = True
    ctx.save_for_backward(labels)
    ctx.settings = (grad_sums.shape[0], ignore_index, resolution, False, False, group)


def _second(ctx: Any, grad: Tensor) -> tuple:
    if not ctx.linear:
        raise NotImplementedError(
            "in2nect::class_sums_backward has no derivative for unit rows or squares: the fused losses are once "
            "differentiable. For second derivatives use the function of the same name in in2nect.reference."
        )
    (labels,) = ctx.saved_tensors
    grad_grad_sums = torch.ops.in2nect.class_sums(grad, labels, *ctx.settings)[0]
    return (grad_grad_sums, *(None,) * 7)


define(
    "class_sums(Tensor features, Tensor labels, int num_classes, int ignore_index, str resolution, bool normalize, "
    "bool squares, str? group=None) -> (Tensor sums, Tensor counts, Tensor squares)",
    _class_sums,
    _class_sums_fake,
)
define(
    "class_sums_backward(Tensor grad_sums, Tensor? grad_squares, Tensor features, Tensor labels, int ignore_index, "
    "str resolution, bool normalize, str? group=None) -> Tensor",
    _class_sums_backward,
    _class_sums_backward_fake,
)
differentiable("class_sums", _backward, _setup_context)
differentiable("class_sums_backward", _second, _setup_second)


def check_unless_checked(run: Callable, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """:func:`in2nect.labels.check_values`, but for a kernel which on this device checks what it reads: that spares the
    labels several passes of their own."""
    if getattr(run, "checks_labels", None) != labels.device.type:
        check_values(labels, num_classes, ignore_index)


def rows_labels(features: Tensor, labels: Tensor, resolution: str) -> Tensor:
    return to_feature_grid(labels, *features.shape[2:]) if resolution == "feature" else labels


@implementation("class_sums", "reference")
def _reference(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, one_hot = _reference_rows(features, labels, num_classes, ignore_index)
    rows = reference.unit_rows(rows) if normalize else rows
    squared = one_hot.T @ rows.square().sum(1) if squares else rows.new_empty(0)
    return one_hot.T @ rows, (one_hot != 0).sum(0), squared


@implementation("class_sums_backward", "reference")
def _reference_backward(
    grad_sums: Tensor,
    grad_squares: Tensor | None,
    features: Tensor,
    labels: Tensor,
    ignore_index: int,
    normalize: bool,
) -> Tensor:
    rows, one_hot = _reference_rows(features, labels, grad_sums.shape[0], ignore_index)
    grad_rows = one_hot @ grad_sums
    unit = reference.unit_rows(rows) if normalize else rows
    if grad_squares is not None:
        grad_rows = grad_rows + 2 * (one_hot @ grad_squares)[:, None] * unit
    if normalize:
        grad_rows = through_normalization(grad_rows, unit, rows)
    return to_features(grad_rows, features, labels.shape[1], labels.shape[2])


def through_normalization(grad_unit: Tensor, unit: Tensor, rows: Tensor) -> Tensor:
    """Gradient of rows (N, d) from that of their unit rows: ``(g - (g.u) u) / ||z||``, 0 for zero rows."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    tangent = grad_unit - (grad_unit * unit).sum(1, keepdim=True) * unit
    return torch.where(norms <= reference.ZERO_ROW_NORM, 0.0, tangent / norms)


def to_features(grad_rows: Tensor, features: Tensor, height: int, width: int) -> Tensor:
    """Gradient of features (B, d, h, w), in their dtype and layout, from that of their rows at (height, width)."""
    batch, dim, h, w = features.shape
    grad = grad_rows.view(batch, height, width, dim).permute(0, 3, 1, 2)
    if (height, width) != (h, w):
        grad = _downsample_adjoint(grad, h, w)
    return torch.empty_like(features).copy_(grad)


def _reference_rows(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Rows (N, d) of every pixel in the accumulation dtype and their classes as one-hot rows; both 0 where ignored."""
    rows, flat = reference.all_rows(features, labels, resolution="label")
    mask = valid_mask(flat, num_classes, ignore_index)
    classes = torch.arange(num_classes, device=flat.device)
    return torch.where(mask[:, None], rows, 0.0), ((flat[:, None] == classes) & mask[:, None]).to(rows.dtype)


def _downsample_adjoint(grad: Tensor, h: int, w: int) -> Tensor:
    """Adjoint of the bilinear interpolation from (h, w) to the gradient's (B, d, H, W): (B, d, h, w).

    torch's own adds with atomics on CUDA and refuses to where algorithms must be deterministic; there it is two
    products with the interpolation matrices of the axes.
    """
    batch, dim, height, width = grad.shape
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _axis_weights(height, h, grad).T @ grad @ _axis_weights(width, w, grad)
    return torch.ops.aten.upsample_bilinear2d_backward(
        grad.contiguous(), [height, width], [batch, dim, h, w], False, None, None
    )


def _axis_weights(pixels: int, cells: int, like: Tensor) -> Tensor:
    """(pixels, cells): how much of each cell a pixel takes, along one axis."""
    identity = torch.eye(cells, dtype=like.dtype, device=like.device)
    return torch.nn.functional.interpolate(identity[None], size=pixels, mode="linear", align_corners=False)[0].T


def _native(namespace: str, name: str) -> Callable[..., Any]:
    """The compiled operator; the CUDA one takes labels on the features' grid, and leaves others to the reference. The
    CPU one counts the labels that are none, and check_values tells which those are."""

    def checked(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, *flags: bool) -> Any:
        *results, strays = torch.ops.in2nect_cpp.class_sums(features, labels, num_classes, ignore_index, *flags)
        if strays:
            check_values(labels, num_classes, ignore_index)
        return tuple(results)

    if (namespace, name) == ("in2nect_cpp", "class_sums"):
        checked.checks_labels = "cpu"  # type: ignore[attr-defined]
        return checked

    def call(*arguments: Any) -> Any:
        features, labels = (a for a in arguments if isinstance(a, Tensor) and a.dim() >= 3)
        if namespace == "in2nect_cuda" and features.shape[2:] != labels.shape[1:]:
            warn_slow(f"{name} at label resolution")
            return _REFERENCE[name](*arguments)
        return getattr(getattr(torch.ops, namespace), name)(*arguments)

    return call


_REFERENCE = {"class_sums": _reference, "class_sums_backward": _reference_backward}
for _backend in ("cpp", "cuda"):
    for _name in _REFERENCE:
        implementation(_name, _backend)(_native(f"in2nect_{_backend}", _name))

_triton: Any = kernel("class_sums")
_triton.checks_labels = "cuda"  # by assertions on the device
implementation("class_sums", "triton")(_triton)
implementation("class_sums_backward", "triton")(kernel("class_sums", "class_sums_backward"))
