"""What every loss checks of its features and labels, and how labels meet the feature grid. No arithmetic of the
losses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Resolution = Literal["label", "feature"]
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_inputs(features: Tensor, labels: Tensor, num_classes: int, resolution: str) -> None:
    """Raise on wrong shapes, dtypes, devices, class count or resolution; label values are :func:`check_values`'s.

    Args:
        features: (B, d, h, w) or (N, d), floating point.
        labels: (B, H, W) for the former, (N,) for the latter; uint8, int32 or int64.
        num_classes: K, at least 2.
        resolution: "label" or "feature".

    Raises:
        ValueError: shape, K or resolution.
        TypeError: dtype.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; the losses compare classes and need at least 2.")
    if resolution not in ("label", "feature"):
        raise ValueError(f'resolution is {resolution!r}; expected "label" or "feature".')
    if features.dtype not in FEATURE_DTYPES:
        raise TypeError(f"features are {features.dtype}; expected one of {_names(FEATURE_DTYPES)}.")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels are {labels.dtype}; expected one of {_names(LABEL_DTYPES)}: call labels.long().")
    if features.device != labels.device:
        raise ValueError(f"features are on {features.device} and labels on {labels.device}; move one to the other.")
    if features.dim() not in (2, 4):
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (B, d, h, w) or (N, d).")
    if features.dim() == 4 and labels.dim() == 4 and labels.shape[1] == 1:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected (B, H, W). "
            "Drop the channel axis with labels.squeeze(1)."
        )
    expected = "(B, H, W)" if features.dim() == 4 else "(N,)"
    if labels.dim() != features.dim() - 1 or labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; "
            f"expected labels {expected} with the same first size."
        )
    if features.dim() == 4 and labels.numel() > 0 and 0 in features.shape[2:]:
        raise ValueError(f"features have shape {tuple(features.shape)}: an empty grid cannot be laid under labels.")


def check_values(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise on labels that are neither a class nor ``ignore_index``.

    On the CPU the error names each such value and how many pixels carry it. On CUDA nothing waits for the device: a
    device-side assertion stops the stream, and the next synchronisation reports it.

    Raises:
        ValueError: such a label on the CPU.
    """
    wide = widen(labels)
    wrong = ((wide < 0) | (wide >= num_classes)) & (wide != ignore_index)
    if labels.device.type == "cuda":
        torch._assert_async(
            ~wrong.any(), f"in2nect: a label is neither in 0..{num_classes - 1} nor ignore_index={ignore_index}"
        )
        return
    if wrong.any():
        values, pixels = wide[wrong].unique(return_counts=True)
        found = [f"{value} ({count} pixels)" for value, count in zip(values.tolist(), pixels.tolist(), strict=True)]
        shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more values" if len(found) > 8 else "")
        raise ValueError(
            f"labels hold {shown}; expected 0..{num_classes - 1} or ignore_index={ignore_index}. "
            "Map these labels to classes, raise num_classes, or pass the value as ignore_index."
        )


def valid_mask(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Boolean, the labels' shape: which pixels carry a class (an ``ignore_index`` inside 0..K-1 is ignored too)."""
    wide = widen(labels)
    return (wide >= 0) & (wide < num_classes) & (wide != ignore_index)


def to_feature_grid(labels: Tensor, height: int, width: int) -> Tensor:
    """Labels (B, H, W) at a (height, width) grid by nearest neighbour, (B, height, width).

    Cell i takes label ``floor((2 i + 1) H / (2 height))``, in integers: the pixel under the cell's centre, as
    ``nearest-exact`` does and as align_corners=False implies.
    """
    if tuple(labels.shape[1:]) == (height, width):
        return labels
    rows = (2 * torch.arange(height, device=labels.device) + 1) * labels.shape[1] // (2 * height)
    columns = (2 * torch.arange(width, device=labels.device) + 1) * labels.shape[2] // (2 * width)
    return labels[:, rows[:, None], columns]


def as_grid(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, d) rows and (N,) labels seen as a (1, d, 1, N) grid, without a copy; a grid is returned as it is."""
    if features.dim() == 4:
        return features, labels
    return features.T[None, :, None], labels[None, None]


def widen(labels: Tensor) -> Tensor:
    """Labels in a type in which comparing with any K up to 32,767 or any usual ignore_index cannot wrap around."""
    return labels.to(torch.int16) if labels.dtype == torch.uint8 else labels


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
