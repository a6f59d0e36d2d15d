"""The Triton kernels of ``class_moments`` against the reference, in the interpreter or on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from in2nect import ops, reference
from in2nect.ops.backend import use_backend
from in2nect.ops.class_moments import class_moments
from tests.samples import clustered

kernels = pytest.importorskip("in2nect.kernels.class_moments")
class_sums = pytest.importorskip("in2nect.kernels.class_sums")
table = pytest.importorskip("in2nect.kernels.table")

# (h, w) of the features, (H, W) of the labels, memory layout, covariance
GRIDS = (
    ((5, 4), (5, 4), "contiguous", "pooled"),
    ((5, 4), (5, 4), "channels_last", "pooled"),
    ((5, 4), (5, 4), "strided", "class"),
    ((5, 4), (5, 4), "transposed", "pooled"),
    ((3, 4), (6, 8), "channels_last", "pooled"),
    ((3, 2), (12, 8), "contiguous", "class"),
    ((2, 1), (16, 8), "contiguous", "pooled"),
    ((5, 4), (7, 9), "strided", "pooled"),
    ((5, 4), (7, 9), "contiguous", "class"),
    ((5, 4), (5, 8), "transposed", "pooled"),
    ((5, 6), (3, 2), "contiguous", "pooled"),
    ((5, 4), (3, 9), "channels_last", "class"),
    ((4, 1), (3, 5), "contiguous", "pooled"),
    ((1, 3), (4, 3), "channels_last", "pooled"),
)
# So small that a handful of pixels makes several tiles, programs and parts of a row.
SMALL = {
    "class_moments_same_grid": {"BLOCK_P": 16, "BLOCK_J": 16, "PROGRAMS": 1},
    "class_moments_same_grid_mixtures": {"BLOCK_P": 16, "BLOCK_J": 16, "PROGRAMS": 1},
    "class_moments_same_grid_backward": {"BLOCK_P": 16, "BLOCK_J": 16},
    "class_moments_grams": {"BLOCK_P": 16, "BLOCK_D": 16},
    "class_moments_forms": {"BLOCK_P": 16, "BLOCK_D": 16},
    "class_moments_gather": {"BLOCK_P": 16, "NUMBERS": 8},
    "class_moments_linear": {"BLOCK_P": 16, "BLOCK_D": 16, "PROGRAMS": 1},
    "class_moments_quadratic": {"BLOCK_P": 16, "BLOCK_D": 16, "PROGRAMS": 1},
    "class_moments_gradient": {"BLOCK_P": 16, "BLOCK_D": 16, "BLOCK_R": 16},
    "class_moments_add": {"BLOCK_S": 2, "BLOCK_E": 16},
}

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _tiles_for_the_interpreter(monkeypatch):
    """The interpreter takes its time by the operation, however large: fewer and larger tiles."""
    if not torch.cuda.is_available():
        use_blocks(monkeypatch, {"class_moments_gather": {"BLOCK_P": 64, "NUMBERS": 1024}})
        use_blocks(monkeypatch, {"class_moments_forms": {"BLOCK_P": 64, "BLOCK_D": 32}})


@pytest.fixture
def small_tiles(monkeypatch):
    use_blocks(monkeypatch, SMALL)


def use_blocks(monkeypatch, kernels_blocks):
    for name, blocks in kernels_blocks.items():
        entry = table.Entry(table.EVERY, table.FLOATS, 1024, blocks, warps=4, stages=1, reason="test")
        monkeypatch.setitem(table.TABLE, name, (entry,))


class Memory:
    """Stands for torch in the kernels' modules; keeps what they allocate."""

    def __init__(self, poison: bool) -> None:
        self.poison = poison
        self.tensors: list[Tensor] = []

    def __getattr__(self, name):
        found = getattr(torch, name)
        return self._keeping(found) if name in ("empty", "empty_like", "zeros", "cat") else found

    def _keeping(self, function):
        def allocate(*arguments, **keywords):
            tensor = function(*arguments, **keywords)
            self.tensors.append(tensor)
            if self.poison and function in (torch.empty, torch.empty_like):
                tensor.fill_(float("nan") if tensor.is_floating_point() else tensor.dtype == torch.bool)
            return tensor

        return allocate


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What the host functions allocate is NaN before a kernel sees it."""
    monkeypatch.setattr(kernels, "torch", Memory(poison=True))


def sample(num_classes, dim, cells, pixels, layout="contiguous", device="cpu", **settings):
    """Features and labels of :func:`tests.samples.clustered`, in one more layout."""
    kind = "contiguous" if layout == "transposed" else layout
    features, labels = clustered(num_classes, dim, features=cells, labels=pixels, layout=kind, **settings)
    if layout == "transposed":  # dense, but no one stride walks along its rows
        features = features.mT.contiguous().mT
    return features.to(device), labels.to(device)


def expected(features, labels, num_classes, upstream, *, resolution="label", **settings):
    """Loss, sums, counts and the features' gradient, by the equations and autograd."""
    features = features.detach().requires_grad_()
    loss = reference.intra_class_loss(features, labels, num_classes, resolution=resolution, **settings)
    settings = {k: v for k, v in settings.items() if k == "ignore_index"}
    means, counts = reference.class_means(features, labels, num_classes, resolution=resolution, **settings)
    sums = means * counts[:, None]
    (gradient,) = torch.autograd.grad(upstream[0] * loss + (upstream[1] * sums).sum(), features)
    return loss.detach(), sums.detach(), counts, gradient


def ours(features, labels, num_classes, upstream, **settings):
    features = features.detach().requires_grad_()
    loss, sums, counts = class_moments(features, labels, num_classes, sums=True, **settings)
    (gradient,) = torch.autograd.grad(upstream[0] * loss + (upstream[1].to(sums) * sums).sum(), features)
    assert gradient.dtype == features.dtype
    assert gradient.stride() == torch.empty_like(features).stride()
    return loss.detach(), sums.detach(), counts, gradient


def make_upstream(num_classes, dim, device="cpu"):
    return 1.3, torch.randn(num_classes, dim, dtype=torch.float64).to(device)


def check(features, labels, num_classes, **settings):
    settings = {"temperature": 0.7, **settings}
    upstream = make_upstream(num_classes, features.shape[1], features.device)
    want = expected(features, labels, num_classes, upstream, **settings)
    got = ours(features, labels, num_classes, upstream, **settings)
    assert torch.equal(got[2], want[2])
    for index in (0, 1, 3):
        scale = max(float(want[index].abs().max()), 1e-3) if want[index].numel() else 1.0
        torch.testing.assert_close(got[index], want[index], rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize(("cells", "pixels", "layout", "covariance"), GRIDS)
def test_label_resolution(triton_device, cells, pixels, layout, covariance):
    features, labels = sample(4, 6, cells, pixels, layout, triton_device)
    check(features, labels, 4, covariance=covariance)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("pixels", [(5, 4), (11, 9)])
def test_feature_resolution(triton_device, layout, covariance, pixels):
    features, labels = sample(4, 6, (5, 4), pixels, layout, triton_device)
    check(features, labels, 4, covariance=covariance, resolution="feature")


@pytest.mark.parametrize(("dim", "pixels"), [(18, (4, 5)), (18, (5, 7))])
@pytest.mark.parametrize("covariance", ["pooled", "class"])
def test_widths_of_several_tiles(triton_device, small_tiles, monkeypatch, dim, pixels, covariance):
    """Parts of rows, several programs, and images one at a time."""
    monkeypatch.setattr(kernels, "WORKSPACE", 1)
    features, labels = sample(3, dim, (4, 5), pixels, device=triton_device)
    check(features, labels, 3, covariance=covariance)


def test_images_that_share_no_part(triton_device, monkeypatch):
    """Three images in parts of two and one; the sums go on from part to part."""
    planes = kernels.PAIRS * 2 + 2 * 4
    monkeypatch.setattr(kernels, "WORKSPACE", 2 * planes * 8 * 9 + 1)
    features, labels = sample(4, 5, (3, 3), (4, 5), device=triton_device, batch=3)
    assert len(kernels._Cells.of(features, class_sums._Classes(labels, 4, 255), numbers=5, weights=13).parts()) == 2
    check(features, labels, 4)


@pytest.mark.parametrize(("dim", "pixels"), [(130, (2, 3)), (77, (3, 4))])
def test_wide_rows(triton_device, dim, pixels):
    features, labels = sample(3, dim, (2, 3), pixels, device=triton_device, ignored=0.0)
    check(features, labels, 3)


@pytest.mark.parametrize(
    ("num_classes", "pixels", "covariance"),
    [
        (17, (5, 6), "pooled"),
        (19, (6, 7), "pooled"),
        (19, (6, 7), "class"),
        (70, (5, 6), "pooled"),
        (256, (6, 7), "pooled"),
    ],
)
def test_class_counts(triton_device, num_classes, pixels, covariance):
    features, labels = sample(2, 5, (5, 6), pixels, "channels_last", triton_device)
    spread = torch.arange(labels.numel(), device=triton_device).view_as(labels) % num_classes
    labels = torch.where((labels < 1) & (spread != 255), spread, labels)
    check(features, labels, num_classes, covariance=covariance)


@pytest.mark.parametrize("pixels", [(5, 4), (7, 9)])
@pytest.mark.parametrize("covariance", ["pooled", "class"])
def test_absent_and_singleton_classes(triton_device, pixels, covariance):
    features, labels = sample(5, 6, (5, 4), pixels, device=triton_device, absent=(0, 3), singleton=4)
    assert (labels == 4).sum() == 1
    check(features, labels, 5, covariance=covariance)


@pytest.mark.parametrize("pixels", [(4, 4), (6, 7)])
@pytest.mark.parametrize("covariance", ["pooled", "class"])
def test_all_ignored(triton_device, pixels, covariance):
    features = torch.randn(2, 6, 4, 4, dtype=torch.float64, device=triton_device)
    labels = torch.full((2, *pixels), 255, device=triton_device)
    loss, sums, counts, gradient = ours(features, labels, 3, make_upstream(3, 6, triton_device), covariance=covariance)
    assert not loss and not sums.any() and not counts.any() and not gradient.any()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_no_pixel(triton_device, shape):
    features = torch.randn(shape, dtype=torch.float64, device=triton_device)
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=triton_device)
    loss, sums, counts, gradient = ours(features, labels, 3, make_upstream(3, 4, triton_device))
    assert not loss and not sums.any() and not counts.any() and gradient.shape == shape


def test_no_label_over_cells(triton_device):
    features = torch.randn(2, 4, 3, 3, dtype=torch.float64, device=triton_device)
    labels = torch.zeros((2, 0, 5), dtype=torch.int64, device=triton_device)
    loss, sums, _, gradient = ours(features, labels, 3, make_upstream(3, 4, triton_device))
    assert not loss and not sums.any() and not gradient.any()


def test_rows_without_a_grid(triton_device):
    rows, labels = torch.randn(123, 7, dtype=torch.float64), torch.randint(0, 5, (123,)) * 64 % 257
    labels[labels > 4] = 255
    check(rows.to(triton_device), labels.to(triton_device), 5)


@pytest.mark.parametrize("pixels", [(4, 5), (7, 9)])
@pytest.mark.parametrize(("tiny", "covariance"), [(0.0, "pooled"), (1e-13, "pooled"), (0.0, "class")])
def test_zero_rows(triton_device, pixels, tiny, covariance):
    """They are divided by 1e-12, and pass no gradient to the loss."""
    features, labels = sample(3, 9, (4, 5), pixels, ignored=0.0)
    features[:, :, 1:3] = tiny / 3
    check(features.to(triton_device), labels.to(triton_device), 3, covariance=covariance)


@pytest.mark.parametrize("cells", [(6, 7), (3, 4)])
@pytest.mark.parametrize(("value", "covariance"), [(float("nan"), "pooled"), (float("inf"), "class")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_ignored_pixels_may_hold_anything(triton_device, cells, value, covariance, dtype):
    labels = torch.randint(0, 3, (2, 6, 7))
    labels[:, :, 3:] = 255
    clean = torch.randn(2, 6, *cells, dtype=dtype)
    dirty = clean.clone()
    dirty[..., 3:] = value  # the label pixel 2 of 7 lies between the cells 0 and 1 of 4, 0.93 cells from the first
    clean[..., 3:] = 0
    arguments = (labels.to(triton_device), 3, make_upstream(3, 6, triton_device))
    got, want = (ours(z.to(triton_device), *arguments, covariance=covariance) for z in (dirty, clean))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("pixels", [(5, 5), (7, 8)])
def test_labelled_pixels_do_not_hide_what_they_hold(triton_device, pixels):
    features, labels = torch.randn(1, 4, 5, 5), torch.zeros(1, *pixels, dtype=torch.int64)
    features[0, 1, 2, 3] = float("nan")
    loss, sums, _ = class_moments(features.to(triton_device), labels.to(triton_device), 2, sums=True)
    assert loss.isnan() and sums[0].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("pixels", [(5, 4), (7, 9)])
@pytest.mark.parametrize("which", ["loss", "sums"])
def test_gradient_of_one_result(triton_device, pixels, which):
    features, labels = sample(4, 6, (5, 4), pixels, device=triton_device)
    upstream = make_upstream(4, 6, triton_device)
    upstream = (upstream[0], torch.zeros_like(upstream[1])) if which == "loss" else (0.0, upstream[1])
    *_, want = expected(features, labels, 4, upstream)
    features.requires_grad_()
    loss, sums, _ = class_moments(features, labels, 4, sums=which == "sums")
    objective = upstream[0] * loss if which == "loss" else (sums * upstream[1]).sum()
    (got,) = torch.autograd.grad(objective, features)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pixels", [(5, 4), (7, 6)])
def test_an_ignored_class(triton_device, pixels):
    """An ignore_index within 0..K-1 is ignored too."""
    features, labels = sample(4, 6, (5, 4), pixels, device=triton_device, ignored=0.0)
    check(features, labels, 4, ignore_index=1)


@pytest.mark.parametrize("pixels", [(13, 9), (3, 2)])
def test_places_beyond_32_bits(triton_device, monkeypatch, pixels):
    monkeypatch.setattr(kernels, "_is_wide", lambda at, classes: True)
    features, labels = sample(4, 6, (5, 7), pixels, device=triton_device, batch=1)
    check(features, labels, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_label_dtypes_and_strides(triton_device, dtype):
    features, labels = sample(4, 6, (5, 4), (7, 6), device=triton_device)
    labels = torch.stack([labels, labels], dim=-1).to(dtype)[..., 0]
    check(features, labels, 4)


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("pixels", [(5, 4), (7, 6)])
def test_given_weights(triton_device, pixels, by_class):
    """With process groups the second moments are weighted by the classes of all ranks."""
    features, labels = sample(4, 6, (5, 4), pixels, device=triton_device, absent=(1,))
    weights = torch.rand(4, dtype=features.dtype, device=features.device)
    counts, *_, given = kernels.class_moments(features, labels, 4, 255, False, by_class, weights)
    *_, by_counts = kernels.class_moments(features, labels, 4, 255, False, True)
    expected = by_counts * (counts * weights)[:, None, None]
    torch.testing.assert_close(given, expected if by_class else expected.sum(0))


@pytest.mark.parametrize("value", [-3, 4, 2**33 + 1])
@pytest.mark.parametrize("pixels", [(5, 4), (7, 6)])
def test_wrong_labels_are_seen_and_skipped(triton_device, monkeypatch, value, pixels):
    """What the device-side assertion of CUDA looks at; the kernels leave such a pixel out."""
    if triton_device == "cuda":
        pytest.skip("the assertion would end this process' use of the device")
    features, labels = sample(4, 6, (5, 4), pixels)
    wrong = labels.clone()
    wrong[1, 2, 3] = value
    labels[1, 2, 3] = 255
    seen = []
    for y in (wrong, labels):
        memory = Memory(poison=True)
        monkeypatch.setattr(kernels, "torch", memory)
        results = kernels.class_moments(features, y, 4, 255, True, False)
        seen.append(([bool(t) for t in memory.tensors if t.dtype == torch.bool], results))
    assert seen[0][0] == [False] and seen[1][0] == [True]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1]))


@pytest.mark.parametrize(("pixels", "covariance"), [((2, 1), "pooled"), ((3, 2), "pooled"), ((3, 2), "class")])
def test_gradcheck(triton_device, pixels, covariance):
    features, labels = sample(2, 3, (2, 1), pixels, device=triton_device, batch=1, ignored=0.0)
    features.requires_grad_()

    def outputs(z):
        return class_moments(z, labels, 2, covariance=covariance, sums=True)[:2]

    assert gradcheck(outputs, features)


@pytest.mark.parametrize(("num_classes", "by_class"), [(7, False), (19, False), (7, True)])
@pytest.mark.parametrize("cells", [256, 1024])
def test_memory_asked_for(monkeypatch, num_classes, by_class, cells):
    """16 x 64 x 256 x 256 features under labels of 1024^2, and on their grid, with as many programs as a large chip
    has: besides results, at most 64 MiB, of which what lies between the steps takes half; with a covariance a class
    that is one image's."""
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    for module in (kernels, class_sums):
        monkeypatch.setattr(module, "launch", lambda *arguments, **keywords: None)

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    features = meta(16, 64, 256, 256, dtype=torch.bfloat16)
    labels = meta(16, cells, cells, dtype=torch.uint8)
    per_class, vectors = meta(num_classes), meta(num_classes, 64)
    curvatures = meta(num_classes, 64, 64) if by_class else None
    matrices = meta(num_classes if by_class else 1, 64, 64)
    coefficients = per_class, matrices, per_class, vectors, per_class, vectors, 255
    mixtures = features, labels, vectors, curvatures, meta(num_classes, dtype=torch.bool)
    for function, arguments in (
        (kernels.class_moments, (features, labels, num_classes, 255, True, by_class)),
        (kernels.class_moments_mixtures, (*mixtures, per_class, 255)),
        (kernels.class_moments_backward, (*mixtures, *coefficients)),
    ):
        memory = Memory(poison=False)
        monkeypatch.setattr(kernels, "torch", memory)
        results = function(*arguments)
        gradient = results.nbytes if isinstance(results, Tensor) else 0
        assert sum(t.nbytes for t in memory.tensors) <= gradient + 2**26
        if not by_class:
            between = [t.nbytes for t in memory.tensors if t.dim() == 1 and t.is_floating_point()]
            assert max(between, default=0) <= kernels.WORKSPACE


def assert_as_precise(device, features, labels, num_classes, factors=(2, 3), **settings):
    """The error against float64 is at most twice (gradients: three times) that of the equations in torch."""
    upstream = make_upstream(num_classes, features.shape[1])
    exact = expected(features.double(), labels, num_classes, upstream, **settings)
    upstream = upstream[0], upstream[1].to(device)
    arguments = features.to(device), labels.to(device), num_classes, upstream
    with use_backend("triton"):
        got = ours(*arguments, **settings)
    with use_backend("reference"):
        theirs = ours(*arguments, **settings)
    assert torch.equal(got[2].cpu(), exact[2])
    for index, factor in ((0, factors[0]), (1, factors[0]), (3, factors[1])):
        errors = [float((x[index].cpu().double() - exact[index]).abs().max()) for x in (got, theirs)]
        # where torch is exact to the last bits, so are we but for a few roundings
        rounding = 4 * torch.finfo(got[index].dtype).eps * float(exact[index].abs().max())
        assert errors[0] <= max(factor * errors[1], rounding), (index, errors)


@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("pixels", [(7, 8), (9, 13)])
def test_float32_is_as_precise_as_torch(triton_device, covariance, pixels):
    features, labels = sample(4, 24, (7, 8), pixels, "channels_last", dtype=torch.float32)
    assert_as_precise(triton_device, features, labels, 4, covariance=covariance)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pixels", [(48, 40), (192, 160), (65, 56)])
@pytest.mark.parametrize("dim", [16, 64, 130])
def test_precision_on_a_gpu(dtype, layout, covariance, pixels, dim):
    features, labels = sample(7, dim, (48, 40), pixels, layout, dtype=torch.float32)
    assert_as_precise("cuda", features.to(dtype), labels, 7, covariance=covariance)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("pixels", [(64, 64), (256, 256)])
def test_the_same_bits_every_time(covariance, pixels):
    features, labels = sample(7, 64, (64, 64), pixels, device="cuda", dtype=torch.bfloat16)
    upstream = make_upstream(7, 64, "cuda")
    first = ours(features, labels, 7, upstream, covariance=covariance)
    for _ in range(100):
        again = ours(features, labels, 7, upstream, covariance=covariance)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
@gpu
def test_a_cuda_graph_holds_it(monkeypatch):
    """Nothing waits for the device."""
    monkeypatch.setattr(kernels, "torch", torch)
    features, labels = sample(7, 64, (64, 64), (256, 256), device="cuda", dtype=torch.float32)
    upstream = make_upstream(7, 64, "cuda")
    want = ours(features, labels, 7, upstream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ours(features, labels, 7, upstream)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("covariance", "cells"), itertools.product(["pooled", "class"], [256, 1024]))
def test_peak_memory(monkeypatch, covariance, cells):
    """At most the gradient and 64 MiB beyond features and labels."""
    monkeypatch.setattr(kernels, "torch", torch)
    features = torch.randn(16, 64, 256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 7, (16, cells, cells), device="cuda", dtype=torch.uint8)
    for _ in range(2):  # the first time compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = ops.class_moments.class_moments(features, labels, 7, covariance=covariance, sums=True)
        (gradient,) = torch.autograd.grad(result.loss + result.sums.sum(), features)
        peak = torch.cuda.max_memory_allocated() - before
        del result
        assert peak <= gradient.nbytes + 2**26
        del gradient
