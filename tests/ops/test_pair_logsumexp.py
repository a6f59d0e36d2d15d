import importlib

import pytest
import torch
from torch.library import opcheck

from in2nect import ops, reference

module = importlib.import_module("in2nect.ops.pair_logsumexp")  # its name in the package is the function


def sample(anchors=9, keys=None, dim=5, dtype=torch.float64):
    rows = torch.nn.functional.normalize(torch.randn(anchors, dim, dtype=dtype), dim=1).requires_grad_()
    columns = None
    if keys is not None:
        columns = torch.randn(keys, dim, dtype=dtype).requires_grad_()
    weights = torch.rand(anchors if keys is None else keys, dtype=dtype)
    weights[::4] = 0.0
    return rows, columns, weights


@pytest.mark.parametrize("keys", [None, 0, 1, 13])
@pytest.mark.parametrize("tile", [1, 30, 2**22])
def test_values_and_gradients(monkeypatch, keys, tile):
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    rows, columns, weights = sample(keys=keys)
    ours = ops.pair_logsumexp(rows, weights, 0.5, keys=columns)
    theirs = reference.exact_log_d(rows, rows if columns is None else columns, weights, 0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    if keys in (0, 1):
        assert torch.isneginf(ours).all()  # no key, or one of weight 0
        assert not torch.autograd.grad(torch.where(torch.isinf(ours), 0.0, ours).sum(), rows)[0].any()
        return
    inputs = [rows] if columns is None else [rows, columns]
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("keys", [None, 6])
def test_opcheck(keys):
    rows, columns, weights = sample(keys=keys)
    opcheck(torch.ops.in2nect.pair_logsumexp, (rows, columns, weights, 0.7))
    log_d = ops.pair_logsumexp(rows, weights, 0.7, keys=columns).detach()
    grad = torch.randn_like(log_d)
    detached = None if columns is None else columns.detach()
    opcheck(torch.ops.in2nect.pair_logsumexp_backward, (grad, log_d, rows.detach(), detached, weights, 0.7))


def test_memory_does_not_grow_with_the_square():
    """One tile's similarities at a time, whatever N."""
    for n in (100, 10_000, 1_000_000):
        largest = max((s.stop - s.start) * n for s in module._tiles(n, n))
        assert largest <= max(module.TILE_ELEMENTS, n)
    covered = [i for s in module._tiles(1001, 10**6) for i in range(s.start, s.stop)]
    assert covered == list(range(1001))


@pytest.mark.parametrize("keys", [None, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_accumulate_in_float32(keys, dtype):
    rows, columns, weights = sample(keys=keys, dtype=torch.float32)
    inputs = [t.detach().to(dtype).requires_grad_() for t in (rows, columns) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    found = ops.pair_logsumexp(inputs[0], weights, 0.5, keys=inputs[1] if keys else None)
    expected = reference.exact_log_d(wide[0], wide[-1], weights.double(), 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(len(rows))
    grads = torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, wide, upstream.double())
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= 1.1 * (theirs.to(dtype).double() - theirs).norm() + 1e-6
    arguments = (inputs[0], inputs[1] if keys else None, weights, 0.5)
    opcheck(torch.ops.in2nect.pair_logsumexp, arguments)


def test_errors():
    rows, _, weights = sample()
    with pytest.raises(TypeError, match=r"anchors are torch\.float64, keys torch\.float32 and weights torch\.float64"):
        ops.pair_logsumexp(rows, weights, 1.0, keys=rows.detach().float())
    with pytest.raises(ValueError, match=r"one a key, \(9,\)"):
        ops.pair_logsumexp(rows, weights[:-1], 1.0)
    with pytest.raises(ValueError, match="expected \\(N, d\\) and \\(M, d\\)"):
        ops.pair_logsumexp(rows, weights, 1.0, keys=torch.randn(9, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="temperature is 0"):
        ops.pair_logsumexp(rows, weights, 0.0)
    with pytest.raises(ValueError, match=r"weights.detach\(\)"):
        ops.pair_logsumexp(rows, weights.requires_grad_(), 1.0)
