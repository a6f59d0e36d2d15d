"""The Triton kernels of ``class_sums`` against the reference, in the interpreter or on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from in2nect import ops, reference
from in2nect.labels import to_feature_grid
from in2nect.ops.backend import use_backend
from tests.samples import clustered

kernels = pytest.importorskip("in2nect.kernels.class_sums")
table = pytest.importorskip("in2nect.kernels.table")

MODES = tuple(itertools.product((False, True), (False, True)))  # normalize, squares
# (h, w) of the features, (H, W) of the labels, memory layout of the features
GRIDS = (
    ((5, 4), (5, 4), "contiguous"),
    ((5, 4), (5, 4), "channels_last"),
    ((5, 4), (5, 4), "strided"),
    ((5, 4), (5, 4), "channel_slice"),
    ((5, 4), (5, 4), "transposed"),
    ((5, 4), (10, 8), "channel_slice"),
    ((3, 4), (12, 16), "contiguous"),
    ((2, 2), (16, 16), "channels_last"),
    ((5, 7), (13, 9), "strided"),
    ((5, 4), (3, 2), "transposed"),
    ((6, 1), (4, 5), "contiguous"),
    ((1, 3), (7, 3), "channels_last"),
    ((1, 1), (3, 2), "contiguous"),
)
# So small that a handful of pixels makes several tiles, programs and parts of a row.
SMALL = {
    "class_sums_same_grid": {"BLOCK_P": 16, "BLOCK_D": 16, "PROGRAMS": 1},
    "class_sums_counts": {"BLOCK_P": 64, "PROGRAMS": 1},
    "class_sums_norms": {"BLOCK_P": 64, "BLOCK_D": 16, "PROGRAMS": 1},
    "class_sums_cells": {"BLOCK_P": 16, "BLOCK_D": 16, "PROGRAMS": 1},
    "class_sums_add": {"BLOCK_S": 2, "BLOCK_E": 16},
    "class_sums_backward_same_grid": {"BLOCK_P": 16, "BLOCK_D": 16},
    "class_sums_backward_cells": {"BLOCK_P": 16, "BLOCK_D": 16},
    "class_sums_backward_cells_curved": {"BLOCK_P": 16, "BLOCK_D": 16},
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
    memory: list[Tensor] = []

    class Poisoned:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *arguments, **keywords):
            return self._fill(torch.empty(*arguments, **keywords))

        def empty_like(self, *arguments, **keywords):
            return self._fill(torch.empty_like(*arguments, **keywords))

        def _fill(self, tensor):
            memory.append(tensor)
            if tensor.dtype == torch.bool:
                return tensor.fill_(False)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE)

    monkeypatch.setattr(kernels, "torch", Poisoned())
    return memory


def assert_written(memory):
    assert memory
    for tensor in memory:
        if tensor.is_floating_point():
            assert not tensor.isnan().any()
        elif tensor.dtype == torch.bool:
            assert tensor.all()  # no label is wrong
        else:
            assert (tensor != GARBAGE).all()


def sample(num_classes, dim, cells, pixels, layout="contiguous", device="cpu", **settings):
    """Features and labels of :func:`tests.samples.clustered`, in two more layouts."""
    kind = layout if layout in ("contiguous", "channels_last", "strided") else "contiguous"
    features, labels = clustered(num_classes, dim, features=cells, labels=pixels, layout=kind, **settings)
    if layout == "channel_slice":  # one stride walks through the pixels, and it is not the number of channels
        large = torch.zeros(*features.permute(0, 2, 3, 1).shape[:3], dim + 3, dtype=features.dtype)
        large[..., 2:-1] = features.permute(0, 2, 3, 1)
        features = large[..., 2:-1].permute(0, 3, 1, 2)
    if layout == "transposed":  # dense, but no one stride walks along its rows
        features = features.mT.contiguous().mT
    return features.to(device), labels.to(device)


def expected(features, labels, num_classes, normalize, squares, upstream, ignore_index=255, resolution="label"):
    """Sums, counts, squares and the features' gradient, by the reference and autograd."""
    features = features.detach().requires_grad_()
    z, y = reference.labelled_rows(features, labels, num_classes, ignore_index=ignore_index, resolution=resolution)
    rows = reference.unit_rows(z) if normalize else z
    sums = rows.new_zeros(num_classes, rows.shape[1]).index_add(0, y, rows)
    squared = rows.new_zeros(num_classes).index_add(0, y, rows.square().sum(1))
    objective = (sums * upstream[0]).sum() + (squared * upstream[1]).sum() * squares
    (gradient,) = torch.autograd.grad(objective, features)
    return sums, torch.bincount(y, minlength=num_classes), squared, gradient


def ours(features, labels, num_classes, normalize, squares, upstream, **settings):
    features = features.detach().requires_grad_()
    sums, counts, squared = ops.class_sums(
        features, labels, num_classes, normalize=normalize, squares=squares, **settings
    )
    objective = (sums * upstream[0].to(sums)).sum()
    if squares:
        objective = objective + (squared * upstream[1].to(sums)).sum()
    (gradient,) = torch.autograd.grad(objective, features)
    assert gradient.dtype == features.dtype
    assert gradient.stride() == torch.empty_like(features).stride()
    return sums.detach(), counts, squared.detach(), gradient


def make_upstream(num_classes, dim, device="cpu", dtype=torch.float64):
    return torch.randn(num_classes, dim, dtype=dtype).to(device), torch.randn(num_classes, dtype=dtype).to(device)


def check(features, labels, num_classes, normalize, squares, memory=None, **settings):
    """float64 values and gradients."""
    upstream = make_upstream(num_classes, features.shape[1], features.device)
    want = expected(features, labels, num_classes, normalize, squares, upstream, **settings)
    got = ours(features, labels, num_classes, normalize, squares, upstream, **settings)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[3], want[3], rtol=1e-10, atol=1e-12)
    if squares:
        torch.testing.assert_close(got[2], want[2], rtol=1e-10, atol=1e-12)
    else:
        assert got[2].shape == (0,)
    if memory is not None:
        assert_written(memory)


@pytest.mark.parametrize(("normalize", "squares"), [(False, False), (True, True)])
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_grids_and_layouts(triton_device, small_tiles, fresh, grids, normalize, squares):
    features, labels = sample(4, 6, *grids, device=triton_device, absent=(2,))
    check(features, labels, 4, normalize, squares, fresh)


@pytest.mark.parametrize(("normalize", "squares"), [(False, True), (True, False)])
@pytest.mark.parametrize("grids", [GRIDS[0], GRIDS[8]], ids=str)
def test_squares_alone_and_unit_rows_alone(triton_device, small_tiles, fresh, grids, normalize, squares):
    features, labels = sample(4, 6, *grids, device=triton_device, batch=1)
    check(features, labels, 4, normalize, squares, fresh)


@pytest.mark.parametrize("dim", [1, 3, 16, 24, 65, 130])
@pytest.mark.parametrize(
    ("pixels", "normalize", "squares"), [((4, 5), False, True), ((4, 5), True, False), ((5, 6), True, False)]
)
def test_widths(triton_device, small_tiles, fresh, dim, pixels, normalize, squares):
    features, labels = sample(4, dim, (4, 5), pixels, device=triton_device, batch=1)
    check(features, labels, 4, normalize, squares, fresh)


@pytest.mark.parametrize("num_classes", [2, 7, 17, 256])
@pytest.mark.parametrize("pixels", [(6, 7), (7, 8)])
def test_class_counts(triton_device, fresh, num_classes, pixels):
    """With the table's own entries: K = 256 takes several tiles of classes."""
    features, labels = sample(2, 5, (6, 7), pixels, "channels_last", triton_device, batch=1, singleton=1)
    labels = torch.where(
        labels < 1, torch.arange(labels.numel(), device=triton_device).view_as(labels) % num_classes, labels
    )
    ignore_index = -1 if num_classes == 256 else 255
    labels = torch.where(labels == 255, ignore_index, labels)
    normalize = pixels == (6, 7) or num_classes in (7, 256)
    check(features, labels, num_classes, normalize, normalize, fresh, ignore_index=ignore_index)


@pytest.mark.parametrize(("pixels", "normalize"), [((2, 3), False), ((2, 3), True), ((2, 4), True)])
def test_widest_rows(triton_device, fresh, pixels, normalize):
    features, labels = sample(3, 1024, (2, 3), pixels, device=triton_device, batch=1)
    check(features, labels, 3, normalize, False, fresh)


@pytest.mark.parametrize(("count", "layout"), [(1, "rows"), (252, "rows"), (507, "columns")])
def test_rows_without_a_grid(triton_device, fresh, count, layout):
    """(N, d) rows of d = 123, in row-major and column-major order."""
    rows, labels = torch.randn(count, 123, dtype=torch.float64), torch.randint(0, 5, (count,)) * 64 % 257
    rows = rows if layout == "rows" else rows.T.contiguous().T
    labels[labels > 4] = 255
    rows, labels = rows.to(triton_device), labels.to(triton_device)
    upstream = make_upstream(5, 123, triton_device)
    normalize = layout == "columns"
    want = expected(rows, labels, 5, normalize, True, upstream)
    got = ours(rows, labels, 5, normalize, True, upstream)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert_written(fresh)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (2, 4, 0, 3)])
@pytest.mark.parametrize(("normalize", "squares"), MODES)
def test_no_pixel(triton_device, shape, normalize, squares):
    features = torch.randn(shape, dtype=torch.float64, device=triton_device, requires_grad=True)
    labels = torch.zeros((*shape[:1], *shape[2:]), dtype=torch.int64, device=triton_device)
    sums, counts, squared = ops.class_sums(features, labels, 3, normalize=normalize, squares=squares)
    assert sums.shape == (3, 4) and not sums.any() and counts.tolist() == [0, 0, 0] and not squared.any()
    (gradient,) = torch.autograd.grad(sums.sum() + squared.sum(), features)
    assert gradient.shape == shape


def test_no_label_over_cells(triton_device):
    features = torch.randn(2, 4, 3, 3, dtype=torch.float64, device=triton_device, requires_grad=True)
    labels = torch.zeros((2, 0, 5), dtype=torch.int64, device=triton_device)
    sums, counts, _ = ops.class_sums(features, labels, 3)
    assert not sums.any() and not counts.any()
    assert not torch.autograd.grad(sums.sum(), features)[0].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("pixels", [(5, 4), (7, 6)])
def test_label_dtypes_and_strides(triton_device, small_tiles, dtype, pixels):
    features, labels = sample(4, 6, (5, 4), pixels, device=triton_device)
    labels = torch.stack([labels, labels], dim=-1).to(dtype)[..., 0]
    assert not labels.is_contiguous()
    check(features, labels, 4, True, True)


@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_an_ignored_class(triton_device, small_tiles, fresh, resolution):
    """An ignore_index within 0..K-1 is ignored too."""
    features, labels = sample(4, 6, (5, 4), (10, 8), device=triton_device, ignored=0.0)
    for normalize, squares in ((False, True), (True, True)):
        check(features, labels, 4, normalize, squares, fresh, ignore_index=1, resolution=resolution)


@pytest.mark.parametrize("value", [-3, 4, 255, 2**33 + 1])
@pytest.mark.parametrize(("pixels", "normalize", "squares"), [((5, 4), False, True), ((7, 6), True, True)])
def test_wrong_labels_are_seen_and_skipped(triton_device, small_tiles, fresh, value, pixels, normalize, squares):
    """What the device-side assertion of CUDA looks at; the kernels leave such a pixel out."""
    if triton_device == "cuda":
        pytest.skip("the assertion would end this process' use of the device")
    features, labels = sample(4, 6, (5, 4), pixels)
    wrong = labels.clone()
    wrong[1, 2, 3] = value
    labels[1, 2, 3] = 255
    fresh.clear()
    got = kernels.class_sums(features, wrong, 4, 255, normalize, squares)
    assert [bool(t) for t in fresh if t.dtype == torch.bool] == [value == 255]
    want = kernels.class_sums(features, labels, 4, 255, normalize, squares)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    grad_sums = make_upstream(4, 6)[0]
    grads = [kernels.class_sums_backward(grad_sums, None, features, y, 255, normalize) for y in (wrong, labels)]
    assert torch.equal(*grads)


def test_wrong_labels_are_named(triton_device):
    if triton_device == "cuda":
        pytest.skip("on CUDA it is a device-side assertion")
    with pytest.raises(ValueError, match=r"labels hold 4 \(1 pixels\)"):
        ops.class_sums(torch.zeros(1, 2, 1, 3), torch.tensor([[[0, 4, 1]]]), 4)


@pytest.mark.parametrize("cells", [(6, 7), (3, 4)])
@pytest.mark.parametrize(
    ("value", "normalize", "squares"),
    [(float("nan"), False, False), (float("nan"), True, True), (float("inf"), False, True)],
)
def test_ignored_pixels_may_hold_anything(triton_device, small_tiles, cells, value, normalize, squares):
    """Features that no labelled pixel touches have no say."""
    labels = torch.randint(0, 3, (2, 6, 7))
    labels[:, :, 3:] = 255
    clean = torch.randn(2, 6, *cells, dtype=torch.float64)
    dirty = clean.clone()
    dirty[..., 3:] = value  # the label pixel 2 of 7 lies between the cells 0 and 1 of 4, 0.93 cells from the first
    clean[..., 3:] = 0
    upstream = make_upstream(3, 6, triton_device)
    arguments = (labels.to(triton_device), 3, normalize, squares, upstream)
    got, want = ours(dirty.to(triton_device), *arguments), ours(clean.to(triton_device), *arguments)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_labelled_pixels_do_not_hide_what_they_hold(triton_device, small_tiles):
    features, labels = torch.randn(1, 4, 5, 5, device=triton_device), torch.zeros(1, 5, 5, dtype=torch.int64)
    features[0, 1, 2, 3] = float("nan")
    sums = ops.class_sums(features, labels.to(triton_device), 2)[0]
    assert sums[0].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("pixels", [(4, 5), (7, 9)])
@pytest.mark.parametrize("tiny", [0.0, 1e-13])
def test_zero_rows(triton_device, small_tiles, pixels, tiny):
    """They are divided by 1e-12, and pass no gradient."""
    features, labels = sample(3, 18, (4, 5), pixels, ignored=0.0)
    features[:, :, 1:3] = tiny / 18**0.5
    check(features.to(triton_device), labels.to(triton_device), 3, True, True)


@pytest.mark.parametrize("pixels", [(4, 5), (7, 9)])
def test_one_class_without_pixels_and_one_with_one(triton_device, small_tiles, fresh, pixels):
    features, labels = sample(5, 6, (4, 5), pixels, device=triton_device, absent=(0, 3), singleton=4)
    assert (labels == 4).sum() == 1
    for normalize, squares in ((False, True), (True, False)):
        check(features, labels, 5, normalize, squares, fresh)


def test_all_ignored(triton_device, fresh):
    features = torch.randn(2, 6, 4, 4, dtype=torch.float64, device=triton_device)
    for size in ((4, 4), (6, 7)):
        labels = torch.full((2, *size), 255, device=triton_device)
        for normalize, squares in ((False, False), (True, True)):
            check(features, labels, 3, normalize, squares, fresh)


@pytest.mark.parametrize("pixels", [(13, 9), (3, 2)])
def test_places_beyond_32_bits(triton_device, small_tiles, monkeypatch, pixels):
    monkeypatch.setattr(kernels, "_is_wide", lambda at, classes: True)
    features, labels = sample(4, 6, (5, 7), pixels, device=triton_device)
    check(features, labels, 4, True, True)
    check(features, labels, 4, False, False)


@pytest.mark.parametrize(
    ("cells", "pixels", "normalize", "squares"),
    [
        ((2, 1), (2, 1), False, True),
        ((2, 1), (2, 1), True, False),
        ((2, 1), (3, 2), False, False),
        ((2, 1), (3, 2), False, True),
        ((2, 1), (3, 2), True, False),
    ],
)
def test_gradcheck(triton_device, cells, pixels, normalize, squares):
    features, labels = sample(3, 2, cells, pixels, device=triton_device, batch=1, ignored=0.2)
    features.requires_grad_()

    def outputs(z):
        sums, _, squared = ops.class_sums(z, labels, 3, normalize=normalize, squares=squares)
        return (sums, squared) if squares else sums

    assert gradcheck(outputs, features)
    if not normalize and not squares:
        assert gradgradcheck(outputs, features, fast_mode=True)


def test_opcheck(triton_device):
    features, labels = sample(3, 4, (2, 3), (3, 3), device=triton_device, batch=1)
    opcheck(torch.ops.in2nect.class_sums, (features.requires_grad_(), labels, 3, 255, "label", True, True))
    upstream = make_upstream(3, 4, triton_device)
    opcheck(torch.ops.in2nect.class_sums_backward, (*upstream, features.detach(), labels, 255, "label", True))


def assert_as_precise(device, features, labels, num_classes, normalize, squares, factors=(2, 3)):
    """The error against float64 is at most twice (gradients: three times) that of the equations in torch."""
    upstream = make_upstream(num_classes, features.shape[1], dtype=torch.float32)
    exact = expected(features.double(), labels, num_classes, normalize, squares, [u.double() for u in upstream])
    exact = [x.detach() for x in exact]
    upstream = [u.to(device) for u in upstream]
    arguments = (features.to(device), labels.to(device), num_classes, normalize, squares, upstream)
    with use_backend("triton"):
        got = ours(*arguments)
    with use_backend("reference"):
        theirs = ours(*arguments)
    assert torch.equal(got[1].cpu(), exact[1])
    for index, factor in ((0, factors[0]), (2, factors[0]), (3, factors[1])):
        if index == 2 and not squares:
            continue
        errors = [float((x[index].cpu().double() - exact[index]).abs().max()) for x in (got, theirs)]
        # where torch is exact to the last bit, so are we but for one rounding
        rounding = torch.finfo(got[index].dtype).eps * float(exact[index].abs().max())
        assert errors[0] <= max(factor * errors[1], rounding), (index, errors)


@pytest.mark.parametrize(("normalize", "squares"), MODES)
@pytest.mark.parametrize("pixels", [(15, 16), (17, 21)])
def test_float32_is_as_precise_as_torch(triton_device, normalize, squares, pixels):
    """Of features with a mean, as they are behind a ReLU, whose sums grow."""
    features, labels = sample(4, 24, (15, 16), pixels, "channels_last", dtype=torch.float32)
    assert_as_precise(triton_device, features.abs(), labels, 4, normalize, squares)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("normalize", "squares"), MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pixels", [(96, 80), (384, 320), (130, 111)])
@pytest.mark.parametrize("dim", [16, 64, 130])
def test_precision_on_a_gpu(dtype, layout, normalize, squares, pixels, dim):
    features, labels = sample(7, dim, (96, 80), pixels, layout, dtype=torch.float32)
    assert_as_precise("cuda", features.abs().to(dtype), labels, 7, normalize, squares)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("normalize", "squares"), MODES)
@pytest.mark.parametrize("pixels", [(128, 128), (512, 512)])
def test_the_same_bits_every_time(normalize, squares, pixels):
    features, labels = sample(7, 64, (128, 128), pixels, device="cuda", dtype=torch.bfloat16)
    upstream = make_upstream(7, 64, "cuda", torch.float32)
    first = ours(features, labels, 7, normalize, squares, upstream)
    for _ in range(100):
        again = ours(features, labels, 7, normalize, squares, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
@gpu
def test_a_cuda_graph_holds_it():
    """Nothing waits for the device."""
    features, labels = sample(7, 64, (64, 64), (256, 256), device="cuda", dtype=torch.float32)
    upstream = make_upstream(7, 64, "cuda", torch.float32)
    want = ours(features, labels, 7, True, True, upstream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ours(features, labels, 7, True, True, upstream)
    graph.replay()
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def test_feature_resolution_picks_the_labels(triton_device):
    features, labels = sample(4, 6, (5, 4), (11, 9), device=triton_device)
    with_labels = ops.class_sums(features, labels, 4, resolution="feature")
    picked = ops.class_sums(features, to_feature_grid(labels, 5, 4), 4)
    assert all(torch.equal(a, b) for a, b in zip(with_labels, picked))
