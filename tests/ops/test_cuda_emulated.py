"""The CUDA kernels of csrc/cuda/*_kernels.h where there is no GPU, against the reference in float64: compiled for the
CPU with tests/cuda_emulation, which runs threads as coroutines and tensor-core instructions by the PTX manual.

This holds index arithmetic, fragment layouts, barriers and edge cases; what only a chip can show (its memory ordering,
its exponential, speed) is left to the tests marked ``gpu``.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from in2nect import reference

ROOT = Path(__file__).resolve().parents[2]
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
DTYPES = list(TYPES)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Call(ctypes.Structure):
    """`Arguments` of tests/cuda_emulation/kernels.cpp."""

    _fields_ = [
        ("anchors", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("anchor_count", ctypes.c_int64),
        ("key_count", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("anchor_strides", ctypes.c_int64 * 2),
        ("key_strides", ctypes.c_int64 * 2),
        ("weights", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("log_d", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("grad_anchors", ctypes.c_void_p),
        ("grad_keys", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    folder = ROOT / "tests" / "cuda_emulation"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command += ["-DIN2NECT_EMULATED_DEVICE", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{folder}"]
    command += ["-isystem", str(Path(torch.__file__).parent / "include"), str(folder / "kernels.cpp")]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def forward_and_backward(
    library: ctypes.CDLL, anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log D and the gradients, whose memory is poisoned before."""
    columns = anchors if keys is None else keys
    log_d = torch.full((len(anchors),), torch.nan, dtype=weights.dtype)
    grad_anchors = poisoned_like(anchors)
    grad_keys = anchors.new_empty((0, anchors.shape[1])) if keys is None else poisoned_like(keys)
    pair = ctypes.c_int64 * 2
    call = Call(
        anchors.data_ptr(),
        None if keys is None else (keys.data_ptr() or anchors.data_ptr()),
        len(anchors),
        len(columns),
        anchors.shape[1],
        pair(*anchors.stride()),
        pair(*columns.stride()),
        weights.data_ptr(),
        grad.data_ptr(),
        log_d.data_ptr(),
        temperature,
        grad_anchors.data_ptr(),
        grad_keys.data_ptr(),
    )
    for backward in (0, 1):
        library.emulated_pair_logsumexp(TYPES[anchors.dtype], ctypes.byref(call), backward)
    return log_d, grad_anchors, grad_keys


def poisoned_like(rows: Tensor) -> Tensor:
    """NaN with the strides of rows, whose memory may have gaps."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(rows.shape, rows.stride(), strict=True)) if rows.numel() else 0
    return torch.full((size,), torch.nan, dtype=rows.dtype).as_strided(rows.shape, rows.stride())


def expected(
    anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations in torch, the products in ``dtype`` and sums in at least float32, as autograd differentiates
    them."""
    wide = torch.promote_types(dtype, torch.float32)
    rows = anchors.detach().to(dtype).requires_grad_()
    columns = rows if keys is None else keys.detach().to(dtype).requires_grad_()
    similarity = (rows @ columns.T).to(wide) / temperature
    log_d = torch.logsumexp(similarity + weights.to(wide).log(), dim=1)
    inputs = [rows] if keys is None else [rows, columns]
    reachable = torch.where(torch.isneginf(log_d), 0.0, log_d)
    grads = torch.autograd.grad(reachable, inputs, grad.to(wide))
    zeros = [torch.nan_to_num(g, nan=0.0) for g in grads]  # torch's gradient of an empty log-sum-exp
    return log_d.detach(), zeros[0], zeros[1] if keys is not None else rows.detach()[:0]


def check(
    library: ctypes.CDLL, anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float = 0.5
) -> None:
    """The error against float64 is at most twice (gradients: three times) that of torch in the same dtype."""
    grad = torch.randn(len(anchors), dtype=weights.dtype)
    ours = forward_and_backward(library, anchors, keys, weights, temperature, grad)
    exact = expected(anchors, keys, weights, temperature, grad, torch.float64)
    torchs = expected(anchors, keys, weights, temperature, grad, anchors.dtype)
    floor = torch.finfo(weights.dtype).eps * (64 if anchors.dtype == torch.float64 else 4)
    for name, factor, got, want, peer in zip(("log_d", "anchors", "keys"), (2, 3, 3), ours, exact, torchs, strict=True):
        finite = torch.isfinite(want)
        assert torch.equal(got.double()[~finite], want[~finite]), name
        got, want, peer = got.double()[finite], want[finite], peer.double()[finite]
        allowed = factor * (peer - want).norm() + floor * want.norm()
        assert (got - want).norm() <= allowed, f"{name}: {(got - want).norm():.3g}, allowed {allowed:.3g}"


def unit(count: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dim, dtype=torch.float64), dim=1).to(dtype)


def some_weights(count: int, dtype: torch.dtype) -> Tensor:
    weights = torch.rand(count, dtype=torch.promote_types(dtype, torch.float32))
    weights[::4] = 0.0
    return weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [5, 64, 100])
@pytest.mark.parametrize("keys", [None, 67])
def test_pairs(emulated: ctypes.CDLL, dtype: torch.dtype, dim: int, keys: int | None) -> None:
    anchors = unit(70, dim, dtype)
    columns = None if keys is None else unit(keys, dim, dtype)
    check(emulated, anchors, columns, some_weights(keys or 70, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_a_block(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    check(emulated, unit(261, 32, dtype), None, some_weights(261, dtype))


@pytest.mark.parametrize(("dim", "dtype"), [(130, torch.float64), (200, torch.bfloat16), (500, torch.float32)])
def test_rows_that_do_not_fit_in_shared_memory(emulated: ctypes.CDLL, dim: int, dtype: torch.dtype) -> None:
    check(emulated, unit(19, dim, dtype), unit(35, dim, dtype), some_weights(35, dtype))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keys", [None, 40])
def test_low_temperature(emulated: ctypes.CDLL, keys: int | None, seed: int) -> None:
    """Exponents of some 20 powers of two, whose rounding is the largest error of the gradient."""
    torch.manual_seed(seed)
    columns = None if keys is None else unit(keys, 7, torch.float32)
    check(emulated, unit(60, 7, torch.float32), columns, some_weights(keys or 60, torch.float32), temperature=0.07)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widely_spread_norms(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Terms of one row from 2^-1000 to 2^1000, and a weight of 0 on the longest."""
    rows = (unit(40, 16, torch.float64) * torch.logspace(-3, 1.5, 40, dtype=torch.float64)[:, None]).to(dtype)
    weights = some_weights(40, dtype) * torch.logspace(-20, 20, 40)
    weights[-1] = 0.0
    check(emulated, rows, None, weights, temperature=1.0)
    check(emulated, rows, rows.flip(0)[:30], weights[:30], temperature=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [None, 0, 9])
def test_without_keys(emulated: ctypes.CDLL, dtype: torch.dtype, keys: int | None) -> None:
    """No key, or each of weight 0: -inf, and gradients of 0."""
    anchors = unit(9, 8, dtype)
    columns = None if keys is None else unit(keys, 8, dtype)
    weights = torch.zeros(9 if keys is None else keys, dtype=torch.promote_types(dtype, torch.float32))
    grad = torch.randn(9, dtype=weights.dtype)
    log_d, *grads = forward_and_backward(emulated, anchors, columns, weights, 1.0, grad)
    assert torch.isneginf(log_d).all()
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_without_anchors(emulated: ctypes.CDLL) -> None:
    _, _, grad_keys = forward_and_backward(
        emulated, torch.empty(0, 8), torch.randn(5, 8), torch.ones(5), 1.0, torch.empty(0)
    )
    assert torch.equal(grad_keys, torch.zeros(5, 8))


def test_strides(emulated: ctypes.CDLL) -> None:
    """Transposed rows, every second row, and rows that do not start at multiples of 16 bytes; gradients likewise."""
    dtype = torch.float32
    for rows in (unit(12, 33, dtype).T, unit(66, 16, dtype)[::2], unit(33, 17, dtype)[:, 1:]):
        for keys in (None, rows[5:26]):
            check(emulated, rows, keys, some_weights(33 if keys is None else 21, torch.float32))


def test_more_classes_than_shared_memory_counts(emulated: ctypes.CDLL) -> None:
    draw_and_compare(emulated, torch.randint(0, 5000, (3000,)), 5000, 2, -1.0)


@pytest.mark.parametrize("slack", [-1.0, 0.0, 3.0, 1e5])
@pytest.mark.parametrize("per_class", [1, 7, 150])
@pytest.mark.parametrize("pixels", [0, 1, 300, 5000])
def test_sample_pixels(emulated: ctypes.CDLL, pixels: int, per_class: int, slack: float) -> None:
    """With little slack nearly every class is drawn again by radix select; with much every pixel is a candidate."""
    labels = torch.randint(0, 6, (pixels,))
    labels[: pixels // 2] = 2  # whole warps of one class
    labels[labels == 3] = 255  # class 3 is absent
    labels[labels == 4] = -(2**40)
    draw_and_compare(emulated, labels, 6, per_class, slack)


def draw_and_compare(library: ctypes.CDLL, labels: Tensor, classes: int, per_class: int, slack: float) -> None:
    seed = torch.tensor([-5, 2**40])
    sample = torch.full((classes, per_class), -7)
    library.emulated_sample_pixels(
        ctypes.c_void_p(labels.data_ptr()),
        ctypes.c_int64(len(labels)),
        ctypes.c_int64(classes),
        ctypes.c_int64(per_class),
        ctypes.c_void_p(seed.data_ptr()),
        ctypes.c_int64(255),
        ctypes.c_double(slack),
        ctypes.c_void_p(sample.data_ptr()),
    )
    for row, drawn in zip(sample, reference.sample_pixels(labels, classes, per_class, seed), strict=True):
        assert row.tolist() == drawn.tolist() + [-1] * (per_class - len(drawn))
