"""How far the estimator of the intra-class loss is from the exact loss (Eq. 6), on a few thousand pixels of a batch.

Every pair is taken there, in float64: O(n^2 d) for n pixels, a tenth of a second for 4,096 on a CPU. It reads the
features and leaves them, their graph and torch's random numbers alone; on CUDA it waits for the device. Of several
processes it looks at one's batch, and speaks to none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from in2nect.labels import as_grid, check_inputs, to_feature_grid, valid_mask
from in2nect.loss import In2NeCTLoss, IntraClassLoss

PIXELS = 4096  # of an audit, at most


class IntraAudit(NamedTuple):
    """What :func:`audit_intra` finds.

    Attributes:
        gradient_error: ``|estimated - exact| / |exact|`` of the gradients by the pixels' features, L2 over all of them.
        bias: ``(estimated - exact) / |exact|`` of the losses.
        pixels: how many were compared.
    """

    gradient_error: float
    bias: float
    pixels: int


def audit_intra(
    loss: IntraClassLoss, features: Tensor, labels: Tensor, *, seed: int | Sequence[int], pixels: int = PIXELS
) -> IntraAudit | None:
    """Compares a loss with ``estimator="exact"`` on pixels drawn from a batch.

    Every class present gives an equal share of the pixels, or all it has, since the loss counts classes alike,
    whatever their size: a uniform draw would miss the rare ones, and compare another loss. At label resolution the
    pixels are the labels', with interpolated features; else cells of the feature grid. Rounding is not looked at: both
    losses are worked out in float64.

    Args:
        loss: whose estimator, temperature and resolution are compared.
        features: (B, d, h, w) or (N, d), as the loss is given them: behind its projection, where it has one.
        labels: (B, H, W) or (N,).
        seed: of the draw; integers, none negative.
        pixels: how many to draw at most.

    Returns:
        None where no class has two pixels among those drawn: there is no pair to compare.

    Raises:
        ValueError, TypeError: shapes and dtypes that the loss would refuse.
    """
    check_inputs(features, labels, loss.num_classes, loss.resolution)
    with torch.inference_mode(False), torch.autocast(features.device.type, enabled=False):
        random = np.random.default_rng(seed)
        with torch.no_grad():
            rows, classes = _draw(loss, features.detach(), labels, pixels, random)
        if len(rows) == 0 or int(classes.bincount().max()) < 2:
            return None
        generator = torch.Generator(rows.device).manual_seed(int(random.integers(2**62)))
        estimated, estimated_gradient = _differentiated(_of_one_process(loss), rows, classes, generator)
        exact, exact_gradient = _differentiated(_exact(loss), rows, classes, None)
    return IntraAudit(
        gradient_error=_ratio(torch.linalg.vector_norm(estimated_gradient - exact_gradient), exact_gradient),
        bias=_ratio(estimated - exact, exact),
        pixels=len(rows),
    )


@contextmanager
def seen_by(criterion: In2NeCTLoss) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list to which each call of the losses adds the features that they compare, behind the projection where there is
    one, and the labels; detached, while the context is open. No second projection, whose BatchNorm would take note."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, given: tuple[Tensor, Tensor]) -> None:
        seen.append((given[0].detach(), given[1]))

    def note_projected(_: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        features, labels = seen.pop()
        seen.append((result.detach() if features.dim() == 4 else result.detach().flatten(1), labels))

    handles = [criterion.register_forward_pre_hook(note)]
    if criterion.projection is not None:
        handles.append(criterion.projection.register_forward_hook(note_projected))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def most_pixels(num_classes: int, pixels: int = PIXELS) -> int:
    """Pixels of each class in an audit where all classes have enough of them."""
    return pixels // num_classes


def _exact(loss: IntraClassLoss) -> IntraClassLoss:
    return IntraClassLoss(
        loss.num_classes,
        estimator="exact",
        temperature=loss.temperature,
        normalize=loss.normalize,
        ignore_index=loss.ignore_index,
        process_group=None,
    )


def _of_one_process(loss: IntraClassLoss) -> IntraClassLoss:
    alone = copy.copy(loss)
    alone.process_group = None
    return alone


def _draw(
    loss: IntraClassLoss, features: Tensor, labels: Tensor, pixels: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Rows (n, d) in float64 and their classes (n,)."""
    grid, grid_labels = as_grid(features, labels)
    if loss.resolution == "feature":
        grid_labels = to_feature_grid(grid_labels, *grid.shape[2:])
    flat = grid_labels.flatten()
    flat = torch.where(valid_mask(flat, loss.num_classes, loss.ignore_index), flat.long(), -1)
    counts = torch.bincount(flat + 1, minlength=loss.num_classes + 1)[1:].tolist()
    chosen = []
    left = pixels
    for position, k in enumerate(sorted(range(loss.num_classes), key=lambda k: counts[k])):
        share = min(counts[k], left // (loss.num_classes - position))  # what small classes leave goes to the others
        left -= share
        members = (flat == k).nonzero().squeeze(1)
        drawn = np.sort(random.choice(counts[k], share, replace=False)) if share else np.zeros(0, np.int64)
        chosen.append(members[torch.from_numpy(drawn).to(members.device)])
    indices = torch.cat(chosen)
    return _rows_at(grid, indices, *grid_labels.shape[1:]), flat[indices]


def _rows_at(grid: Tensor, indices: Tensor, height: int, width: int) -> Tensor:
    """Features (B, d, h, w), bilinearly at pixels of a (B, height, width) grid, align_corners=False: (n, d)."""
    image, place = indices // (height * width), indices % (height * width)
    (top, bottom, down), (left, right, across) = (
        _neighbours(place // width, grid.shape[2], height),
        _neighbours(place % width, grid.shape[3], width),
    )

    def at(row: Tensor, column: Tensor) -> Tensor:
        return grid[image, :, row, column].double()

    above = torch.lerp(at(top, left), at(top, right), across[:, None])
    below = torch.lerp(at(bottom, left), at(bottom, right), across[:, None])
    return torch.lerp(above, below, down[:, None])


def _neighbours(position: Tensor, cells: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells beside each pixel of a side, and the weight of the second."""
    exact = ((position.double() + 0.5) * (cells / pixels) - 0.5).clamp(min=0, max=cells - 1)
    first = exact.long()
    return first, (first + 1).clamp(max=cells - 1), exact - first


def _differentiated(
    loss: IntraClassLoss, rows: Tensor, classes: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = rows.clone().requires_grad_()
        value = loss(leaf, classes, generator=generator)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _ratio(difference: Tensor, exact: Tensor) -> float:
    norm = torch.linalg.vector_norm(exact)
    return float(difference / norm.clamp(min=torch.finfo(norm.dtype).tiny))
