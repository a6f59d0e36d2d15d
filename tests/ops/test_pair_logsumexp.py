import importlib

import pytest
import torch
from torch.library import opcheck

from in2nect import functional, native, ops, reference, use_backend

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
def test_halves_accumulate_in_float32(cpu_backend, keys, dtype):
    """The reference rounds its gradients once; a chip with products of bfloat16 rounds the coefficients too."""
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
        rounded_once = (theirs.to(dtype).double() - theirs).norm()
        assert (ours.double() - theirs).norm() <= (1.1 if cpu_backend == "reference" else 3) * rounded_once + 1e-6
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


needs_cuda = pytest.mark.skipif(
    not (native.available("cuda") and torch.cuda.is_available()),
    reason=native.why_not("cuda") or "needs a CUDA device",
)


def on_cuda(anchors, keys, dim, dtype):
    rows, columns, weights = sample(anchors, keys, dim, torch.float64)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [t.detach().cuda().to(dtype).requires_grad_() for t in (rows, columns) if t is not None]
    return inputs, weights.to("cuda", accumulator)


def exact(inputs, weights, temperature, dtype, upstream):
    """The equations in torch in ``dtype``: log D and the gradients."""
    wide = [t.detach().to(dtype).requires_grad_() for t in inputs]
    log_d = reference.exact_log_d(wide[0], wide[-1], weights.to(dtype), temperature)
    return log_d.detach(), *torch.autograd.grad(log_d, wide, upstream.to(dtype))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 5, 64, 100, 128, 500])
@pytest.mark.parametrize("keys", [None, 1, 67, 1000])
def test_cuda_kernels(keys, dim, dtype):
    """The error against float64 is at most twice (gradients: three times) that of torch in the same dtype."""
    inputs, weights = on_cuda(300, keys, dim, dtype)
    weights[0] = 0.5  # no row without a key, at which torch's gradient is NaN
    upstream = torch.randn(300, device="cuda", dtype=weights.dtype)
    with use_backend("cuda"):
        log_d = ops.pair_logsumexp(inputs[0], weights, 0.5, keys=None if keys is None else inputs[1])
        found = log_d.detach(), *torch.autograd.grad(log_d, inputs, upstream)
    expected = exact(inputs, weights, 0.5, torch.float64, upstream)
    peers = exact(inputs, weights, 0.5, dtype, upstream)
    floor = (64 if dtype == torch.float64 else 4) * torch.finfo(weights.dtype).eps
    for factor, ours, want, peer in zip((2, 3, 3), found, expected, peers, strict=False):
        assert (ours - want).norm() <= factor * (peer - want).norm() + floor * want.norm()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("keys", [None, 0, 5])
def test_cuda_kernels_without_keys(keys):
    """No key, each of weight 0, and no anchor."""
    inputs, weights = on_cuda(9, keys, 8, torch.float32)
    with use_backend("cuda"):
        log_d = ops.pair_logsumexp(inputs[0], weights * 0, 1.0, keys=None if keys is None else inputs[1])
        assert torch.isneginf(log_d).all()
        assert not any(grad.any() for grad in torch.autograd.grad(log_d, inputs, torch.ones_like(log_d)))
        if keys == 5:
            log_d = ops.pair_logsumexp(inputs[0][:0], weights, 1.0, keys=inputs[1])
            assert not torch.autograd.grad(log_d.sum(), inputs[1])[0].any()


@pytest.mark.gpu
@needs_cuda
def test_cuda_kernels_on_widely_spread_norms_and_any_strides():
    rows = torch.randn(120, 33, device="cuda", dtype=torch.float64) * torch.logspace(-3, 1.5, 120).cuda()[:, None]
    weights = torch.logspace(-20, 20, 120).double().cuda()
    weights[-1] = 0.0
    for view in (rows, rows.T.contiguous().T, torch.cat([rows, rows], 1)[:, 33:], rows[::2]):
        inputs = [view.detach().requires_grad_()]
        with use_backend("cuda"):
            log_d = ops.pair_logsumexp(inputs[0], weights[: len(view)], 1.0)
            grad = torch.autograd.grad(log_d.sum(), inputs)[0]
        want, want_grad = exact(inputs, weights[: len(view)], 1.0, torch.float64, torch.ones_like(log_d))
        torch.testing.assert_close(log_d.detach(), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-11 * float(want_grad.norm()))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [None, 3000])
def test_cuda_kernels_have_the_same_bits_every_time(keys, dtype):
    inputs, weights = on_cuda(4000, keys, 64, dtype)

    def run():
        log_d = ops.pair_logsumexp(inputs[0], weights, 0.5, keys=None if keys is None else inputs[1])
        return log_d.detach(), *torch.autograd.grad(log_d, inputs, torch.ones_like(log_d))

    with use_backend("cuda"):
        first = run()
        for _ in range(100):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("error")
def test_the_exact_loss_runs_on_the_cuda_kernels():
    """Without a warning of a slow path: the pairs, all of its O(N^2) work, are the kernels'."""
    features = torch.randn(2, 16, 20, 24, device="cuda", requires_grad=True)
    labels = torch.randint(0, 5, (2, 20, 24), device="cuda")
    losses, grads = [], []
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            loss = functional.intra_class_loss(features.double() if backend == "reference" else features, labels, 5,
                                               estimator="exact")  # fmt: skip
            grads.append(torch.autograd.grad(loss, features)[0])
            losses.append(loss.detach().double())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert (grads[0] - grads[1]).norm() <= 1e-4 * grads[1].norm()
