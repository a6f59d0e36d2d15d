"""What the losses need of torch.distributed to be those of the global batch: sums over ranks, and rows of all ranks.

Every rank gets the loss of the global batch, and a gradient by its own features that is R times the true one, R being
the number of ranks: DistributedDataParallel then averages the parameters' gradients over ranks, and the factor is gone.
It comes from the adjoint of a sum over ranks, which is the sum over ranks of what each sends back; the loss behind the
sum is the same on every rank, and so is what it sends back: R times one of them, without a collective. So each operator
multiplies what it is sent back by R where its forward sums over ranks, and nothing else does.

Every rank of a group must make the same calls, one without a labelled pixel too. Costs are in docs/distributed.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# ``all_gather_single`` and ``reduce_scatter_single`` are what newer releases call them.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def group_name(process_group: ProcessGroup | Literal["world"] | None) -> str | None:
    """The name by which operators find a process group, or None where there is nothing to reduce: no group is given,
    torch.distributed is not initialised, or the group has one rank, or has not this one.

    Args:
        process_group: a group, "world" for all ranks, or None.

    Raises:
        ValueError: another string.
    """
    if isinstance(process_group, str) and process_group != "world":
        raise ValueError(
            f'process_group is {process_group!r}; expected a torch.distributed.ProcessGroup, "world" for the batch of '
            "all ranks, or None for that of this rank."
        )
    if process_group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if isinstance(process_group, str) else process_group
    assert group is not None
    return group.group_name if dist.get_world_size(group) > 1 else None


def number_of_ranks(group: str | None) -> int:
    """R of a named group; 1 for None."""
    return 1 if group is None else _resolve(group).size()


def sum_over_ranks(*tensors: Tensor, group: str) -> list[Tensor]:
    """Their sums over the ranks of a named group, of the same shapes and dtypes on all; not differentiable.

    One collective a dtype, which run at the same time. The results share no memory.
    """
    works = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
        buffer = torch.cat([tensor.detach().flatten() for tensor in chosen])
        work = dist.all_reduce(buffer, group=_resolve(group), async_op=True)
        works.append((work, buffer, [tensor.numel() for tensor in chosen]))
    summed: dict[torch.dtype, list[Tensor]] = {}
    for work, buffer, sizes in works:
        work.wait()
        parts = list(buffer.split(sizes))
        summed[buffer.dtype] = [part.clone() for part in parts] if len(parts) > 1 else parts
    return [summed[tensor.dtype].pop(0).view(tensor.shape) for tensor in tensors]


def gather(tensor: Tensor, group: str) -> Tensor:
    """(R, ...): a tensor of each rank, all of one shape; not differentiable."""
    ranks = number_of_ranks(group)
    gathered = tensor.new_empty((ranks * tensor.numel(),))
    _all_gather(gathered, tensor.detach().flatten(), group=_resolve(group))
    return gathered.view(ranks, *tensor.shape)


def rank_in(group: str) -> int:
    """This process's rank in a named group."""
    return _resolve(group).rank()


class RowBlocks(NamedTuple):
    """Rows of all ranks, one rank's after the other's, and how many each of them has, which may be none.

    The sizes are known to the host, which on CUDA waits for the device once.
    """

    sizes: list[int]
    group: str

    @classmethod
    def of(cls, rows: Tensor, group: str) -> RowBlocks:
        """The blocks whose part on this rank is as long as these rows."""
        return cls(gather(torch.tensor([len(rows)], device=rows.device), group).flatten().tolist(), group)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows (M, ...) of all ranks from this rank's (n, ...); sent padded to the longest block. Not
        differentiable: :meth:`sum_of_own` is its adjoint."""
        padded = rows.new_zeros((self._longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        blocks = gather(padded, self.group)
        return torch.cat([block[:size] for block, size in zip(blocks, self.sizes)])

    def sum_of_own(self, rows: Tensor) -> Tensor:
        """The sum over ranks of rows (M, ...), of which each rank gets its own (n, ...)."""
        padded = rows.new_zeros((len(self.sizes), self._longest, *rows.shape[1:]))
        for block, own in zip(padded, rows.split(self.sizes)):
            block[: len(own)] = own
        summed = torch.empty_like(padded[0])
        _reduce_scatter(summed.view(-1), padded.view(-1), group=_resolve(self.group))
        return summed[: self.sizes[rank_in(self.group)]]

    @property
    def _longest(self) -> int:
        return max(*self.sizes, 1)  # an empty collective is not something that every backend has


def global_mean(total: Tensor, weight: Tensor, *, process_group: ProcessGroup | Literal["world"] | None) -> Tensor:
    """The mean of what lies on all ranks, ``sum_r total_r / sum_r weight_r``, 0 where they have no weight at all.

    The mean over labelled pixels of a loss, which DistributedDataParallel's average over ranks gets wrong where ranks
    have unequal numbers of them.

    Args:
        total: scalar: this rank's sum.
        weight: scalar, of any dtype, no gradient flows to it: this rank's weight, of integers (a count) or not.
        process_group: a group, "world" for all ranks, or None for this rank's own mean.

    Returns:
        Scalar, the same on every rank. Its gradient by ``total`` is R over the weight of all: see the top of the file.
    """
    weight = weight.detach()
    group = group_name(process_group)
    if group is None:
        return total / _not_zero(weight, total.dtype)
    sums, weights = sum_over_ranks(total, weight, group=group)
    weights = _not_zero(weights, total.dtype)
    own = number_of_ranks(group) * total / weights
    return own - own.detach() + sums / weights  # the difference is a zero, which carries the gradient


def _not_zero(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Infinity for a weight of zero: the mean of what has none is 0, whatever its sum."""
    return torch.where(weight == 0, torch.inf, weight.to(dtype))


def _resolve(group: str) -> ProcessGroup:
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(group)
