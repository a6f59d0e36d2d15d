"""What a training step keeps in memory, without that memory: the step runs on fake tensors, which have shapes, dtypes
and devices alone, and every storage is counted from the operator that makes it until nothing refers to it any more.
Seconds of Python on any machine, whatever the size of the batch, and for a GPU that is not there.

What is counted is what torch's allocator is asked for in eager mode. Workspaces inside operators (cuDNN's, and those of
the losses) are not seen, nor are fragmentation and the CUDA context; a compiled step keeps less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import GraphExecGroup

T = TypeVar("T")


class StepMemory(NamedTuple):
    """Bytes of a step beyond weights, gradients and the batch.

    Attributes:
        of_network: behind the network: what it saved for the backward pass, and its results.
        kept: behind the losses: what network and losses saved.
        peak: at the worst moment of forward and backward.
    """

    of_network: int
    kept: int
    peak: int


class StorageCount(TorchDispatchMode):
    """While it is entered, counts the bytes of all storages that operators make.

    Args:
        known: tensors whose storages were there before and are not counted.

    Attributes:
        now: bytes of the storages that are still referred to.
        peak: the most that `now` was.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no new one has the same place
        self._seen = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return
        self._seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, place, size)

    def _remove(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors that are made within have no memory. `torch.autocast` works for CUDA, too, where there is none: it would
    turn itself off, with other dtypes to count."""
    there = patch.multiple(torch.cuda.amp.common, amp_definitely_not_available=lambda: False)
    bfloat16 = patch.object(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode(), nullcontext() if torch.cuda.is_available() else there, bfloat16:
        yield


def to_fake(module: nn.Module, device: torch.device) -> None:
    """Replaces the weights and buffers of a module by fake ones on a device, and gives each weight a gradient. To be
    called within `fake_tensors`, in which the module is then used.
    """
    made: dict[Tensor, Tensor] = {}  # a weight may be shared

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in made:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            made[tensor] = nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
        return made[tensor]

    for part in module.modules():
        tensors: Any
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)


def step_memory(forward: Callable[[], T], loss: Callable[[T], Tensor], known: Iterable[Tensor]) -> StepMemory:
    """Counts a step: `forward` of the network, `loss` of what it gives, a scalar, and the backward pass of that.

    Args:
        known: weights and their gradients, which must be there, buffers and the batch: what is not counted.
    """
    with StorageCount(known) as count:
        output = [forward()]
        of_network = count.now
        total = [loss(output.pop())]
        kept = count.now
        backward(total)
    return StepMemory(of_network, kept, count.peak)


def backward(total: list[Tensor]) -> None:
    """As `total.pop().backward()`, without torch's engine, which refuses tensors of a GPU that is not there.

    Nodes of the graph run as the engine orders them, the last made first, so that all gradients of a node have come
    when its turn is; what it saved is freed behind it. The list, because whoever holds the loss holds the graph.
    """
    gradient = torch.ones_like(total[0])
    waiting: dict[int, tuple[Any, dict[int, Tensor]]] = {}
    _pass_on(waiting, total.pop().grad_fn, 0, gradient)
    with torch.no_grad(), GraphExecGroup():
        while waiting:
            node, gradients = waiting.pop(max(waiting))
            edges = _run(node, gradients)
            del node, gradients
            while edges:
                _pass_on(waiting, *edges.pop())


def _run(node: Any, gradients: dict[int, Tensor]) -> list[tuple[Any, int, Tensor]]:
    """The gradients by what a node was made of, each with the node that waits for it, and its place there."""
    given = [gradients.get(place) for place in range(len(node._input_metadata))]
    gradients.clear()
    following = node.next_functions
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # its arguments are not all tensors
        results = node.apply(*given)
        results = results if isinstance(results, tuple) else (results,)
        results = tuple(result for result, needed in zip(results, node.needs_input_grad) if needed)
        following = tuple(edge for edge in following if edge[0] is not None)
    else:
        results = node(*given)
        results = results if isinstance(results, tuple) else (results,)
    return [
        (receiver, place, result)
        for (receiver, place), result in zip(following, results, strict=True)
        if receiver is not None and result is not None
    ]


def _pass_on(waiting: dict[int, tuple[Any, dict[int, Tensor]]], node: Any, place: int, gradient: Tensor) -> None:
    """Adds a gradient to those a node waits for, in the shape and dtype that it expects; weights take it at once."""
    meta = node._input_metadata[place]
    if gradient.shape != meta.shape:
        gradient = gradient.sum_to_size(meta.shape)
    gradient = gradient.to(meta.dtype)
    if hasattr(node, "variable"):
        node.variable.grad.add_(gradient)
        return
    _, gradients = waiting.setdefault(node._sequence_nr(), (node, {}))
    gradients[place] = gradients[place] + gradient if place in gradients else gradient
