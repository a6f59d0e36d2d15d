"""``in2nect::pair_logsumexp``: log D_i of Eq. 6, one log-sum-exp a row over weighted columns.

O(N^2 d) time, of one set by half the pairs in C++ and Triton; the backward is recomputed. The reference works through
tiles of anchors in O(tile x N) memory, the others in O((N + M) d). Once differentiable. Deterministic: cpp and cuda
always, triton and the reference under torch.use_deterministic_algorithms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from in2nect.ops._registration import accumulation_dtype, define, differentiable, once_differentiable
from in2nect.ops.backend import implementation, kernel, native_operator, select

TILE_ELEMENTS = 2**22  # of one tile of similarities: 16 MiB in float32


def pair_logsumexp(anchors: Tensor, weights: Tensor, temperature: float, *, keys: Tensor | None = None) -> Tensor:
    """``log sum_j weights_j exp(anchors_i.keys_j / temperature)``.

    Args:
        anchors: (N, d); float32, float64, bfloat16 or float16.
        weights: (M,) in the dtype of the result; non-negative, constant (no gradient flows to them); a key of weight 0
            is not there.
        temperature: positive.
        keys: (M, d) in the anchors' dtype; None takes the anchors themselves (the symmetric form).

    Returns:
        (N,), float32 or float64 for float64 rows; -inf where every weight is 0. In C++ a row or a weight that is not
        finite makes every result NaN.

    Raises:
        ValueError: sizes do not fit, a temperature that is not positive, or weights that require a gradient.
        TypeError: dtypes.
    """
    columns = anchors if keys is None else keys
    if anchors.dim() != 2 or columns.dim() != 2 or anchors.shape[1] != columns.shape[1]:
        raise ValueError(f"anchors {tuple(anchors.shape)} and keys {tuple(columns.shape)}; expected (N, d) and (M, d).")
    if weights.shape != columns.shape[:1]:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; expected one a key, ({columns.shape[0]},).")
    if columns.dtype != anchors.dtype or weights.dtype != accumulation_dtype(anchors.dtype):
        raise TypeError(
            f"anchors are {anchors.dtype}, keys {columns.dtype} and weights {weights.dtype}; expected keys in the "
            f"anchors' dtype and weights in {accumulation_dtype(anchors.dtype)}."
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number.")
    if weights.requires_grad:
        raise ValueError("weights require a gradient, which pair_logsumexp does not give; pass weights.detach().")
    return torch.ops.in2nect.pair_logsumexp(anchors, keys, weights, temperature)


def _pair_logsumexp(anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float) -> Tensor:
    return select("pair_logsumexp", anchors.device)(anchors, keys, weights, temperature)


def _pair_logsumexp_fake(anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float) -> Tensor:
    return anchors.new_empty(anchors.shape[0], dtype=accumulation_dtype(anchors.dtype))


def _pair_logsumexp_backward(
    grad: Tensor, log_d: Tensor, anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    kernel = select("pair_logsumexp_backward", anchors.device)
    return kernel(grad, log_d, anchors, keys, weights, temperature)


def _pair_logsumexp_backward_fake(
    grad: Tensor, log_d: Tensor, anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    grad_keys = anchors.new_empty((0, anchors.shape[1])) if keys is None else torch.empty_like(keys)
    return torch.empty_like(anchors), grad_keys


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    anchors, keys, weights, temperature = inputs
    ctx.save_for_backward(output, anchors, keys, weights)
    ctx.temperature = temperature


def _backward(ctx: Any, grad: Tensor) -> tuple:
    log_d, anchors, keys, weights = ctx.saved_tensors
    grad_anchors, grad_keys = torch.ops.in2nect.pair_logsumexp_backward(
        grad, log_d, anchors, keys, weights, ctx.temperature
    )
    return grad_anchors, None if keys is None else grad_keys, None, None


define(
    "pair_logsumexp(Tensor anchors, Tensor? keys, Tensor weights, float temperature) -> Tensor",
    _pair_logsumexp,
    _pair_logsumexp_fake,
)
define(
    "pair_logsumexp_backward(Tensor grad, Tensor log_d, Tensor anchors, Tensor? keys, Tensor weights, "
    "float temperature) -> (Tensor grad_anchors, Tensor grad_keys)",
    _pair_logsumexp_backward,
    _pair_logsumexp_backward_fake,
)
differentiable("pair_logsumexp", _backward, _setup_context)
once_differentiable("pair_logsumexp_backward")


@implementation("pair_logsumexp", "reference")
def _reference(anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float) -> Tensor:
    rows, columns = _wide(anchors, keys)
    log_weights = weights.log()
    log_d = rows.new_empty(len(rows))
    for tile in _tiles(len(rows), len(columns)):
        similarity = rows[tile] @ columns.T / temperature  # [tile, M]
        log_d[tile] = torch.logsumexp(similarity + log_weights, dim=1)
    return log_d


@implementation("pair_logsumexp_backward", "reference")
def _reference_backward(
    grad: Tensor, log_d: Tensor, anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    rows, columns = _wide(anchors, keys)
    log_weights = weights.log()
    grad_rows = torch.empty_like(rows)
    grad_columns = torch.zeros_like(columns)
    for tile in _tiles(len(rows), len(columns)):
        similarity = rows[tile] @ columns.T / temperature
        # where D is 0 (log_d -inf) there is no key and so no gradient, where -inf - -inf would make NaN
        share = (similarity + log_weights - log_d[tile, None]).exp().nan_to_num(nan=0.0)
        share = share * (grad[tile, None] / temperature)  # [tile, M]
        grad_rows[tile] = share @ columns
        grad_columns += share.T @ rows[tile]
    if keys is None:
        return torch.empty_like(anchors).copy_(grad_rows + grad_columns), anchors.new_empty((0, anchors.shape[1]))
    return torch.empty_like(anchors).copy_(grad_rows), torch.empty_like(keys).copy_(grad_columns)


def _wide(anchors: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """Anchors and keys in the dtype of the sums."""
    rows = anchors.to(accumulation_dtype(anchors.dtype))
    return rows, rows if keys is None else keys.to(rows.dtype)


def _tiles(rows: int, columns: int) -> list[slice]:
    step = max(1, TILE_ELEMENTS // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def native_pairs(name: str) -> Callable:
    """The C++ operator, told whether torch lets products of float32 be of two bfloat16 numbers a factor
    (``torch.set_float32_matmul_precision("high")``), which AMX does several times faster."""
    operator = native_operator("cpp", name)

    def call(*arguments: Any) -> Any:
        return operator(*arguments, torch.get_float32_matmul_precision() != "highest")

    return call


for _name in ("pair_logsumexp", "pair_logsumexp_backward"):
    implementation(_name, "cpp")(native_pairs(_name))
    implementation(_name, "cuda")(native_operator("cuda", _name))
implementation("pair_logsumexp", "triton")(kernel("pair_logsumexp"))
implementation("pair_logsumexp_backward", "triton")(kernel("pair_logsumexp", "pair_logsumexp_backward"))
