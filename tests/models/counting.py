"""Multiply-adds of a forward pass, counted as published figures count them. On the meta device it costs nothing."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ATEN = torch.ops.aten


def gmac(model: nn.Module, side: int) -> tuple[float, float]:
    """Of one 3 x side x side image, 10^9: convolutions and matrix products alone; and with batch norm at 2 a value,
    layer norm at 5 and bilinear resizing at 4.
    """
    model = model.to("meta").eval()
    other = {  # the counter wants operations, two a multiply-add
        ATEN._native_batch_norm_legit_no_training: _batch_norm,
        ATEN.native_batch_norm: _batch_norm,
        ATEN.native_layer_norm: _layer_norm,
        ATEN.upsample_bilinear2d: _resize,
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=other) as counter:
        model(torch.empty(1, 3, side, side, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(operator, 0) for operator in (ATEN.convolution, ATEN.bmm))
    return products / 2e9, counter.get_total_flops() / 2e9


def _batch_norm(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return 4 * torch.Size(shapes[0]).numel()


def _layer_norm(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return 10 * torch.Size(shapes[0]).numel()


def _resize(*_: Any, out_shape: Any = None, **__: Any) -> int:
    return 8 * torch.Size(out_shape).numel()
