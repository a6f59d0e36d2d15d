"""The one way an operator is registered with PyTorch: schema, eager kernel, fake, autograd, and second derivatives
refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Fragments, so that a reload in one process (notebooks) extends the namespace instead of failing on its second
# definition.
_library = torch.library.Library("in2nect", "FRAGMENT")


def define(schema: str, kernel: Callable, fake: Callable) -> None:
    """Define ``in2nect::<schema>`` with an eager kernel for CPU and CUDA and a fake one for tracing.

    Under autocast an operator takes the features' dtype as it is and accumulates in float32 or float64: autocast is off
    inside it.
    """
    name = "in2nect::" + schema[: schema.index("(")]

    def in_full_precision(*arguments: Any) -> Any:
        device_type = next(a.device.type for a in arguments if isinstance(a, torch.Tensor))
        with torch.autocast(device_type=device_type, enabled=False):
            return kernel(*arguments)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, ("cpu", "cuda"), in_full_precision, lib=_library)
    torch.library.register_fake(name, fake, lib=_library)


def differentiable(name: str, backward: Callable, setup_context: Callable) -> None:
    """Connect an operator to its backward operator."""
    torch.library.register_autograd(f"in2nect::{name}", backward, setup_context=setup_context, lib=_library)


def once_differentiable(name: str) -> None:
    """Make differentiating a backward operator an error which says what to use instead."""

    def refuse(context: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            f"in2nect::{name} has no derivative: the fused losses are once differentiable. "
            "For second derivatives use the function of the same name in in2nect.reference."
        )

    differentiable(name, refuse, lambda ctx, inputs, output: None)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 features, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
