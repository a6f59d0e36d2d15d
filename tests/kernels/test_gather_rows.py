"""The Triton kernels of ``gather_rows`` against the reference, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from in2nect import ops, reference
from in2nect.ops.backend import use_backend
from tests.samples import clustered

kernels = pytest.importorskip("in2nect.kernels.gather_rows")
table = pytest.importorskip("in2nect.kernels.table")

# (h, w) of the features, (H, W) that the indices count, memory layout of the features
GRIDS = (
    ((5, 4), (5, 4), "contiguous"),
    ((5, 4), (5, 4), "transposed"),
    ((5, 4), (10, 8), "channels_last"),
    ((3, 4), (12, 16), "strided"),
    ((2, 3), (16, 24), "contiguous"),
    ((5, 7), (13, 9), "transposed"),
    ((5, 4), (3, 2), "channels_last"),
    ((6, 1), (4, 5), "contiguous"),
    ((1, 1), (3, 2), "contiguous"),
)
SMALL = {
    "gather_rows_forward": {"BLOCK_P": 16, "BLOCK_D": 16},
    "gather_rows_through_norms": {"BLOCK_P": 16, "BLOCK_D": 16},
    "gather_rows_entries": {"BLOCK_P": 16},
    "gather_rows_add": {"BLOCK_D": 16},
}
GARBAGE = -123456789  # of integers that no kernel wrote

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def small_tiles(monkeypatch):
    for name, blocks in SMALL.items():
        entry = table.Entry(table.EVERY, table.FLOATS, 1024, blocks, warps=4, stages=1, reason="test")
        monkeypatch.setitem(table.TABLE, name, (entry,))


@pytest.fixture
def fresh(monkeypatch):
    """What the host functions allocate, filled with NaN or garbage before a kernel sees it."""
    memory: list[torch.Tensor] = []

    class Poisoned:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *arguments, **keywords):
            return self._fill(torch.empty(*arguments, **keywords))

        def empty_like(self, *arguments, **keywords):
            return self._fill(torch.empty_like(*arguments, **keywords))

        def _fill(self, tensor):
            memory.append(tensor)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE)

    monkeypatch.setattr(kernels, "torch", Poisoned())
    return memory


def make_features(dim, cells, layout="contiguous", device="cpu", dtype=torch.float64, batch=2):
    kind = "contiguous" if layout == "transposed" else layout
    features, _ = clustered(3, dim, batch=batch, features=cells, layout=kind, dtype=dtype)
    if layout == "transposed":  # dense, but no one stride walks along its rows
        features = features.mT.contiguous().mT
    return features.to(device)


def make_indices(count, pixels, device="cpu", batch=2):
    """Some pixels more than once, and some that are none."""
    indices = torch.randint(0, batch * pixels[0] * pixels[1], (count,))
    indices[::7] = -1
    indices[3:6] = indices[2:3]
    return indices.to(device)


def both(features, indices, pixels, normalize, upstream):
    """Rows and the features' gradient by the operator."""
    features = features.detach().requires_grad_()
    rows = ops.gather_rows(features, indices, *pixels, normalize=normalize)
    (gradient,) = torch.autograd.grad(rows, features, upstream.to(rows))
    assert gradient.dtype == features.dtype
    assert gradient.stride() == torch.zeros_like(features).stride()
    return rows.detach(), gradient


def expected(features, indices, pixels, normalize, upstream):
    """The same out of upsampled features."""
    features = features.detach().requires_grad_()
    rows = reference.label_resolution_rows(features, *pixels).permute(0, 2, 3, 1).flatten(0, 2)
    rows = (reference.unit_rows(rows) if normalize else rows)[indices] * (indices >= 0)[:, None]
    (gradient,) = torch.autograd.grad(rows, features, upstream)
    return rows.detach(), gradient


def check(features, indices, pixels, normalize):
    upstream = torch.randn(len(indices), features.shape[1], dtype=torch.float64, device=features.device)
    got = both(features, indices, pixels, normalize, upstream)
    want = expected(features, indices, pixels, normalize, upstream)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def assert_written(memory):
    assert memory
    for tensor in memory:
        assert not tensor.isnan().any() if tensor.is_floating_point() else (tensor != GARBAGE).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_grids_and_layouts(triton_device, small_tiles, fresh, grids, normalize):
    cells, pixels, layout = grids
    features = make_features(6, cells, layout, triton_device)
    check(features, make_indices(50, pixels, triton_device), pixels, normalize)
    assert_written(fresh)


@pytest.mark.parametrize("dim", [1, 3, 16, 24, 65, 130])
def test_widths(triton_device, small_tiles, fresh, dim):
    features = make_features(dim, (4, 3), device=triton_device)
    check(features, make_indices(20, (7, 6), triton_device), (7, 6), True)
    assert_written(fresh)


@pytest.mark.parametrize("count", [1, 123])
def test_table_entries(triton_device, fresh, count):
    features = make_features(70, (6, 5), "channels_last", triton_device)
    check(features, make_indices(count, (11, 9), triton_device), (11, 9), True)
    assert_written(fresh)


def test_widest_rows(triton_device, fresh):
    features = make_features(1024, (2, 3), device=triton_device)
    check(features, make_indices(9, (3, 4), triton_device), (3, 4), True)
    assert_written(fresh)


@pytest.mark.parametrize("pixels", [(3, 3), (5, 6)])
def test_one_pixel_many_times(triton_device, small_tiles, pixels):
    features = make_features(5, (3, 3), device=triton_device)
    check(features, torch.full((40,), 4, device=triton_device), pixels, True)


@pytest.mark.parametrize("pixels", [(3, 3), (6, 6)])
def test_no_row_at_all(triton_device, pixels):
    features = make_features(5, (3, 3), device=triton_device)
    for indices in (torch.full((20,), -1), torch.empty(0, dtype=torch.int64)):
        upstream = torch.randn(len(indices), 5, dtype=torch.float64, device=triton_device)
        rows, gradient = both(features, indices.to(triton_device), pixels, True, upstream)
        assert rows.shape == (len(indices), 5) and not rows.any()
        assert not gradient.any()


@pytest.mark.parametrize("tiny", [0.0, 1e-13])
def test_zero_rows(triton_device, small_tiles, tiny):
    features = make_features(6, (4, 3))
    features[:, :, 1:3] = tiny / 6**0.5
    check(features.to(triton_device), torch.arange(2 * 7 * 3, device=triton_device), (7, 3), True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cells_without_weight_are_not_read(triton_device, small_tiles, value):
    """Of label pixels on the centres of cells, and of those beyond the last centre."""
    features = torch.randn(1, 4, 3, 3, dtype=torch.float64, device=triton_device)
    clean = features.clone()
    features[:, :, 1], clean[:, :, 1] = value, 0
    indices = torch.arange(9, device=triton_device)[:3]  # of (9, 3): three rows a cell, the first beyond its centre
    upstream = torch.randn(3, 4, dtype=torch.float64, device=triton_device)
    got, want = (both(z, indices, (9, 3), True, upstream) for z in (features, clean))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_large_grids_keep_their_pixels(triton_device):
    """Beyond 2^23 pixels along an axis a position no longer fits into float32."""
    rows = torch.arange(2**23 + 8, dtype=torch.float32, device=triton_device)[None, None, None]
    pixel = torch.tensor([2**23 + 1], device=triton_device)
    assert ops.gather_rows(rows, pixel, 1, 2**23 + 8).tolist() == [[2.0**23 + 1]]
    two = torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64, device=triton_device)
    pixel = torch.tensor([2**25 + 1], device=triton_device)
    assert ops.gather_rows(two, pixel, 1, 2**26).item() == 1 + (2**26 + 3) / 2**26 - 0.5


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pixels", [(2, 2), (3, 4)])
def test_gradcheck(triton_device, pixels, normalize):
    features = make_features(2, (2, 2), device=triton_device, batch=1).requires_grad_()
    indices = torch.tensor([0, 3, 3, -1, pixels[0] * pixels[1] - 1], device=triton_device)
    assert gradcheck(lambda z: ops.gather_rows(z, indices, *pixels, normalize=normalize), features)


def test_opcheck(triton_device):
    features = make_features(3, (3, 3), device=triton_device)
    indices = make_indices(9, (6, 6), triton_device)
    opcheck(torch.ops.in2nect.gather_rows, (features.requires_grad_(), indices, 6, 6, True))
    grad = torch.randn(9, 3, dtype=torch.float64, device=triton_device)
    opcheck(torch.ops.in2nect.gather_rows_backward, (grad, features.detach(), indices, 6, 6, True))


def assert_as_precise(device, features, indices, pixels, normalize):
    """The error against float64 is at most twice (gradients: three times) that of the equations in torch."""
    upstream = torch.randn(len(indices), features.shape[1])
    exact = expected(features.double(), indices, pixels, normalize, upstream.double())
    arguments = (features.to(device), indices.to(device), pixels, normalize, upstream.to(device))
    with use_backend("triton"):
        got = both(*arguments)
    with use_backend("reference"):
        theirs = both(*arguments)
    for index, factor in ((0, 2), (1, 3)):
        errors = [float((x[index].cpu().double() - exact[index]).abs().max()) for x in (got, theirs)]
        # where torch is exact to the last bit, so are we but for one rounding
        rounding = torch.finfo(got[index].dtype).eps * float(exact[index].abs().max())
        assert errors[0] <= max(factor * errors[1], rounding), (index, errors)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pixels", [(5, 7), (13, 9)])
def test_float32_is_as_precise_as_torch(triton_device, normalize, pixels):
    features = make_features(24, (5, 7), dtype=torch.float32)
    assert_as_precise(triton_device, features, make_indices(100, pixels), pixels, normalize)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pixels", [(64, 48), (256, 192), (100, 77)])
@pytest.mark.parametrize("dim", [16, 64, 130])
def test_precision_on_a_gpu(dtype, layout, normalize, pixels, dim):
    features = make_features(dim, (64, 48), layout, dtype=torch.float32).to(dtype)
    assert_as_precise("cuda", features, make_indices(1792, pixels), pixels, normalize)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("normalize", [False, True])
def test_the_same_bits_every_time_and_in_a_graph(normalize):
    features = make_features(64, (64, 48), device="cuda", dtype=torch.float32)
    indices = make_indices(1792, (256, 192), "cuda")
    upstream = torch.randn(1792, 64, device="cuda")
    first = both(features, indices, (256, 192), normalize, upstream)
    for _ in range(100):
        again = both(features, indices, (256, 192), normalize, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(features, indices, (256, 192), normalize, upstream)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured))
