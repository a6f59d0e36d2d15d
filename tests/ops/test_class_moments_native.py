"""What the compiled class_moments has beyond test_class_moments.py: every build of it, threads, size and memory."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from in2nect import functional, native, ops, reference
from in2nect.ops.backend import use_backend
from tests.samples import clustered

pytestmark = pytest.mark.skipif(not native.available("cpp"), reason=f"cpp backend: {native.why_not('cpp')}")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def capability(request: pytest.FixtureRequest):
    if request.param not in native.available_cpu_capabilities():
        pytest.skip(f"this CPU has no {request.param}")
    with use_backend("cpp"), native.use_cpu_capability(request.param):
        yield request.param


@pytest.fixture
def many_threads():
    before = torch.get_num_threads()
    yield (1, 2, 3, 5, 2)
    torch.set_num_threads(before)


def loss_sums_and_gradient(features: Tensor, labels: Tensor, num_classes: int = 5, **options) -> tuple[Tensor, ...]:
    z = features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss, sums, _ = ops.class_moments(z, labels, num_classes, sums=True, **options)
    (grad,) = torch.autograd.grad(loss + sums.square().sum() / len(labels), z)
    return loss.detach(), sums.detach(), grad


def reference_loss_and_gradient(features: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    z = features.detach().double().requires_grad_()
    loss = reference.intra_class_loss(z, labels, 5, **options)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(
    ("grid", "pixels", "dim"),
    [((5, 4), (5, 4), 6), ((3, 130), (3, 130), 40), ((4, 70), (9, 300), 19), ((35, 6), (70, 6), 33)],
)
def test_every_build(capability, grid, pixels, dim, layout, covariance):
    """Blocks that are not whole, along pixels, channels and classes; in float64 and float32."""
    z, y = clustered(5, dim, features=grid, labels=pixels, layout=layout, absent=(1,), singleton=4)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        features = z.to(dtype) if layout != "strided" else z if dtype == torch.float64 else z.float()
        features = features.detach().requires_grad_()
        loss = ops.class_moments(features, y, 5, covariance=covariance).loss
        (grad,) = torch.autograd.grad(loss, features)
        truth = reference_loss_and_gradient(features, y, covariance=covariance)
        assert (loss - truth[0]).abs() <= tolerance * truth[0].abs()
        assert (grad - truth[1]).norm() <= tolerance * truth[1].norm()


@pytest.mark.parametrize("scale", [1e-9, 1e10, 1e17])
@pytest.mark.parametrize("pixels", [(5, 4), (10, 8)])
def test_features_of_any_size(capability, pixels, scale):
    """Squares of the larger ones leave float32's range; their directions do not."""
    z, y = clustered(5, 8, labels=pixels, dtype=torch.float32)
    for covariance in ("pooled", "class"):
        options = {"covariance": covariance}
        wide = z.clone().requires_grad_()
        loss = functional.intra_class_loss(wide, y, 5, **options)
        found = functional.intra_class_loss(wide * scale, y, 5, **options)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(value, wide)[0] for value in (loss, found)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * grads[0].abs().max().item())


@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("pixels", [(60, 60), (120, 120), (97, 130)])
def test_same_bits_for_any_number_of_threads(capability, many_threads, pixels, covariance):
    z, y = clustered(5, 24, features=(60, 60), labels=pixels, dtype=torch.float32)
    results = []
    for threads in many_threads:
        torch.set_num_threads(threads)
        results.append(loss_sums_and_gradient(z, y, covariance=covariance))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("labels", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes(labels):
    z, y = clustered(5, 6, labels=(10, 8))
    with use_backend("cpp"):
        results = loss_sums_and_gradient(z, y), loss_sums_and_gradient(z, y.to(labels))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_million_pixels_stay_accurate():
    """Sums in float32 lanes over a tile, then in float64."""
    z, y = clustered(5, 8, batch=1, features=(1024, 1024), dtype=torch.float32, spread=1.0)
    with use_backend("cpp"):
        loss, _, grad = loss_sums_and_gradient(z, y)
        wide, _, wide_grad = loss_sums_and_gradient(z.double(), y)
    assert (loss - wide).abs() <= 2e-6 * wide.abs()
    assert (grad - wide_grad).norm() <= 1e-5 * wide_grad.norm()


MEMORY = """
import sys
import torch
from in2nect import functional

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

def extra(batch, covariance):
    z = torch.randn(batch, 64, 256, 256, requires_grad=True)
    y = torch.randint(0, 7, (batch, 1024, 1024), dtype=torch.uint8)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    loss = functional.class_means_and_intra_class_loss(z, y, 7, covariance=covariance)[2]
    grad, = torch.autograd.grad(loss, z)
    return status("VmHWM") - before - grad.nbytes / 2**20

torch.set_num_threads(2)
extra(1, "pooled")
print(extra(16, "pooled"), extra(8, "pooled"), extra(2, "class"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_at_label_resolution():
    """16 x 64 x 256 x 256 features under 1024^2 labels: a number a label pixel would be 64 MiB, the rows 4 GiB. What is
    taken beside the gradient is the threads' own, and does not grow with the pixels."""
    # glibc maps blocks of 64 KiB or more for themselves, so that what was freed does not hide what is taken
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "IN2NECT_BACKEND": "cpp"}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    whole, half, by_class = map(float, done.stdout.split())
    assert whole <= 32
    assert whole <= half + 4
    assert by_class <= 64
