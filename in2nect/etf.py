"""Simplex equiangular tight frames: K unit vectors with pairwise cosine -1/(K-1) (Eqs. 1, 2 and 4), the classifier that
inter-class tuning pulls the class means towards. Built once, on the CPU in float64; O(K d^2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def simplex_etf(
    num_classes: int,
    dim: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Vertices of a randomly rotated simplex ETF.

    ``sqrt(K / (K - 1)) V H^T`` with H (K, K - 1) the Helmert basis of the complement of the ones vector and V (d, K -
    1) random with orthonormal columns. It meets Eq. 2 to rounding for every d >= K - 1, where Eq. 1 needs d >= K.

    Args:
        num_classes: K, at least 2.
        dim: d, at least K - 1.
        seed: of the rotation. The draw is made on the CPU in float64, so it is the same on every device.
        dtype: of the result.
        device: of the result.

    Returns:
        (K, d): row k is the unit vertex of class k.

    Raises:
        ValueError: K < 2, or d < K - 1.
    """
    check_etf_shape(num_classes, dim, minimum_dim=num_classes - 1)
    frame = random_orthonormal(dim, num_classes - 1, seed)  # (d, K - 1)
    scale = (num_classes / (num_classes - 1)) ** 0.5
    vertices = scale * helmert_basis(num_classes) @ frame.T  # (K, d)
    return vertices.to(dtype=dtype, device=device if device is not None else torch.get_default_device())


class EtfClassifier(nn.Module):
    """The fixed classifier: logits of rows against the vertices of a simplex ETF. It has a buffer and no parameters.

    Args:
        num_classes: K.
        dim: d, at least K - 1.
        seed: of the vertices, see :func:`simplex_etf`.
    """

    weight: Tensor

    def __init__(self, num_classes: int, dim: int, *, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("weight", simplex_etf(num_classes, dim, seed=seed))

    def forward(self, rows: Tensor) -> Tensor:
        """Logits (..., K) of rows (..., d)."""
        return rows @ self.weight.to(rows.dtype).T

    def extra_repr(self) -> str:
        return f"num_classes={self.weight.shape[0]}, dim={self.weight.shape[1]}"


def check_etf_shape(num_classes: int, dim: int, *, minimum_dim: int) -> None:
    """Raise ValueError unless a simplex ETF of this many classes exists in this dimension."""
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a simplex ETF needs at least 2 classes.")
    if dim < minimum_dim:
        raise ValueError(
            f"{num_classes} classes in {dim} dimensions: a simplex ETF needs dim >= {minimum_dim}. "
            f"Tap a wider representation, or widen it with In2NeCTLoss(..., projection={minimum_dim} or more)."
        )


def helmert_basis(num_classes: int) -> Tensor:
    """(K, K - 1) float64, orthonormal columns that are all orthogonal to the ones vector (Helmert's contrasts)."""
    basis = torch.zeros(num_classes, num_classes - 1, dtype=torch.float64, device="cpu")
    for j in range(1, num_classes):
        basis[:j, j - 1] = 1.0
        basis[j, j - 1] = -float(j)
        basis[:, j - 1] /= (j * (j + 1)) ** 0.5
    return basis


def random_orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns) float64 with orthonormal columns, uniform over such matrices and a function of the seed alone."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaussian = torch.randn(rows, columns, dtype=torch.float64, generator=generator, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()  # QR is unique, and q uniform, once r's diagonal is positive
