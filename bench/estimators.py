"""The intra-class loss under every estimator, one call each, and two ideas for better ones that exist here alone.

What the package offers is called through in2nect.functional. Temperatures that it refuses are computed from the same
expansion in in2nect.reference, to show why they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from in2nect import functional, reference

Loss = Callable[[Tensor, Tensor, int, float, torch.Generator], Tensor]  # rows, classes, K, temperature, draws

Remainder = Literal["every anchor", "drawn anchors", "plain"]

REMAINDERS: tuple[Remainder, ...] = get_args(Remainder)
PAIRS_A_TILE = 2**23  # similarities of a tile of the remainder: 32 MiB of float32, of which autograd keeps a few


@dataclass(frozen=True)
class Estimator:
    """``lowest``: the temperature below which the package refuses it."""

    name: str
    loss: Loss
    random: bool = False
    per_class: int | None = None
    lowest: float = 0.0


def estimators(per_class: list[int]) -> list[Estimator]:
    """moments pooled and class, sampled at each m, and everything sampled at the smallest m."""
    found = [moments("pooled"), moments("class"), *(sampled(m) for m in per_class)]
    return [*found, everything_sampled(min(per_class))]


def exact_loss(rows: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    return functional.intra_class_loss(
        rows, labels, classes, estimator="exact", temperature=temperature, resolution="feature"
    )


def moments(covariance: reference.Covariance) -> Estimator:
    lowest = reference.MINIMUM_TEMPERATURE[covariance]

    def loss(rows: Tensor, labels: Tensor, classes: int, temperature: float, _: torch.Generator) -> Tensor:
        if temperature < lowest:
            return refused_moments(rows, labels, classes, temperature, covariance)
        return functional.intra_class_loss(
            rows, labels, classes, covariance=covariance, temperature=temperature, resolution="feature"
        )

    return Estimator(f"moments {covariance}", loss, lowest=lowest)


def sampled(per_class: int, name: str | None = None) -> Estimator:
    def loss(rows: Tensor, labels: Tensor, classes: int, temperature: float, generator: torch.Generator) -> Tensor:
        return functional.intra_class_loss(
            rows,
            labels,
            classes,
            estimator="sampled",
            per_class=per_class,
            temperature=temperature,
            resolution="feature",
            generator=generator,
        )

    return Estimator(name or f"sampled {per_class}", loss, random=True, per_class=per_class)


def everything_sampled(per_class: int) -> Estimator:
    """As one would first write it: draw pixels of each class and take the loss of these, positives and all."""

    def loss(rows: Tensor, labels: Tensor, classes: int, temperature: float, generator: torch.Generator) -> Tensor:
        chosen = torch.cat(draw(labels, classes, per_class, generator)[0])
        return exact_loss(rows[chosen], labels[chosen], classes, temperature)

    return Estimator(f"everything sampled {per_class}", loss, random=True, per_class=per_class)


def refused_moments(
    rows: Tensor, labels: Tensor, classes: int, temperature: float, covariance: reference.Covariance
) -> Tensor:
    """The expansion at a temperature that the package refuses."""
    u = reference.unit_rows(rows)
    log_d = reference.moments_log_d(u, labels, classes, temperature, covariance)
    return anchor_mean(log_d, labels, classes) - positive_term(u, labels, classes, temperature)


def with_remainder(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    temperature: float,
    per_class: int,
    generator: torch.Generator,
    *,
    form: Remainder = "every anchor",
) -> Tensor:
    """First idea: `moments` with a sampled remainder, over ``per_class`` keys a class.

    With b = u_i.c_k / tau and t = u_i.(u_j - c_k) / tau, the mean over class k of ``e^b (1 + t + t^2/2)`` is exactly
    ``e^b (1 + q)``, q = u_i^T Sigma_k u_i / (2 tau^2). Only ``e^b (e^t - 1 - t - t^2/2)`` is left to the draw.

    "every anchor": of all pixels. "drawn anchors": moments (class) for all pixels, corrected by the mean difference at
    ``per_class`` anchors a class. "plain": of all pixels, without the expansion: what it is worth.
    """
    u = reference.unit_rows(rows)
    drawn_anchors, drawn = draw(labels, classes, per_class, generator)
    counts = torch.bincount(labels, minlength=classes)
    present = [k for k in range(classes) if counts[k] > 0]
    centres = torch.stack([u[labels == k].mean(0) for k in present])
    sigmas = torch.stack([torch.cov(u[labels == k].T, correction=0) for k in present])

    def tile(anchors: Tensor, a: Tensor, u: Tensor, centres: Tensor, sigmas: Tensor) -> Tensor:
        d, expanded = anchors.new_zeros(len(anchors)), anchors.new_zeros(len(anchors))
        for position, k in enumerate(present):
            b = anchors @ centres[position] / temperature
            t = anchors @ (u[drawn[k]] - centres[position]).T / temperature  # [tile, m]
            if form == "plain":
                d = d + b.exp() * t.exp().mean(1)
                continue
            q = ((anchors @ sigmas[position]) * anchors).sum(1) / (2 * temperature**2)
            d = d + b.exp() * (1 + q + (t.exp() - 1 - t - t.square() / 2).mean(1))
            expanded = expanded + (b + q).exp()
        return (a * (d.log() - expanded.log() if form == "drawn anchors" else d.log())).sum()

    weights = torch.where(counts >= 2, 1.0 / counts.clamp(min=1), 0.0).to(u.dtype)[labels]
    if form == "drawn anchors":
        chosen = torch.cat(drawn_anchors)
        weights = torch.where(counts >= 2, 1.0 / counts.clamp(min=1, max=per_class), 0.0).to(u.dtype)[labels[chosen]]
        loss = moments("class").loss(rows, labels, classes, temperature, generator)
        anchors = u[chosen]
    else:
        loss, anchors = -positive_term(u, labels, classes, temperature), u
    size = max(1, PAIRS_A_TILE // sum(len(keys) for keys in drawn))
    for begin in range(0, len(anchors), size):
        part = slice(begin, begin + size)
        loss = loss + checkpoint(tile, anchors[part], weights[part], u, centres, sigmas, use_reentrant=False)
    return loss


def sampled_by_hand(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    temperature: float,
    per_class: int,
    generator: torch.Generator,
    *,
    corrected: bool,
) -> Tensor:
    """Second idea: `sampled` with the bias of the logarithm taken off by the delta method. Dense: for small m."""
    u = reference.unit_rows(rows)
    anchors, keys = draw(labels, classes, per_class, generator)
    counts = torch.bincount(labels, minlength=classes)
    loss = -positive_term(u, labels, classes, temperature)
    for k in range(classes):
        if counts[k] >= 2:
            log_d = sampled_log_d(u[anchors[k]], u, keys, counts, temperature, corrected=corrected)
            loss = loss + log_d.mean()
    return loss


def sampled_log_d(
    anchors: Tensor, u: Tensor, keys: list[Tensor], counts: Tensor, temperature: float, *, corrected: bool
) -> Tensor:
    """log D over drawn keys; corrected, ``+ Var(D) / (2 D^2)`` with the variance of a class's mean as its keys show it:
    ``(1 - m_k / n_k) s_k^2 / m_k``, the finite population's."""
    shift = 1.0 / temperature
    d, variance = anchors.new_zeros(len(anchors)), anchors.new_zeros(len(anchors))
    for k, drawn in enumerate(keys):
        if len(drawn) == 0:
            continue
        e = (anchors @ u[drawn].T / temperature - shift).exp()
        d = d + e.mean(1)
        if corrected and len(drawn) > 1:
            variance = variance + (1 - len(drawn) / int(counts[k])) * e.var(1) / len(drawn)
    return d.log() + shift + (variance / (2 * d.square()) if corrected else 0.0)


def exact_log_d(u: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """log D of every row over every row, (N,); without a gradient, by tiles."""
    weights = (1.0 / torch.bincount(labels, minlength=classes).clamp(min=1)).to(u.dtype)[labels]
    tiles = [reference.exact_log_d(part, u, weights, temperature) for part in u.split(max(1, PAIRS_A_TILE // len(u)))]
    return torch.cat(tiles)


def draw(labels: Tensor, classes: int, per_class: int, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Anchors and keys, a list of indices a class, as `sampled` draws them."""
    anchors, keys = (
        reference.sample_pixels(labels, classes, per_class, seed)
        for seed in reference.draw_seeds(generator, labels.device)
    )
    return anchors, keys


def positive_term(u: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """``sum_k (||S_k||^2 - sum_i ||u_i||^2) / (n_k (n_k - 1) tau)`` over classes of two pixels or more."""
    terms = [
        (of_class.sum(0).square().sum() - of_class.square().sum()) / (len(of_class) * (len(of_class) - 1))
        for of_class in _by_class(u, labels, classes)
        if len(of_class) >= 2
    ]
    return torch.stack(terms).sum() / temperature


def anchor_mean(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``sum_k mean_{i in k} values_i`` over classes of two pixels or more."""
    return torch.stack([one.mean() for one in _by_class(values, labels, classes) if len(one) >= 2]).sum()


def class_sums(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(K, d), summed in float64."""
    return values.new_zeros(classes, values.shape[1], dtype=torch.float64).index_add(0, labels, values.double())


def relative_norm(difference: Tensor, whole: Tensor) -> float:
    return float(torch.linalg.vector_norm(difference.double()) / torch.linalg.vector_norm(whole.double()))


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error where there are two values or more."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _by_class(values: Tensor, labels: Tensor, classes: int) -> Iterator[Tensor]:
    return (values[labels == k] for k in range(classes))
