"""The whole exact loss by kernels against the reference, and the graph and memory that users of it see."""

import importlib

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from in2nect import In2NeCTLoss, functional, ops, reference, use_backend
from in2nect.kernels import pair_logsumexp, table
from in2nect.kernels.table import EVERY, FLOATS, Entry
from tests.samples import clustered

PAIR_KERNELS = ("pair_symmetric_forward", "pair_symmetric_backward", "pair_forward", "pair_backward")


@pytest.fixture
def small_tiles(monkeypatch):
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 16}
    for name in PAIR_KERNELS:
        monkeypatch.setitem(table.TABLE, name, (Entry(EVERY, FLOATS, 1024, blocks, 4, 1, "test"),))


def both(features, labels, num_classes, **options):
    """(loss, gradient) of the kernels and of the reference."""
    results = []
    for module in (functional, reference):
        z = features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        loss = module.intra_class_loss(z, labels, num_classes, estimator="exact", **options)
        results.append((loss, torch.autograd.grad(loss, z)[0]))
    return results


def agree(features, labels, num_classes, rtol=1e-10, **options):
    (ours, our_grad), (theirs, their_grad) = both(features, labels, num_classes, **options)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(our_grad, their_grad, rtol=rtol, atol=rtol * float(their_grad.norm()))
    return our_grad


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("grid", "dim"), [((5, 4), 6), ((8, 8), 16), ((9, 5), 33)])
def test_layouts_and_sizes(triton_device, small_tiles, grid, dim, layout, normalize):
    """Tiles within an image, across images, and rows in parts, whose gradients go through a buffer."""
    z, y = clustered(5, dim, features=grid, layout=layout, absent=(1,), singleton=4)
    z[0, :, 0, 0] = 0.0
    agree(z.to(triton_device), y.to(triton_device), 5, normalize=normalize)


@pytest.mark.parametrize("temperature", [1.0, 0.07, 4.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_temperatures_and_the_tables_tiles(triton_device, normalize, temperature):
    z, y = clustered(4, 12, features=(13, 11))
    agree(z.to(triton_device), y.to(triton_device), 4, normalize=normalize, temperature=temperature)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.01, 0.005])
def test_zero_rows_at_low_temperatures(triton_device, small_tiles, temperature, deterministic):
    """Zero rows have no term of 1 in their sum, which the constant shift would lose."""
    z, y = clustered(4, 6, features=(6, 5), ignored=0, dtype=torch.float32)
    z[0, :, 0] = 0.0
    z, y = z.to(triton_device), y.to(triton_device)
    torch.use_deterministic_algorithms(deterministic)
    try:
        (ours, our_grad), _ = both(z, y, 4, temperature=temperature)
    finally:
        torch.use_deterministic_algorithms(False)
    _, (theirs, their_grad) = both(z.double(), y, 4, temperature=temperature)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    assert (our_grad.double() - their_grad).norm() <= 1e-4 * their_grad.norm()


def test_labels_of_any_stride(triton_device, small_tiles):
    rows = torch.randn(40, 6, dtype=torch.float64, device=triton_device)
    labels = torch.randint(0, 3, (80,), device=triton_device)
    agree(rows, labels[::2], 3)
    agree(rows, labels[0].expand(40), 3)
    z, y = clustered(4, 6)
    stacked = torch.stack([y, 255 - y], dim=-1).to(triton_device)
    agree(z.to(triton_device), stacked[..., 0], 4)


@pytest.mark.parametrize("size", [1e4, 1e5, 1e8, 1e12, 1e30])
@pytest.mark.parametrize("normalize", [True, False])
def test_huge_rows_of_ignored_pixels(triton_device, small_tiles, normalize, size):
    """Finite, so they do not raise the flag by themselves: what they multiply must be 0 before it can be NaN."""
    z, y = clustered(4, 6, features=(7, 6), dtype=torch.float32)
    y[0, 1, 1] = y[1, 5, 0] = 255
    z, y = z.to(triton_device), y.to(triton_device)
    (clean, clean_grad), _ = both(z, y, 4, normalize=normalize)
    z[0, :, 1, 1] = z[1, 0, 5, 0] = size
    (loss, grad), _ = both(z, y, 4, normalize=normalize)
    torch.testing.assert_close(loss, clean, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, clean_grad, rtol=1e-3, atol=1e-5 * float(clean_grad.norm()))


@pytest.mark.parametrize("labels", [(10, 8), (7, 9)])
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_resolutions(triton_device, small_tiles, labels, resolution):
    z, y = clustered(4, 6, labels=labels)
    agree(z.to(triton_device), y.to(triton_device), 4, resolution=resolution)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [6, 20])
def test_ignored_pixels_may_hold_anything(triton_device, small_tiles, normalize, dim):
    """NaN or Inf raises the flag; the general kernels then leave ignored rows unread."""
    z, y = clustered(4, dim, features=(7, 6))
    y[0, 1, 1] = y[1, 3, 3] = y[0, 5, 0] = 255
    expected = agree(z.to(triton_device), y.to(triton_device), 4, normalize=normalize)
    bad = z.clone()
    bad[0, :, 1, 1], bad[1, 2, 3, 3], bad[0, 1, 5, 0] = float("nan"), float("inf"), -1e200
    bad = bad.to(triton_device).requires_grad_()
    loss = functional.intra_class_loss(bad, y.to(triton_device), 4, estimator="exact", normalize=normalize)
    (grad,) = torch.autograd.grad(loss, bad)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_shows(triton_device, small_tiles, deterministic):
    z, y = clustered(3, 4)
    z[0, 0, 0, 0], y[0, 0, 0] = float("nan"), 0
    torch.use_deterministic_algorithms(deterministic)
    try:
        loss = functional.intra_class_loss(z.to(triton_device), y.to(triton_device), 3, estimator="exact")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isnan(loss)


def test_deterministic_mode_gives_the_same_loss(triton_device, small_tiles):
    z, y = clustered(5, 6, features=(8, 9))
    torch.use_deterministic_algorithms(True)
    try:
        agree(z.to(triton_device), y.to(triton_device), 5)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [3, 18])
def test_gradcheck(triton_device, small_tiles, dim, normalize):
    z, y = clustered(3, dim, features=(2, 3), batch=1, singleton=2, ignored=0)
    z, y = z.to(triton_device).requires_grad_(), y.to(triton_device)

    def loss(z):
        return functional.intra_class_loss(z, y, 3, estimator="exact", normalize=normalize, temperature=0.8)

    assert gradcheck(loss, z, fast_mode=dim > 16)  # along random directions where each channel is many calls


@pytest.mark.parametrize(("shape", "labels"), [((0, 4), []), ((1, 4), [1]), ((3, 4), [0, 1, 255]), ((2, 4), [255] * 2)])
def test_no_pair_of_pixels(triton_device, shape, labels):
    z = torch.randn(shape, dtype=torch.float64, device=triton_device, requires_grad=True)
    y = torch.tensor(labels, dtype=torch.int64, device=triton_device)
    loss = functional.intra_class_loss(z, y, 3, estimator="exact")
    assert float(loss.detach()) == 0.0
    assert not torch.autograd.grad(loss, z)[0].any()


def test_opcheck(triton_device):
    z, y = clustered(4, 6)
    z, y = z.to(triton_device), y.to(triton_device)
    opcheck(torch.ops.in2nect.intra_exact, (z.requires_grad_(), y, 4, 255, 0.7, True))
    outputs = [t.detach() for t in torch.ops.in2nect.intra_exact(z, y, 4, 255, 0.7, True)]
    opcheck(torch.ops.in2nect.intra_exact_backward, (outputs[0], z.detach(), y, *outputs[1:], 255, 0.7, True))


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the interpreter has no such dtype")
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, GPU]),
    pytest.param(torch.float16, marks=[pytest.mark.gpu, GPU]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_error_against_torch_in_the_same_dtype(triton_device, dtype, normalize):
    z, y = clustered(6, 24, features=(23, 17), dtype=dtype)
    z, y = z.to(triton_device), y.to(triton_device)
    options = {"estimator": "exact", "normalize": normalize}
    results = []
    for module, features in ((functional, z), (reference, z), (reference, z.double())):
        features = features.detach().requires_grad_()
        loss = module.intra_class_loss(features, y, 6, **options)
        results.append((loss.double(), torch.autograd.grad(loss, features)[0].double()))
    (ours, our_grad), (plain, plain_grad), (truth, true_grad) = results
    epsilon = torch.finfo(torch.float32).eps
    largest = 1.0 if normalize else float(z.double().square().sum(1).max())
    assert abs(ours - truth) <= 2 * abs(plain - truth) + 24 * epsilon * largest
    assert (our_grad - true_grad).norm() <= 3 * (plain_grad - true_grad).norm() + 8 * epsilon * true_grad.norm()


class Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of every storage that an operation makes within it."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result


def test_what_the_backward_allocates(triton_device, monkeypatch):
    """One tensor of the features' size, the gradient, and three numbers a pixel beside log D, which the forward kept.

    Of the host functions: the launches are left out, because the interpreter copies what it works on.
    """
    monkeypatch.setattr(pair_logsumexp, "launch", lambda *arguments, **options: None)
    backward = importlib.import_module("in2nect.kernels.intra_exact").intra_exact_backward
    z, y = clustered(4, 16, features=(8, 16), dtype=torch.float32)  # a grid that needs no copy
    z, y = z.to(triton_device), y.to(triton_device)
    log_d = torch.rand(y.numel(), device=triton_device)
    per_class, sums = torch.rand(4, device=triton_device), torch.rand(4, 16, device=triton_device)
    with Allocated() as allocated:
        backward(z, y, log_d, per_class, per_class, sums, per_class, 255, 1.0, True)
    gradient = z.numel() * z.element_size()
    assert allocated.sizes.count(gradient) == 1
    assert sum(allocated.sizes) - gradient <= 12 * y.numel() + 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_extra_memory():
    """At N = 65,536, d = 64, bfloat16: the gradient and 16 bytes a pixel, as the allocator counts."""
    z = torch.randn(65536, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = torch.randint(0, 7, (65536,), device="cuda")
    with use_backend("triton"):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = functional.intra_class_loss(z, y, 7, estimator="exact")
            (grad,) = torch.autograd.grad(loss, z)
            extra = torch.cuda.max_memory_allocated() - before
            del loss, grad
    assert extra <= 65536 * (64 * 2 + 16) + 2**16


@pytest.mark.parametrize("estimator", ["exact", "sampled", "moments"])
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_a_compiled_loss_has_one_graph(triton_device, estimator, resolution):
    z, y = clustered(4, 6, labels=(10, 8), dtype=torch.float32)
    z, y = z.to(triton_device).requires_grad_(), y.to(triton_device)
    criterion = In2NeCTLoss(4, 6, estimator=estimator, resolution=resolution, per_class=6).to(triton_device)
    torch.manual_seed(1)
    expected = criterion(z, y).total
    torch.compiler.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="inductor" if triton_device == "cuda" else "aot_eager")
    torch.manual_seed(1)
    found = compiled(z, y).total
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(total, z)[0] for total in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_a_cuda_graph_of_a_loss_step(estimator, deterministic):
    z, y = clustered(5, 32, features=(32, 32), dtype=torch.float32)
    z, y = z.cuda().requires_grad_(), y.cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    criterion = In2NeCTLoss(5, 32, estimator=estimator, per_class=10_000).cuda()  # every pixel, whatever the seed
    torch.use_deterministic_algorithms(deterministic)
    try:

        def step():
            total = criterion(z, y, generator=generator).total
            return total, torch.autograd.grad(total, z)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            total, grad = step()
        with torch.no_grad():
            z.add_(0.3 * torch.randn_like(z))
        graph.replay()
        expected, expected_grad = step()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_million_pixels():
    rows = torch.randn(2**20, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    labels = torch.randint(0, 7, (2**20,), device="cuda")
    with use_backend("triton"):
        loss = functional.intra_class_loss(rows, labels, 7, estimator="exact")
        (grad,) = torch.autograd.grad(loss, rows)
    moments = functional.intra_class_loss(rows.float(), labels, 7)
    torch.testing.assert_close(loss, moments, rtol=1e-3, atol=0)
    assert grad.isfinite().all()


def test_errors(triton_device):
    z, y = clustered(3, 4, labels=(10, 8))
    with pytest.raises(ValueError, match=r"\(2, 4, 5, 4\) and labels \(2, 10, 8\); expected one grid"):
        ops.intra_exact(z.to(triton_device), y.to(triton_device), 3)
    with pytest.raises(ValueError, match="temperature is 0"):
        ops.intra_exact(z, y[:, ::2, ::2], 3, temperature=0.0)
