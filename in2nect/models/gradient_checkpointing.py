"""Gradient checkpointing (Chen et al. 2016): a block's activations are not kept for the backward pass but worked out
again in it. It costs about one more forward pass of what is checkpointed. Outputs, gradients, the statistics of batch
norm and random numbers stay the same.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle


class Checkpointed(nn.Module):
    """A block that keeps only its inputs while ``gradient_checkpointing`` is set; its ``forward`` knows nothing of it.

    A module whose input a tap takes must not lie within one: it would be captured again in the backward pass.
    """

    gradient_checkpointing = False

    def __call__(self, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)
        return super().__call__(*inputs)


def checkpoint_blocks(model: nn.Module, enabled: bool) -> int:
    """Set every ``Checkpointed`` block of the model and every timm network in it; returns how many there are."""
    places = 0
    for module in _outermost(model):
        places += 1
        if isinstance(module, Checkpointed):
            module.gradient_checkpointing = enabled
        else:
            module.set_grad_checkpointing(enabled)
    return places


def keep_statistics(model: nn.Module) -> list[RemovableHandle]:
    """Let a block that runs again in the backward pass leave the running statistics of its batch norms as they are.

    They would take the same batch in twice, as if their momentum were nearly double. Remove the handles to undo it.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    before = [norm.register_forward_pre_hook(_stop_statistics) for norm in norms]
    # always_call: a recomputation ends by an exception, as soon as what the backward pass needs is there.
    after = [norm.register_forward_hook(_resume_statistics, always_call=True) for norm in norms]
    return before + after


def _outermost(module: nn.Module) -> Iterator[Any]:
    if isinstance(module, Checkpointed) or hasattr(module, "set_grad_checkpointing"):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _stop_statistics(norm: _BatchNorm, inputs: tuple) -> None:
    if norm.training and _in_backward_pass():
        norm.__dict__["_momentum_kept"] = norm.momentum
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.sub_(1)


def _resume_statistics(norm: _BatchNorm, inputs: tuple, output: Any) -> None:
    if "_momentum_kept" in norm.__dict__:
        norm.momentum = norm.__dict__.pop("_momentum_kept")


def _in_backward_pass() -> bool:
    """False while a graph is compiled: the compiler, which does the recomputation itself, updates statistics once."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
