"""The kernels of pair_logsumexp against the reference: in the interpreter in float64 and float32, on a GPU in all."""

import mmap
import tempfile

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from in2nect import ops, reference
from in2nect.kernels import pair_logsumexp as kernels
from in2nect.kernels import table
from in2nect.kernels.table import EVERY, FLOATS, Entry

PAIR_KERNELS = ("pair_symmetric_forward", "pair_symmetric_backward", "pair_forward", "pair_backward")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a few rows make many, and that rows come in parts."""
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 16}
    for name in PAIR_KERNELS:
        monkeypatch.setitem(table.TABLE, name, (Entry(EVERY, FLOATS, 1024, blocks, 4, 1, "test"),))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the host functions allocate without filling it holds NaN, or the lowest integer."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        if tensor.dtype == torch.bool:
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

    monkeypatch.setattr(kernels.torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(kernels.torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def sample(anchors, keys=None, dim=5, dtype=torch.float64, device="cpu", spread=1.0, zero_weights=True):
    rows = torch.nn.functional.normalize(torch.randn(anchors, dim, dtype=torch.float64), dim=1)
    rows = rows * (1 + (spread - 1) * torch.rand(anchors, 1, dtype=torch.float64))
    columns = None if keys is None else torch.randn(keys, dim, dtype=torch.float64).to(device, dtype).requires_grad_()
    weights = torch.rand(anchors if keys is None else keys, dtype=torch.float64) + 0.01
    if zero_weights:
        weights[::4] = 0.0
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return rows.to(device, dtype).requires_grad_(), columns, weights.to(device, accumulator)


def agree(rows, columns, weights, temperature, rtol=1e-11):
    ours = ops.pair_logsumexp(rows, weights, temperature, keys=columns)
    theirs = reference.exact_log_d(rows, rows if columns is None else columns, weights, temperature)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    inputs = [rows] if columns is None else [rows, columns]
    upstream = torch.randn_like(ours)
    upstream[1::5] = 0.0
    pairs = zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-11 * float(expected.norm()))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("n", "dim"), [(1, 3), (2, 16), (31, 5), (64, 17), (96, 33), (123, 16)])
def test_symmetric(triton_device, small_tiles, n, dim, deterministic):
    """Odd and even numbers of tiles, tiles that fit and that do not, rows in one part and in several."""
    rows, _, weights = sample(n, dim=dim, device=triton_device, zero_weights=n > 2)
    torch.use_deterministic_algorithms(deterministic)
    try:
        agree(rows, None, weights, 0.7)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("n", "dim"), [(252, 24), (123, 65)])
def test_symmetric_with_the_tables_tiles(triton_device, n, dim):
    rows, _, weights = sample(n, dim=dim, device=triton_device)
    agree(rows, None, weights, 1.0)


@pytest.mark.parametrize(
    ("spread", "temperature"), [(10.0, 1.0), (40.0, 0.5), (1.0, 0.01)], ids=["wide", "wider", "cold"]
)
@pytest.mark.parametrize("zero_weights", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_of_widely_spread_norms(triton_device, small_tiles, spread, temperature, zero_weights, deterministic):
    """Where the constant shift would underflow the flag goes up and the running maximum does the work."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        _widely_spread_norms(triton_device, spread, temperature, zero_weights, deterministic)
    finally:
        torch.use_deterministic_algorithms(False)


def _widely_spread_norms(triton_device, spread, temperature, zero_weights, deterministic):
    rows, _, weights = sample(
        70, dim=8, device=triton_device, spread=spread, zero_weights=zero_weights, dtype=torch.float64
    )
    shape = kernels.symmetric(
        kernels.as_rows(rows.detach()),
        kernels.PerRow(weights),
        kernels.inverse(temperature, kernels.as_rows(rows.detach())),
        normalize=False,
    )
    assert bool(shape.flag) == (spread > 1 or zero_weights or deterministic)
    agree(rows, None, weights, temperature)


def test_without_the_gate_the_shift_underflows(triton_device, small_tiles, monkeypatch):
    """The test above can fail: float32, spread 40, and D comes out 0."""
    rows, _, weights = sample(70, dim=8, device=triton_device, spread=40.0, dtype=torch.float32, zero_weights=False)
    expected = reference.exact_log_d(rows.double(), rows.double(), weights.double(), 0.5)
    found = ops.pair_logsumexp(rows, weights, 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    monkeypatch.setattr(kernels, "WIDEST_SPREAD", float("inf"))
    assert torch.isinf(ops.pair_logsumexp(rows, weights, 0.5)).any()


@pytest.mark.parametrize(("anchors", "keys", "dim"), [(1, 1, 3), (40, 7, 16), (33, 70, 33), (5, 0, 4), (0, 5, 4)])
def test_anchors_against_keys(triton_device, small_tiles, anchors, keys, dim):
    rows, columns, weights = sample(anchors, keys, dim, device=triton_device)
    if keys == 1:
        weights[:] = 0.5
    if keys == 0:
        assert torch.isneginf(ops.pair_logsumexp(rows, weights, 1.0, keys=columns)).all()
        return
    agree(rows, columns, weights, 0.5)


def test_no_key_has_weight(triton_device, small_tiles):
    rows, columns, weights = sample(6, 9, device=triton_device)
    log_d = ops.pair_logsumexp(rows, torch.zeros_like(weights), 1.0, keys=columns)
    assert torch.isneginf(log_d).all()
    grads = torch.autograd.grad(torch.where(torch.isinf(log_d), 0.0, log_d).sum(), [rows, columns])
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("keys", [None, 7])
def test_gradcheck(triton_device, small_tiles, keys):
    rows, columns, weights = sample(9, keys, device=triton_device)
    inputs = (rows,) if keys is None else (rows, columns)
    assert gradcheck(lambda r, *c: ops.pair_logsumexp(r, weights, 0.7, keys=c[0] if c else None), inputs)


@pytest.mark.parametrize("keys", [None, 7])
def test_opcheck(triton_device, keys):
    rows, columns, weights = sample(9, keys, device=triton_device)
    opcheck(torch.ops.in2nect.pair_logsumexp, (rows, columns, weights, 0.7))
    log_d = ops.pair_logsumexp(rows, weights, 0.7, keys=columns).detach()
    detached = None if columns is None else columns.detach()
    arguments = (torch.randn_like(log_d), log_d, rows.detach(), detached, weights, 0.7)
    opcheck(torch.ops.in2nect.pair_logsumexp_backward, arguments)


def test_strided_rows(triton_device, small_tiles):
    wide = torch.randn(50, 24, dtype=torch.float64, device=triton_device)
    weights = torch.rand(50, dtype=torch.float64, device=triton_device)
    for rows in (wide[:, ::2], wide[:, 3:15], wide.T.contiguous().T[:, :12]):
        agree(rows.detach().requires_grad_(), None, weights, 1.0)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the interpreter has no such dtype")
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, GPU]),
    pytest.param(torch.float16, marks=[pytest.mark.gpu, GPU]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "keys", "dim"), [(252, None, 24), (507, None, 64), (123, None, 123), (123, 252, 48)])
def test_error_against_torch_in_the_same_dtype(triton_device, n, keys, dim, dtype):
    rows, columns, weights = sample(n, keys, dim, dtype, triton_device, zero_weights=False)
    upstream = torch.randn(n, dtype=torch.float64, device=triton_device)

    def run(function, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (rows, columns) if t is not None]
        w = weights.to(torch.float64 if dtype == torch.float64 else dtype)
        log_d = function(*inputs, w)
        grads = torch.autograd.grad(log_d, inputs, upstream.to(log_d.dtype))
        return log_d.double(), [grad.double() for grad in grads]

    def plain(anchors, *rest):
        return reference.exact_log_d(anchors, rest[0] if keys else anchors, rest[-1], 1.0)

    def fused(anchors, *rest):
        return ops.pair_logsumexp(anchors, weights, 1.0, keys=rest[0] if keys else None)

    truth, true_grads = run(plain, torch.float64)
    torch_value, torch_grads = run(plain, dtype)
    value, grads = run(fused, dtype)
    epsilon = torch.finfo(torch.float32).eps
    assert (value - truth).abs().max() <= 2 * (torch_value - truth).abs().max() + 2 * epsilon
    for grad, torch_grad, true_grad in zip(grads, torch_grads, true_grads, strict=True):
        error, torch_error = (grad - true_grad).norm(), (torch_grad - true_grad).norm()
        assert error <= 3 * torch_error + epsilon * true_grad.norm()


def test_the_order_of_programs_does_not_show_in_deterministic_mode(triton_device, small_tiles, monkeypatch):
    """In the interpreter programs run one after the other: here forwards, then backwards."""
    if triton_device == "cuda":
        pytest.skip("on a GPU test_a_thousand_runs does this")
    from triton.runtime.interpreter import interpreter_builder

    rows, _, weights = sample(300, dim=8, dtype=torch.float32)
    set_index, order = interpreter_builder.set_grid_idx, {"step": 1}

    def remapped(x, y, z):
        grid = interpreter_builder.grid_dim
        set_index(x if order["step"] > 0 else grid[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", remapped)
    results = {}
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for order["step"] in (1, -1):
            results[deterministic, order["step"]] = ops.pair_logsumexp(rows.detach(), weights, 1.0)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[True, 1], results[True, -1])
    assert not torch.equal(results[False, 1], results[False, -1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_thousand_runs(triton_device):
    rows, _, weights = sample(5000, dim=64, dtype=torch.bfloat16, device=triton_device)
    upstream = torch.randn(5000, device=triton_device)
    torch.use_deterministic_algorithms(True)
    try:
        first = None
        for _ in range(1000):
            log_d = ops.pair_logsumexp(rows, weights, 1.0)
            (grad,) = torch.autograd.grad(log_d, rows, upstream)
            first = first or (log_d, grad)
            assert torch.equal(log_d, first[0])
            assert torch.equal(grad, first[1])
    finally:
        torch.use_deterministic_algorithms(False)


def test_how_tiles_find_their_pixels():
    features = torch.empty((16, 1024, 1024, 1024), dtype=torch.bfloat16, device="meta")
    rows = kernels.as_rows(features)
    assert rows.number == 2**24
    assert rows.walk(128, 64) == kernels.WITHIN_IMAGE.value
    assert rows.wide
    assert not kernels.as_rows(features[:1, :512]).wide
    crop = features[:2, :64, :10, :11]
    assert kernels.as_rows(crop).walk(128) == kernels.ANYWHERE.value
    assert kernels.as_rows(crop, wide_loads=True).walk(128) == kernels.ONE_STRIDE.value


@pytest.mark.parametrize(
    ("shape", "copied"),
    [
        ((2, 16, 8, 16), False),
        ((1, 16, 1, 77), True),
        ((1, 16, 1, 80), False),
        ((2, 16, 8, 8), True),
        ((2, 5, 8, 16), False),
    ],
)
def test_only_what_cannot_be_loaded_at_once_is_copied(triton_device, small_tiles, shape, copied):
    """NCHW; as channels_last the width alone counts."""
    features = torch.randn(shape, dtype=torch.float64, device=triton_device)
    for z, expected in (
        (features, copied),
        (features.contiguous(memory_format=torch.channels_last), shape[1] % 16 != 0),
    ):
        rows = kernels.as_rows(z, wide_loads=True)
        assert (rows.features.data_ptr() != z.data_ptr()) == expected
        weights = kernels.PerRow(torch.rand(rows.number, dtype=torch.float64, device=triton_device))
        log_d = torch.empty(rows.number, dtype=torch.float64, device=triton_device)
        kernels.forward(rows, weights, 1.0, log_d, normalize=True)
        unit = reference.unit_rows(z.permute(0, 2, 3, 1).flatten(0, 2))
        torch.testing.assert_close(log_d, reference.exact_log_d(unit, unit, weights.values, 1.0))


def test_a_batch_of_large_images():
    features = torch.empty((16, 1024, 1024, 1024), dtype=torch.bfloat16, device="meta")
    assert kernels.as_rows(features.to(memory_format=torch.channels_last)).walk(128) == kernels.ONE_STRIDE.value


def test_offsets_in_64_bits(triton_device):
    """Rows 2^30 numbers apart, whose stride fits in 32 bits and whose offsets do not, of one sparse file in memory."""
    if triton_device == "cuda":
        pytest.skip("maps a file of the CPU")
    with tempfile.TemporaryFile() as file:
        apart = 2**30
        file.truncate((3 * apart + 8) * 4)
        flat = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float32)
        rows = flat.as_strided((4, 4), (apart, 1))
        rows.copy_(torch.randn(4, 4))
        weights = torch.tensor([0.3, 0.7, 0.1, 0.2])
        found = ops.pair_logsumexp(rows, weights, 1.0)
        torch.testing.assert_close(found, reference.exact_log_d(rows, rows, weights, 1.0))
