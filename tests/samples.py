"""Features and labels that the tests of the losses share: long-tailed classes, absent and singleton ones, ignored
pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def clustered(
    num_classes: int = 5,
    dim: int = 6,
    *,
    batch: int = 2,
    features: tuple[int, int] = (5, 4),
    labels: tuple[int, int] | None = None,
    layout: str = "contiguous",
    absent: tuple[int, ...] = (),
    singleton: int | None = None,
    ignored: float = 0.1,
    spread: float = 0.5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features (batch, dim, *features) around class centres and labels (batch, *labels) with a long tail."""
    generator = torch.Generator().manual_seed(seed)
    labels = labels or features
    odds = torch.tensor([0.0 if k in absent or k == singleton else 0.5**k for k in range(num_classes)])
    y = torch.multinomial(odds, batch * labels[0] * labels[1], replacement=True, generator=generator)
    y[torch.rand(len(y), generator=generator) < ignored] = 255
    if singleton is not None:
        y[len(y) // 2] = singleton
    y = y.view(batch, *labels)
    centres = torch.randn(num_classes + 1, dim, generator=generator, dtype=torch.float64)
    rows = (2 * torch.arange(features[0]) + 1) * labels[0] // (2 * features[0])
    columns = (2 * torch.arange(features[1]) + 1) * labels[1] // (2 * features[1])
    at_grid = y[:, rows[:, None], columns].clamp(max=num_classes)
    noise = torch.randn(batch, *features, dim, generator=generator, dtype=torch.float64)
    z = (centres[at_grid] + spread * noise).permute(0, 3, 1, 2).to(dtype)  # (batch, dim, h, w), channels last in memory
    if layout == "contiguous":
        return z.contiguous(), y
    if layout == "channels_last":
        return z, y
    if layout == "strided":  # every other cell of a larger tensor, a channel slice
        large = torch.zeros(batch, dim + 3, 2 * features[0], 2 * features[1], dtype=dtype)
        view = large[:, 2 : 2 + dim, ::2, 1::2]
        view.copy_(z)
        return view, y
    raise ValueError(layout)
