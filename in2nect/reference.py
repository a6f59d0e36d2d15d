"""The equations of In2NeCT, written as on paper: the oracle of every test. Everything is materialised (upsampled rows,
the N x N similarities), everything is differentiable any number of times, and float64 inputs stay float64.

Shen et al., "In2NeCT: Inter-class and Intra-class Neural Collapse Tuning for Semantic Segmentation of Imbalanced Remote
Sensing Images"; equation numbers are the paper's. Where the paper is silent or slips, ``docs/mathematics.md`` says what
was decided. Signatures are those of :mod:`in2nect.functional`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from in2nect import etf as _etf
from in2nect.labels import Resolution, as_grid, check_inputs, check_values, to_feature_grid, valid_mask

Estimator = Literal["moments", "exact", "sampled"]
Covariance = Literal["pooled", "class"]
Denominator = Literal["vertices", "means"]

# Below these temperatures the second-order expansion is off by more than a few percent (docs/mathematics.md,
# "Estimators").
MINIMUM_TEMPERATURE = {"pooled": 0.5, "class": 0.2}
ZERO_ROW_NORM = 1e-12  # a row no longer than this counts as zero: its direction is undefined and its gradient zero


def simplex_etf(
    num_classes: int,
    dim: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    construction: Literal["helmert", "paper"] = "helmert",
) -> Tensor:
    """Simplex ETF vertices (K, d). "paper": Eq. 1, ``sqrt(K/(K-1)) U (I - 11^T/K)``, which needs d >= K."""
    if construction == "helmert":
        return _etf.simplex_etf(num_classes, dim, seed=seed, dtype=dtype, device=device)
    _etf.check_etf_shape(num_classes, dim, minimum_dim=num_classes)
    u = _etf.random_orthonormal(dim, num_classes, seed)  # (d, K)
    centring = torch.eye(num_classes, dtype=torch.float64, device="cpu") - 1.0 / num_classes
    vertices = (num_classes / (num_classes - 1)) ** 0.5 * (u @ centring)  # (d, K)
    return vertices.T.to(dtype=dtype, device=device if device is not None else torch.get_default_device())


def class_means(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    resolution: Resolution = "label",
) -> tuple[Tensor, Tensor]:
    """``zbar_k = (1/n_k) sum_{i in k} z_i`` (Eq. 3; the sum is missing in print). An absent class has mean 0 and count
    0."""
    z, y = labelled_rows(features, labels, num_classes, ignore_index=ignore_index, resolution=resolution)
    sums = z.new_zeros(num_classes, z.shape[1]).index_add(0, y, z)
    counts = torch.bincount(y, minlength=num_classes)
    return sums / counts.clamp(min=1)[:, None].to(z.dtype), counts


def inter_class_loss(means: Tensor, counts: Tensor, etf: Tensor, *, denominator: Denominator = "vertices") -> Tensor:
    """Cross-entropy of each present class's mean against the vertices.

    "vertices" (Eq. 10): ``-sum_k log( exp(zbar_k.w_k) / sum_k' exp(zbar_k.w_k') )``, k' over all vertices.
    "means" (Eq. 5 as printed): the denominator is ``sum_k' exp(zbar_k'.w_k')``, k' over the present classes.
    """
    if denominator not in ("vertices", "means"):
        raise ValueError(f'denominator is {denominator!r}; expected "vertices" (Eq. 10) or "means" (Eq. 5).')
    loss = means[:0].sum()  # a zero that is connected to the graph
    present = [k for k in range(len(counts)) if counts[k] > 0]
    etf = etf.to(means.dtype)
    for k in present:
        if denominator == "vertices":
            competitors = torch.stack([means[k] @ etf[other] for other in range(len(etf))])
        else:
            competitors = torch.stack([means[other] @ etf[other] for other in present])
        loss = loss - (means[k] @ etf[k] - torch.logsumexp(competitors, dim=0))
    return loss


def intra_class_loss(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    estimator: Estimator = "moments",
    covariance: Covariance = "pooled",
    per_class: int = 256,
    temperature: float = 1.0,
    normalize: bool = True,
    ignore_index: int = 255,
    resolution: Resolution = "label",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Eq. 6: ``-sum_k mean_{i in k} mean_{i' in k, i' != i} [ s_ii' - log D_i ]`` over classes with two pixels or more,
    ``D_i = sum_k' mean_{j in k'} exp(s_ij)``, ``s_ij = u_i.u_j / temperature``. The positive term is exact in every
    estimator; they differ in log D.
    """
    check_settings(estimator, covariance, temperature, normalize)
    z, y = labelled_rows(features, labels, num_classes, ignore_index=ignore_index, resolution=resolution)
    u = unit_rows(z) if normalize else z
    counts = torch.bincount(y, minlength=num_classes)
    if estimator == "exact":
        log_d = exact_log_d(u, u, (1.0 / counts.to(u.dtype))[y], temperature)
        anchors = torch.arange(len(u), device=u.device)
    elif estimator == "sampled":
        seeds = draw_seeds(generator, u.device)
        grid_labels = _row_labels(features, labels, resolution)
        mask = valid_mask(grid_labels, num_classes, ignore_index).flatten()
        position = torch.full((mask.numel(),), -1, device=u.device)
        position[mask] = torch.arange(len(u), device=u.device)
        drawn = [sample_pixels(grid_labels, num_classes, per_class, s, ignore_index=ignore_index) for s in seeds]
        anchors, keys = (position[torch.cat(indices)] for indices in drawn)
        drawn_counts = torch.bincount(y[keys], minlength=num_classes).to(u.dtype)
        log_d = exact_log_d(u[anchors], u[keys], (1.0 / drawn_counts)[y[keys]], temperature)
    else:
        log_d = moments_log_d(u, y, num_classes, temperature, covariance)
        anchors = torch.arange(len(u), device=u.device)

    loss = u[:0].sum()
    for k in range(num_classes):
        n = int(counts[k])
        if n >= 2:
            similarity = u[y == k] @ u[y == k].T / temperature
            off_diagonal = similarity.sum() - similarity.diagonal().sum()
            loss = loss + log_d[y[anchors] == k].mean() - off_diagonal / (n * (n - 1))
    return loss


def check_settings(estimator: str, covariance: str, temperature: float, normalize: bool) -> None:
    """Raise ValueError on settings of the intra-class loss that do not exist or do not hold together."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number.")
    if estimator not in ("moments", "exact", "sampled"):
        raise ValueError(f'estimator is {estimator!r}; expected "moments", "exact" or "sampled".')
    if covariance not in MINIMUM_TEMPERATURE:
        raise ValueError(f'covariance is {covariance!r}; expected "pooled" or "class".')
    if estimator != "moments":
        return
    if not normalize:
        raise ValueError(
            'estimator="moments" with normalize=False: raw similarities are unbounded, and the expansion fails. '
            'Use estimator="exact" or "sampled", or normalize=True.'
        )
    if temperature < MINIMUM_TEMPERATURE[covariance]:
        raise ValueError(
            f'temperature is {temperature}; estimator="moments" holds for temperature >= '
            f'{MINIMUM_TEMPERATURE["pooled"]} (covariance="pooled") or >= {MINIMUM_TEMPERATURE["class"]} ("class"). '
            'Below that use estimator="exact" or "sampled".'
        )


def exact_log_d(anchors: Tensor, keys: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """``log sum_j weights_j exp(anchors_i.keys_j / temperature)``, (number of anchors,)."""
    return torch.logsumexp(anchors @ keys.T / temperature + weights.log(), dim=1)


def moments_log_d(u: Tensor, y: Tensor, num_classes: int, temperature: float, covariance: Covariance) -> Tensor:
    """log D_i with each class's mean exponential replaced by its second-order cumulant expansion, (N,).

    "class": ``LSE_k( u.c_k/tau + u^T Sigma_k u / (2 tau^2) )`` over the present classes; "pooled": the quadratic with
    the mean of the Sigma_k, outside the log-sum-exp.
    """
    present = [k for k in range(num_classes) if bool((y == k).any())]
    if not present:
        return u.new_zeros(0)
    centres = torch.stack([u[y == k].mean(0) for k in present])  # (K', d)
    sigmas = torch.stack([torch.cov(u[y == k].T, correction=0).reshape(u.shape[1], u.shape[1]) for k in present])
    linear = u @ centres.T / temperature  # (N, K')
    if covariance == "class":
        quadratic = torch.einsum("nd,kde,ne->nk", u, sigmas, u) / (2 * temperature**2)
        return torch.logsumexp(linear + quadratic, dim=1)
    quadratic = torch.einsum("nd,de,ne->n", u, sigmas.mean(0), u) / (2 * temperature**2)
    return torch.logsumexp(linear, dim=1) + quadratic


def sample_pixels(
    labels: Tensor, num_classes: int, per_class: int, seed: Tensor, *, ignore_index: int = 255
) -> list[Tensor]:
    """For each class the flat indices of its ``min(per_class, n_k)`` pixels with the smallest hash, ascending by hash.

    Args:
        labels: any shape; index i is the i-th pixel in row-major order.
        seed: (2,) int64: seed and step.
    """
    hashes = hash_pixels(labels.numel(), *(int(s) for s in seed))
    valid = valid_mask(labels, num_classes, ignore_index).flatten().cpu().numpy()
    flat = labels.flatten().cpu().numpy()
    chosen = []
    for k in range(num_classes):
        members = np.flatnonzero(valid & (flat == k))
        order = members[np.argsort(hashes[members], kind="stable")][:per_class]
        chosen.append(torch.from_numpy(order).to(labels.device))
    return chosen


def hash_pixels(pixels: int, seed: int, step: int) -> np.ndarray:
    """(pixels,) uint64 below 2^63: ``mix(mix(seed + g (step + 1)) + g (i + 1)) >> 1``, with SplitMix64's g and mix."""
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    stream = mix(np.array([seed & (2**64 - 1)], np.uint64) + golden * np.array([(step + 1) & (2**64 - 1)], np.uint64))
    return mix(stream + golden * np.arange(1, pixels + 1, dtype=np.uint64)) >> np.uint64(1)


def draw_seeds(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(2, 2) int64: one (seed, step) for the anchors and one for the keys, out of the generator or torch's own."""
    where = generator.device if generator is not None else device
    seeds = torch.randint(2**62, (2, 2), generator=generator, device=where)
    return seeds.to(device, non_blocking=True)


def unit_rows(rows: Tensor) -> Tensor:
    """``z / max(||z||, 1e-12)``; a row that short passes no gradient, since its direction is undefined."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    is_zero = norms <= ZERO_ROW_NORM
    # the inner where keeps 0/0 out of the branch that is not taken, whose gradient would be NaN
    return torch.where(is_zero, (rows / ZERO_ROW_NORM).detach(), rows / torch.where(is_zero, 1.0, norms))


def label_resolution_rows(features: Tensor, height: int, width: int) -> Tensor:
    """Features (B, d, h, w) bilinearly brought to (height, width), align_corners=False; (B, d, height, width)."""
    if tuple(features.shape[2:]) == (height, width):
        return features
    return F.interpolate(features, size=(height, width), mode="bilinear", align_corners=False)


def all_rows(features: Tensor, labels: Tensor, *, resolution: Resolution) -> tuple[Tensor, Tensor]:
    """The row and the label of every pixel, ignored ones too: (N, d) in float32 or float64, and (N,)."""
    grid, grid_labels = as_grid(features, labels)
    grid = grid if grid.dtype == torch.float64 else grid.float()
    if resolution == "label":
        grid = label_resolution_rows(grid, *grid_labels.shape[1:])
    return grid.permute(0, 2, 3, 1).flatten(0, 2), _row_labels(features, labels, resolution).flatten()


def labelled_rows(
    features: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int, resolution: Resolution
) -> tuple[Tensor, Tensor]:
    """Rows (N, d) and classes (N,) int64 of the labelled pixels, after every check of :mod:`in2nect.labels`."""
    check_inputs(features, labels, num_classes, resolution)
    check_values(labels, num_classes, ignore_index)
    rows, flat = all_rows(features, labels, resolution=resolution)
    mask = valid_mask(flat, num_classes, ignore_index)
    return rows[mask], flat[mask].long()


def collapse_degrees(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    resolution: Resolution = "feature",
    global_mean: Literal["classes", "pixels"] = "classes",
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """The paper's two collapse degrees (Table 2), repaired; both are 0 at full collapse.

    ``delta_inter = mean_{k != k'} | cos(zbar_k - z_G, zbar_k' - z_G) + 1/(K'-1) |`` over the K' present classes, and
    ``delta_intra = mean_i ||z_i - zbar_{y_i}||^2``, on unit rows by default since it scales with ||z||^2.

    Args:
        global_mean: z_G is the mean of the class means ("classes", balanced) or of the pixels ("pixels", as defined).
        normalize: of delta_intra's rows; delta_inter is of the raw rows.

    Returns:
        Two scalars; NaN where fewer than two classes (delta_inter) or no pixel (delta_intra) is there.
    """
    z, y = labelled_rows(features, labels, num_classes, ignore_index=ignore_index, resolution=resolution)
    present = [k for k in range(num_classes) if bool((y == k).any())]
    if not present:
        return z.new_tensor(float("nan")), z.new_tensor(float("nan"))
    means = torch.stack([z[y == k].mean(0) for k in present])
    centred = means - (means.mean(0) if global_mean == "classes" else z.mean(0))
    cosines = F.cosine_similarity(centred[:, None], centred[None], dim=2)
    off_diagonal = ~torch.eye(len(present), dtype=torch.bool, device=z.device)
    delta_inter = (cosines[off_diagonal] + 1.0 / max(len(present) - 1, 1)).abs().mean()

    rows = unit_rows(z) if normalize else z
    scatter = torch.stack([((rows[y == k] - rows[y == k].mean(0)) ** 2).sum() for k in present])
    return delta_inter, scatter.sum() / len(rows)


def _row_labels(features: Tensor, labels: Tensor, resolution: Resolution) -> Tensor:
    """The label of each row, (B, h, w) or (B, H, W)."""
    grid, grid_labels = as_grid(features, labels)
    return to_feature_grid(grid_labels, *grid.shape[2:]) if resolution == "feature" else grid_labels
