"""The compiled gather_rows and its backward against the definition, in float64: interpolate everything, then index."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from in2nect import native, ops, reference
from in2nect.ops.backend import use_backend

pytestmark = pytest.mark.skipif(not native.available("cpp"), reason=f"cpp backend: {native.why_not('cpp')}")

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "permuted")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (h, w) of the features, (H, W) of the pixels: ratios 1, 2, 4, 8, not integer, mixed, one pixel, downscaling
GRIDS = (
    ((6, 5), (6, 5)),
    ((6, 5), (12, 10)),
    ((9, 7), (36, 28)),
    ((3, 4), (24, 32)),
    ((7, 5), (16, 13)),
    ((6, 5), (6, 17)),
    ((1, 1), (1, 1)),
    ((1, 1), (5, 3)),
    ((20, 17), (7, 9)),
    ((2, 700), (3, 1300)),
)
# Float32 rounds a blend of four; the values and the reference share the inputs exactly.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# Gradients are rounded to the features' dtype once: half a unit in the last place, relative to the element.
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make_features(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """Where the features are a part of a larger tensor, the rest of it is NaN."""
    batch, dim, height, width = shape
    if layout == "sliced":
        large = torch.full((batch + 1, dim + 2, 2 * height, width + 3), torch.nan, dtype=dtype)
        view = large[1:, 1 : dim + 1, ::2, 2 : width + 2]
        return view.copy_(torch.randn(shape))
    if layout == "expanded":
        return torch.randn(1, dim, height, 1).to(dtype).expand(shape)
    if layout == "permuted":  # images innermost, lines of the image not one after the other
        return torch.randn(height, dim, width, batch).to(dtype).permute(3, 1, 0, 2)
    z = torch.randn(shape).to(dtype)
    return z.to(memory_format=torch.channels_last) if layout == "channels_last" else z


def make_indices(count: int, batch: int, size: tuple[int, int]) -> Tensor:
    """Some pixels several times, the first and the last among them, some -1."""
    pixels = batch * size[0] * size[1]
    indices = torch.randint(0, pixels, (count,))
    indices[::7] = -1
    indices[1::11] = pixels // 2
    indices[-2:] = torch.tensor([0, pixels - 1])
    return indices


def definition(features: Tensor, indices: Tensor, size: tuple[int, int], normalize: bool) -> Tensor:
    rows = reference.label_resolution_rows(features, *size).permute(0, 2, 3, 1).flatten(0, 2)
    there = (indices >= 0)[:, None]
    return torch.where(there, (reference.unit_rows(rows) if normalize else rows)[indices.clamp(min=0)], 0.0)


def check(features: Tensor, indices: Tensor, size: tuple[int, int], normalize: bool) -> None:
    dtype = features.dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    exact = features.detach().double().requires_grad_()
    want = definition(exact, indices, size, normalize)
    rows = torch.ops.in2nect_cpp.gather_rows(features, indices, *size, normalize)
    assert rows.dtype == accumulator
    assert (rows.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp_min(1)
    grad = torch.randn(rows.shape, dtype=accumulator)
    (want_gradient,) = torch.autograd.grad(want, exact, grad.double())
    gradient = torch.ops.in2nect_cpp.gather_rows_backward(grad, features, indices, *size, normalize)
    assert gradient.dtype == dtype
    assert gradient.stride() == torch.empty_like(features).stride()
    # A cell's gradient is a sum of both signs, through the norm a difference: compare with the size of its terms.
    norms = definition(features.double(), indices, size, False).norm(dim=1)[:, None] if normalize else torch.ones(1, 1)
    spread = torch.zeros_like(exact, requires_grad=True)
    terms = grad.double().norm(dim=1, keepdim=True).expand_as(grad) / norms.clamp_min(1e-3)
    (size_of_terms,) = torch.autograd.grad(definition(spread, indices, size, False), spread, terms)
    error = (gradient.double() - want_gradient).abs()
    floor = torch.finfo(torch.float16).smallest_normal * 2.0**-11 if dtype == torch.float16 else 0.0
    assert (error <= ROUNDING[dtype] * want_gradient.abs() + 4 * TOLERANCE[dtype] * size_of_terms + floor).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_grids_and_layouts(grids: tuple, layout: str, normalize: bool) -> None:
    features = make_features((2, 5, *grids[0]), layout, torch.float64)
    check(features, make_indices(90, 2, grids[1]), grids[1], normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, layout: str, normalize: bool) -> None:
    features = make_features((2, 16, 24, 20), layout, dtype)
    for ratio in (1, 4):
        size = (24 * ratio, 20 * ratio)
        check(features, make_indices(400, 2, size), size, normalize)


@pytest.mark.parametrize("dim", [1, 3, 65, 2000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels(layout: str, dim: int) -> None:
    """Units of 4,096 down to 64 cells."""
    features = make_features((3, dim, 11, 9), layout, torch.float32)
    for normalize, size in itertools.product((False, True), ((11, 9), (30, 20))):
        check(features, make_indices(200, 3, size), size, normalize)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pixel_of_many_units(layout: str) -> None:
    """Then the forward is the interpolation, and the backward its adjoint."""
    features = make_features((3, 4, 70, 60), layout, torch.float64)
    check(features, torch.randperm(3 * 140 * 120), (140, 120), False)
    check(features, torch.randperm(3 * 70 * 60), (70, 60), False)


def test_rows_as_one_line() -> None:
    rows = torch.randn(3000, 6, dtype=torch.float64)
    check(rows.T[None, :, None], make_indices(500, 1, (1, 3000)), (1, 3000), True)


@pytest.mark.parametrize("normalize", [False, True])
def test_strided_indices_and_gradients(normalize: bool) -> None:
    features = make_features((2, 5, 4, 3), "contiguous", torch.float64)
    indices, grad = make_indices(60, 2, (8, 6)), torch.randn(60, 5, dtype=torch.float64)
    backward = torch.ops.in2nect_cpp.gather_rows_backward
    expected = backward(grad, features, indices, 8, 6, normalize)
    wide = torch.stack([indices, torch.full_like(indices, 2**60)], dim=1)[:, 0]
    assert torch.equal(backward(grad.T.contiguous().T, features, wide, 8, 6, normalize), expected)
    one = torch.ones(1, 1, dtype=torch.float64).expand(60, 5)  # what sum() hands back
    assert torch.equal(
        backward(one, features, indices, 8, 6, normalize), backward(one.clone(), features, indices, 8, 6, normalize)
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_no_rows(normalize: bool) -> None:
    for shape in ((2, 3, 4, 5), (2, 0, 4, 5), (0, 3, 4, 5), (2, 3, 0, 5)):
        features = torch.randn(shape)
        for indices in (torch.empty(0, dtype=torch.int64), torch.full((6,), -1)):
            rows = torch.ops.in2nect_cpp.gather_rows(features, indices, 8, 10, normalize)
            assert torch.equal(rows, torch.zeros(len(indices), shape[1]))
            gradient = torch.ops.in2nect_cpp.gather_rows_backward(rows, features, indices, 8, 10, normalize)
            assert torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_what_has_no_weight_is_not_read(layout: str) -> None:
    features = make_features((1, 3, 5, 5), layout, torch.float32)
    features[0, :, 2:] = torch.nan
    for indices in (torch.arange(10), torch.full((3,), -1)):
        rows = torch.ops.in2nect_cpp.gather_rows(features, indices, 5, 5, True)
        assert torch.isfinite(rows).all()
        assert torch.isfinite(torch.ops.in2nect_cpp.gather_rows_backward(rows, features, indices, 5, 5, True)).all()
    # the grids differ along x alone: line 1 needs nothing of line 2
    assert torch.isfinite(torch.ops.in2nect_cpp.gather_rows(features, torch.arange(20), 5, 10, False)).all()
    assert torch.isnan(torch.ops.in2nect_cpp.gather_rows(features, torch.tensor([20]), 5, 10, False)).all()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_zero_rows_have_zero_gradients(layout: str) -> None:
    features = make_features((1, 4, 6, 6), layout, torch.float64)
    features[:, :, :3] = 0
    features[0, 0, 1] = 1e-12  # no longer than this counts as zero
    indices = torch.arange(36)
    rows = torch.ops.in2nect_cpp.gather_rows(features, indices, 6, 6, True)
    torch.testing.assert_close(rows, definition(features, indices, (6, 6), True))
    gradient = torch.ops.in2nect_cpp.gather_rows_backward(torch.ones_like(rows), features, indices, 6, 6, True)
    assert not gradient[:, :, :3].any()
    assert gradient[:, :, 3:].any()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_low_precision(dtype: torch.dtype, normalize: bool) -> None:
    """At most three times that of torch's interpolation and indexing in the same dtype."""
    features = make_features((2, 16, 12, 10), "contiguous", dtype).requires_grad_()
    indices = make_indices(300, 2, (24, 20))
    exact = features.detach().double().requires_grad_()
    upstream = torch.randn(300, 16)
    (want,) = torch.autograd.grad(definition(exact, indices, (24, 20), normalize), exact, upstream.double())
    rows = F.interpolate(features, size=(24, 20), mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)
    rows = F.normalize(rows, dim=1) if normalize else rows
    rows = torch.where((indices >= 0)[:, None], rows[indices.clamp(min=0)], 0.0)
    (torchs,) = torch.autograd.grad(rows, features, upstream.to(dtype))
    ours = torch.ops.in2nect_cpp.gather_rows_backward(upstream, features.detach(), indices, 24, 20, normalize)
    assert (ours.double() - want).norm() <= 3 * (torchs.double() - want).norm()


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("normalize", [False, True])
def test_same_bits_for_any_number_of_threads(normalize: bool, layout: str, ratio: int) -> None:
    features = make_features((3, 32, 60, 52), layout, torch.float32)
    size = (60 * ratio, 52 * ratio)
    indices = make_indices(5000, 3, size)
    grad = torch.randn(5000, 32)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        rows = torch.ops.in2nect_cpp.gather_rows(features, indices, *size, normalize)
        return [rows, torch.ops.in2nect_cpp.gather_rows_backward(grad, features, indices, *size, normalize)]

    before = torch.get_num_threads()
    try:
        one = run(1)
        for threads in (2, 3, 5, 2):
            assert all(torch.equal(a, b) for a, b in zip(one, run(threads)))
    finally:
        torch.set_num_threads(before)


def test_a_gradient_in_huge_pages() -> None:
    """Beyond 32 MiB, whether or not the kernel grants them."""
    features = torch.randn(1, 9, 1024, 1025)
    indices = make_indices(50, 1, (1024, 1025))
    grad = torch.randn(50, 9)
    gradient = torch.ops.in2nect_cpp.gather_rows_backward(grad, features, indices, 1024, 1025, False)
    expected = torch.zeros(1024 * 1025, 9).index_add_(0, indices.clamp(min=0), grad * (indices >= 0)[:, None])
    torch.testing.assert_close(gradient, expected.T.reshape(features.shape))


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (5, 3)])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_and_opcheck(normalize: bool, size: tuple[int, int]) -> None:
    indices = make_indices(20, 2, size)
    with use_backend("cpp"):
        for layout in LAYOUTS[:3]:
            features = make_features((2, 4, 3, 4), layout, torch.float64).detach().clone().requires_grad_()
            assert gradcheck(lambda z: ops.gather_rows(z, indices, *size, normalize=normalize), features)
        opcheck(torch.ops.in2nect.gather_rows, (features, indices, *size, normalize))
        grad = torch.randn(20, 4, dtype=torch.float64)
        opcheck(torch.ops.in2nect.gather_rows_backward, (grad, features.detach(), indices, *size, normalize))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.randn(2, 3, 4)}, r"\(B, d, h, w\), got 3"),
        ({"features": torch.ones(2, 3, 4, 4, dtype=torch.int64)}, "bfloat16 or float16, got Long"),
        ({"indices": torch.zeros(2, 2).long()}, r"\(M,\) int64, got 2 dimensions of Long"),
        ({"indices": torch.zeros(2)}, r"\(M,\) int64, got 1 dimensions of Float"),
        ({"indices": torch.tensor([0, 3, 96])}, r"indices\[2\] is 96; a grid of 2 x 6 x 8 takes 0 to 95, and -1"),
        ({"indices": torch.tensor([0, -2])}, r"indices\[1\] is -2; .* takes 0 to 95"),
        ({"height": -6}, "must not be negative, got -6 x 8"),
        ({"features": torch.randn(2, 3, 0, 4)}, "no features to take the rows from, on a grid of 0 x 4"),
    ],
)
def test_errors_say_what_was_given(change: dict, message: str) -> None:
    call = {"features": torch.randn(2, 3, 4, 4), "indices": torch.zeros(3).long(), "height": 6, "width": 8} | change
    with pytest.raises(RuntimeError, match="gather_rows: .*" + message):
        torch.ops.in2nect_cpp.gather_rows(*call.values(), False)
    with pytest.raises(RuntimeError, match="gather_rows_backward: .*" + message):
        torch.ops.in2nect_cpp.gather_rows_backward(torch.zeros(len(call["indices"]), 3), *call.values(), False)


def test_the_upstream_gradient_is_checked() -> None:
    features, indices = torch.randn(2, 3, 4, 4), torch.zeros(5).long()
    for grad in (torch.zeros(5, 4), torch.zeros(4, 3), torch.zeros(5, 3).double(), torch.zeros(15)):
        with pytest.raises(RuntimeError, match=r"grad must be \(5, 3\) Float"):
            torch.ops.in2nect_cpp.gather_rows_backward(grad, features, indices, 4, 4, False)
