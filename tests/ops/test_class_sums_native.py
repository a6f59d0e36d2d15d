"""The compiled operators behind class_sums against the definition, in float64: interpolate, one-hot, multiply.

The CPU operator throughout; its CUDA twin, for labels on the features' grid, where there is a device.
"""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from in2nect import native, ops
from in2nect.ops.backend import use_backend

pytestmark = pytest.mark.skipif(not native.available("cpp"), reason=f"cpp backend: {native.why_not('cpp')}")

IGNORE = 255
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = tuple(itertools.product((False, True), (False, True)))  # normalize, squares
# (h, w) of the features, (H, W) of the labels: ratios 1, 2, 4, 8, not integer, mixed, one pixel, downscaling
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
# Rounding of the inputs and of a sum in tiles; the float32 values and the reference share the inputs exactly.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-6, torch.float16: 2e-6}
# Gradients are rounded to the features' dtype once.
GRADIENT_TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def definition(
    features: Tensor, labels: Tensor, num_classes: int, normalize: bool, constant_norms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and squares in float64, from rows that are held in full."""
    z = features.double()
    if z.shape[2:] != labels.shape[1:]:
        z = F.interpolate(z, size=labels.shape[1:], mode="bilinear", align_corners=False)
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    if normalize:
        norms = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        rows = rows / (norms.detach() if constant_norms else norms)
    flat = labels.reshape(-1).long()
    one_hot = ((flat[:, None] == torch.arange(num_classes)) & (flat[:, None] != IGNORE)).double()
    return one_hot.T @ rows, one_hot.sum(0).long(), one_hot.T @ rows.square().sum(1)


def make_features(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    batch, dim, height, width = shape
    if layout == "sliced":
        large = torch.randn(batch + 1, dim + 2, 2 * height, width + 3).to(dtype)
        return large[1:, 1 : dim + 1, ::2, 2 : width + 2]
    if layout == "expanded":
        return torch.randn(1, dim, height, 1).to(dtype).expand(shape)
    z = torch.randn(shape).to(dtype)
    return z.to(memory_format=torch.channels_last) if layout == "channels_last" else z


def make_labels(shape: tuple[int, int, int], num_classes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    labels = torch.randint(0, num_classes, (shape[0], *(max(1, n // 3) for n in shape[1:])))
    labels = F.interpolate(labels[:, None].float(), size=shape[1:])[:, 0].long()  # patches, as real labels are
    noise = torch.randint(0, num_classes + 1, shape)
    labels = torch.where(torch.rand(shape) < 0.2, noise, labels)
    return torch.where(labels == num_classes, IGNORE, labels).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def check(
    features: Tensor, labels: Tensor, num_classes: int, normalize: bool, squares: bool, device: str = "cpu"
) -> None:
    """Values and gradients of one call."""
    operators = torch.ops.in2nect_cuda if device == "cuda" else torch.ops.in2nect_cpp
    inputs = features.to(device), labels.to(device)
    dtype = features.dtype
    exact = features.detach().double().requires_grad_()
    want_sums, want_counts, want_squares = definition(exact, labels, num_classes, normalize)
    results = operators.class_sums(*inputs, num_classes, IGNORE, normalize, squares)
    sums, counts, got_squares = (result.cpu() for result in results[:3])
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    assert sums.dtype == got_squares.dtype == accumulator
    assert counts.dtype == torch.int64
    # A sum of N terms of both signs is small against its terms: compare with their size.
    size = definition(features.double().abs(), labels, num_classes, normalize)[0].max().clamp_min(1e-3).item()
    assert (sums.double() - want_sums).abs().max().item() <= TOLERANCE[dtype] * size
    assert torch.equal(counts, want_counts)
    if squares:
        assert relative_error(got_squares, want_squares.detach()) <= TOLERANCE[dtype]
    else:
        assert got_squares.shape == (0,)

    grad_sums = torch.randn(sums.shape, dtype=accumulator)
    grad_squares = torch.randn(num_classes, dtype=accumulator) if squares else None

    def gradient(sums: Tensor, _: Tensor, row_squares: Tensor) -> Tensor:
        objective = (sums * grad_sums).sum()
        if grad_squares is not None:
            objective = objective + (row_squares * grad_squares).sum()
        return torch.autograd.grad(objective, exact, retain_graph=True)[0]

    want = gradient(want_sums, want_counts, want_squares)
    # Through the norm it is a difference of two terms, which cancel for d = 1: compare with their size.
    size = gradient(*definition(exact, labels, num_classes, normalize, constant_norms=True)).abs().max().item()
    upstream = grad_sums.to(device), None if grad_squares is None else grad_squares.to(device)
    got = operators.class_sums_backward(*upstream, *inputs, IGNORE, normalize)
    assert got.dtype == dtype
    assert got.stride() == torch.empty_like(inputs[0]).stride()
    got = got.cpu()
    assert (got.double() - want).abs().max().item() <= GRADIENT_TOLERANCE[dtype] * max(size, want.abs().max().item())


@pytest.mark.parametrize(("normalize", "squares"), MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_grids_and_layouts(grids: tuple, layout: str, normalize: bool, squares: bool) -> None:
    features = make_features((2, 5, *grids[0]), layout, torch.float64)
    check(features, make_labels((2, *grids[1]), 4), 4, normalize, squares)


@pytest.mark.parametrize(("normalize", "squares"), MODES)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [1, 4])
def test_dtypes(ratio: int, dtype: torch.dtype, layout: str, normalize: bool, squares: bool) -> None:
    features = make_features((2, 16, 24, 20), layout, dtype)
    check(features, make_labels((2, 24 * ratio, 20 * ratio), 7), 7, normalize, squares)


@pytest.mark.parametrize("capability", native.available_cpu_capabilities())
def test_every_capability(capability: str) -> None:
    """Each build of the loops, with whole vectors and without, tables that fit into registers and not."""
    with native.use_cpu_capability(capability):
        for layout, dtype, (normalize, squares) in itertools.product(LAYOUTS[:3], DTYPES, MODES):
            for (dim, height, width), num_classes in (((16, 12, 29), 7), ((35, 3, 41), 20), ((9, 1, 1), 2)):
                for ratio in (1, 2):
                    features = make_features((2, dim, height, width), layout, dtype)
                    labels = make_labels((2, height * ratio, width * ratio), num_classes)
                    check(features, labels, num_classes, normalize, squares)


@pytest.mark.parametrize("capability", native.available_cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_low_precision_is_kept(dtype: torch.dtype, capability: str) -> None:
    """Each finite one as a class of one pixel: its sum is itself, and so is the gradient that it becomes."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    labels = torch.arange(len(values))[None, None]
    for features in (values[None, None, None], values[None, :, None, None].mT.transpose(1, 3)):
        with native.use_cpu_capability(capability):
            sums = torch.ops.in2nect_cpp.class_sums(features, labels, len(values), -1, False, False)[0]
            back = torch.ops.in2nect_cpp.class_sums_backward(sums, None, features, labels, -1, False)
        assert torch.equal(sums[:, 0], values.float())
        assert torch.equal(back.flatten(), values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ratio", [1, 3])
def test_strays_are_counted(ratio: int, dtype: torch.dtype) -> None:
    features = make_features((2, 3, 6, 7), "contiguous", torch.float32)
    labels = make_labels((2, 6 * ratio, 7 * ratio), 3, dtype)
    labels[0, 0, :3], labels[1, -1, -1] = 3, 254
    for given in (labels, labels.mT.contiguous().mT):
        for normalize, squares in MODES:
            assert torch.ops.in2nect_cpp.class_sums(features, given, 3, IGNORE, normalize, squares)[3] == 4
    with use_backend("cpp"), pytest.raises(ValueError, match=r"labels hold 3 \(3 pixels\), 254 \(1 pixels\)"):
        ops.class_sums(features, labels, 3)
    if ratio > 1:  # labels that no cell picks are checked too
        with use_backend("cpp"), pytest.raises(ValueError, match=r"labels hold 3 \(3 pixels\), 254 \(1 pixels\)"):
            ops.class_sums(features, labels, 3, resolution="feature")


@pytest.mark.parametrize("num_classes", [1, 2, 64])
@pytest.mark.parametrize("dim", [1, 3, 65])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_classes_and_channels(layout: str, dim: int, num_classes: int) -> None:
    for (normalize, squares), ratio in itertools.product(MODES, (1, 3)):
        features = make_features((2, dim, 11, 9), layout, torch.float32)
        check(features, make_labels((2, 11 * ratio, 9 * ratio), num_classes), num_classes, normalize, squares)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ratio", [1, 2])
def test_label_dtypes_and_strides(ratio: int, dtype: torch.dtype) -> None:
    features = make_features((2, 4, 6, 8), "contiguous", torch.float64)
    labels = make_labels((2, 12 * ratio, 8 * ratio + 1), 5, dtype)[:, ::2, 1:]
    assert not labels.is_contiguous()
    for normalize, squares in MODES:
        check(features, labels, 5, normalize, squares)
        check(features, labels.mT.contiguous().mT, 5, normalize, squares)


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize(("normalize", "squares"), MODES)
def test_labels_outside_the_classes_are_skipped(ratio: int, normalize: bool, squares: bool) -> None:
    features = make_features((1, 3, 4, 4), "contiguous", torch.float64)
    labels = make_labels((1, 4 * ratio, 4 * ratio), 3)
    stray = labels.clone()
    stray[labels == IGNORE] = -7
    stray[0, 0, :2] = torch.tensor([3, 2**40])
    labels[0, 0, :2] = IGNORE
    for given, expected in zip(
        torch.ops.in2nect_cpp.class_sums(features, stray, 3, IGNORE, normalize, squares)[:3],
        torch.ops.in2nect_cpp.class_sums(features, labels, 3, IGNORE, normalize, squares)[:3],
    ):
        assert torch.equal(given, expected)
    # an ignored index that is itself a class is ignored
    counts = torch.ops.in2nect_cpp.class_sums(features, labels, 3, 1, normalize, squares)[1]
    assert counts.tolist() == [int((labels == 0).sum()), 0, int((labels == 2).sum())]


@pytest.mark.parametrize(("normalize", "squares"), MODES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_no_pixels(shape: tuple, normalize: bool, squares: bool) -> None:
    features = torch.randn(shape)
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    sums, counts, got_squares, _ = torch.ops.in2nect_cpp.class_sums(features, labels, 3, IGNORE, normalize, squares)
    assert torch.equal(sums, torch.zeros(3, 3))
    assert torch.equal(counts, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(got_squares, torch.zeros(3 if squares else 0))
    grad = torch.ops.in2nect_cpp.class_sums_backward(torch.ones(3, 3), None, features, labels, IGNORE, normalize)
    assert grad.shape == shape


@pytest.mark.parametrize("ratio", [1, 2, 5])
@pytest.mark.parametrize(("normalize", "squares"), MODES)
def test_all_ignored(ratio: int, normalize: bool, squares: bool) -> None:
    # NaN where no label looks must reach neither the sums nor the gradient.
    features = torch.full((2, 3, 4, 5), torch.nan)
    labels = torch.full((2, 4 * ratio, 5 * ratio), IGNORE, dtype=torch.uint8)
    sums, counts, got_squares, _ = torch.ops.in2nect_cpp.class_sums(features, labels, 3, IGNORE, normalize, squares)
    assert torch.equal(sums, torch.zeros(3, 3))
    assert torch.equal(counts, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(got_squares, torch.zeros(3 if squares else 0))
    upstream = torch.ones(3) if squares else None
    grad = torch.ops.in2nect_cpp.class_sums_backward(torch.ones(3, 3), upstream, features, labels, IGNORE, normalize)
    assert torch.equal(grad, torch.zeros_like(features))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [1, 2])
def test_zero_rows_have_zero_gradients(ratio: int, layout: str) -> None:
    features = make_features((1, 4, 6, 6), layout, torch.float64)
    features[:, :, 1:4, 1:4] = 0
    labels = make_labels((1, 6 * ratio, 6 * ratio), 3)
    check_gradient = torch.ops.in2nect_cpp.class_sums_backward(
        torch.randn(3, 4).double(), torch.randn(3).double(), features, labels, IGNORE, True
    )
    assert torch.isfinite(check_gradient).all()
    centre = check_gradient[:, :, 2, 2] if ratio == 2 else check_gradient[:, :, 1:4, 1:4]
    assert torch.equal(centre, torch.zeros_like(centre))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [1, 2])
def test_only_one_upstream_gradient(ratio: int, layout: str) -> None:
    features = make_features((2, 4, 6, 6), layout, torch.float64)
    labels = make_labels((2, 6 * ratio, 6 * ratio), 3)
    backward = torch.ops.in2nect_cpp.class_sums_backward
    grad_sums, grad_squares = torch.randn(4, 3).double().T, torch.randn(3).double()
    for normalize in (False, True):
        both = backward(grad_sums, grad_squares, features, labels, IGNORE, normalize)
        apart = backward(grad_sums, None, features, labels, IGNORE, normalize)
        apart = apart + backward(None, grad_squares, features, labels, IGNORE, normalize)
        torch.testing.assert_close(both, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize(("normalize", "squares"), MODES)
def test_same_bits_for_any_number_of_threads(ratio: int, layout: str, normalize: bool, squares: bool) -> None:
    features = make_features((2, 32, 64, 48), layout, torch.float32)
    labels = make_labels((2, 64 * ratio, 48 * ratio), 7)
    grad_sums, grad_squares = torch.randn(7, 32), torch.randn(7) if squares else None

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        *outputs, _ = torch.ops.in2nect_cpp.class_sums(features, labels, 7, IGNORE, normalize, squares)
        gradient = torch.ops.in2nect_cpp.class_sums_backward(
            grad_sums, grad_squares, features, labels, IGNORE, normalize
        )
        return [*outputs, gradient]

    before = torch.get_num_threads()
    try:
        one = run(1)
        for threads in (2, 3, 5, 2):
            assert all(torch.equal(a, b) for a, b in zip(one, run(threads)))
    finally:
        torch.set_num_threads(before)


def test_long_sums_stay_accurate() -> None:
    # 2^22 equal terms: a running float32 sum is off by percents, vectors of sums over a tile are not; without vectors
    # (as sanitizers build the loops) a tile's own 512 terms round.
    limit = 512 * 2**-24 if os.environ.get("IN2NECT_NATIVE_DIR") else 1e-6
    features = torch.full((1, 1, 1, 1), 0.1).expand(1, 1, 2048, 2048)
    sums = torch.ops.in2nect_cpp.class_sums(features, torch.zeros(1, 2048, 2048).byte(), 2, IGNORE, False, False)[0]
    assert abs(sums[0, 0].item() / (0.1 * 2**22) - 1) < limit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.randn(2, 3, 4)}, r"\(B, d, h, w\), got 3"),
        ({"features": torch.ones(2, 3, 4, 4, dtype=torch.int64)}, "bfloat16 or float16, got Long"),
        ({"labels": torch.zeros(2, 1, 4, 4).long()}, r"\(B, H, W\), got 4"),
        ({"labels": torch.zeros(2, 4, 4)}, "uint8, int32 or int64, got Float"),
        ({"labels": torch.zeros(3, 4, 4).long()}, "2 images and labels 3"),
        ({"num_classes": 0}, "at least 1, got 0"),
    ],
)
def test_errors_say_what_was_given(change: dict, message: str) -> None:
    call = {"features": torch.randn(2, 3, 4, 4), "labels": torch.zeros(2, 4, 4).long(), "num_classes": 3} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.in2nect_cpp.class_sums(*call.values(), IGNORE, False, False)


def test_upstream_shapes_are_checked() -> None:
    features, labels = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4).long()
    with pytest.raises(RuntimeError, match=r"grad_sums must be \(K, 3\) Float"):
        torch.ops.in2nect_cpp.class_sums_backward(torch.zeros(5, 4), None, features, labels, IGNORE, False)
    with pytest.raises(RuntimeError, match=r"grad_squares must be \(5,\) Float"):
        torch.ops.in2nect_cpp.class_sums_backward(torch.zeros(5, 3), torch.zeros(4), features, labels, IGNORE, False)


needs_cuda = pytest.mark.skipif(
    not (native.available("cuda") and torch.cuda.is_available()),
    reason=native.why_not("cuda") or "needs a CUDA device",
)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("normalize", "squares"), MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_twin(dtype: torch.dtype, layout: str, normalize: bool, squares: bool) -> None:
    for shape, num_classes in (((2, 16, 96, 80), 7), ((1, 3, 1, 1), 2), ((3, 65, 17, 13), 64)):
        features, labels = make_features(shape, layout, dtype), make_labels((shape[0], *shape[2:]), num_classes)
        check(features, labels, num_classes, normalize, squares, device="cuda")


@pytest.mark.gpu
@needs_cuda
def test_cuda_twin_has_the_same_bits_every_time() -> None:
    features, labels = torch.randn(4, 64, 128, 128, device="cuda"), make_labels((4, 128, 128), 7).cuda()
    first = torch.ops.in2nect_cuda.class_sums(features, labels, 7, IGNORE, True, True)
    for _ in range(100):
        again = torch.ops.in2nect_cuda.class_sums(features, labels, 7, IGNORE, True, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
@needs_cuda
def test_cuda_twin_names_the_other_backends_at_label_resolution() -> None:
    features, labels = torch.randn(1, 3, 4, 4, device="cuda"), torch.zeros(1, 8, 8, device="cuda").long()
    with pytest.raises(RuntimeError, match=r"4 x 4 and labels of 8 x 8.*the reference"):
        torch.ops.in2nect_cuda.class_sums(features, labels, 2, IGNORE, False, False)
