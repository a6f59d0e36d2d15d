"""The C++ operators behind pair_logsumexp and intra_exact against the equations in float64, in every build of their
vector kernels that this CPU can run."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from in2nect import functional, native, ops, reference, use_backend
from tests.samples import clustered

pytestmark = pytest.mark.skipif(not native.available("cpp"), reason=f"cpp backend: {native.why_not('cpp')}")

SLOW = ("amx_emulated",)  # small sizes alone


@pytest.fixture(params=native.CPU_CAPABILITIES)
def capability(request: pytest.FixtureRequest):
    if request.param not in native.available_cpu_capabilities():
        pytest.skip(f"this CPU has no {request.param}")
    with use_backend("cpp"), native.use_cpu_capability(request.param):
        yield request.param


@pytest.fixture
def one_and_many_threads():
    before = torch.get_num_threads()
    yield (1, 2, 3, 5, 2)
    torch.set_num_threads(before)


def rows_of(number: int, dim: int, dtype: torch.dtype, unit: bool = True) -> Tensor:
    rows = torch.randn(number, dim)
    return (F.normalize(rows, dim=1) if unit else rows).to(dtype)


def log_d_and_gradients(
    anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float, upstream: Tensor, oracle: bool = False
) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (anchors, keys) if t is not None]
    if oracle:
        log_d = reference.exact_log_d(leaves[0], leaves[-1], weights, temperature)
    else:
        log_d = ops.pair_logsumexp(leaves[0], weights, temperature, keys=None if keys is None else leaves[1])
    return log_d.detach(), *torch.autograd.grad(log_d, leaves, upstream.to(log_d.dtype))


def agree(
    anchors: Tensor, keys: Tensor | None, weights: Tensor, temperature: float = 1.0, slack: float = 4.0
) -> tuple[Tensor, ...]:
    """float64 to rounding; lower precision by errors of at most 2x (values) and 3x (gradients) those of torch in the
    same dtype, plus some units of float32, in which both accumulate."""
    upstream = torch.randn(len(anchors))
    ours = log_d_and_gradients(anchors, keys, weights, temperature, upstream)
    wide = [None if t is None else t.double() for t in (anchors, keys, weights)]
    truth = log_d_and_gradients(*wide, temperature, upstream, oracle=True)
    if anchors.dtype == torch.float64:
        for found, wanted in zip(ours, truth):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
        return ours
    plain = log_d_and_gradients(
        anchors.float(), None if keys is None else keys.float(), weights.float(), temperature, upstream, oracle=True
    )
    for position, (found, same, wanted) in enumerate(zip(ours, plain, truth)):
        assert found.dtype == (anchors.dtype if position else torch.float32)
        rounded = same.to(found.dtype)
        allowed = (3 if position else 2) * (rounded - wanted).norm()
        allowed += slack * torch.finfo(torch.float32).eps * wanted.norm()
        assert (found - wanted).norm() <= allowed, (position, float((found - wanted).norm()), float(allowed))
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [None, 1, 123, 300])
@pytest.mark.parametrize(("number", "dim"), [(1, 1), (123, 7), (252, 64), (507, 33)])
def test_values_and_gradients(capability, number, dim, keys, dtype):
    if capability in SLOW and number * (keys or number) * dim > 3_000_000:
        pytest.skip("emulated registers are slow")
    weights = torch.rand(keys or number, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    agree(rows_of(number, dim, dtype), None if keys is None else rows_of(keys, dim, dtype), weights)


@pytest.mark.parametrize("temperature", [0.3, 0.07, 0.01, 3.0])
@pytest.mark.parametrize("keys", [None, 60])
def test_temperatures(capability, keys, temperature):
    """Down to where the constant shift gives way to the running maximum."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights = torch.rand(keys or 100, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        anchors, columns = rows_of(100, 20, dtype), None if keys is None else rows_of(keys, 20, dtype)
        agree(anchors, columns, weights, temperature, slack=16 / temperature)  # exponents of 1 / tau round by so much


@pytest.mark.parametrize("keys", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_and_weights_that_are_far_apart(capability, dtype, keys):
    """Norms from 1e-3 to 20, zero rows, weights down to 1e-30 and none: the constant shift would underflow."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(keys or 90, dtype=wide)
    weights[::5], weights[1::7] = 0.0, 1e-30
    rows = [rows_of(n, 12, torch.float64) * torch.logspace(-3, 1.3, n)[:, None] for n in (90, keys or 1)]
    rows[0][3] = 0.0
    largest = float(rows[0].norm(dim=1).max() * (rows[1] if keys else rows[0]).norm(dim=1).max())
    agree(rows[0].to(dtype), None if keys is None else rows[1].to(dtype), weights, slack=2 * largest)


def test_no_key_at_all(capability):
    for dtype in (torch.float32, torch.bfloat16):
        rows = rows_of(30, 5, dtype).requires_grad_()
        log_d = ops.pair_logsumexp(rows, torch.zeros(30), 1.0)
        assert torch.isneginf(log_d).all()
        assert not torch.autograd.grad(torch.where(torch.isinf(log_d), 0.0, log_d).sum(), rows)[0].any()
        log_d = ops.pair_logsumexp(rows, torch.zeros(0), 1.0, keys=rows.detach()[:0])
        assert torch.isneginf(log_d).all()
    assert ops.pair_logsumexp(torch.zeros(0, 5), torch.zeros(0), 1.0).shape == (0,)


def test_some_keys_are_not_there(capability):
    """A key of weight 0 counts for nothing, and is an anchor all the same."""
    weights = torch.rand(200)
    weights[torch.rand(200) < 0.5] = 0.0
    agree(rows_of(200, 16, torch.float32), None, weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_shows(capability, bad):
    for dtype in (torch.float32, torch.bfloat16):
        rows = rows_of(150, 6, dtype)
        rows[77, 2] = bad
        log_d, grad = log_d_and_gradients(rows, None, torch.ones(150), 1.0, torch.ones(150))
        assert log_d.isnan().all()
        assert grad.isnan().all()


@pytest.mark.parametrize("keys", [None, 250])
def test_strides(capability, keys):
    large = torch.randn(2 * 130, 40, dtype=torch.float64)
    anchors = large[::2, 3:20]
    columns = None if keys is None else torch.randn(17, keys, dtype=torch.float64).T
    weights = torch.rand(2 * (keys or 130), dtype=torch.float64)[::2]
    agree(anchors, columns, weights)


@pytest.mark.parametrize("keys", [None, 700])
@pytest.mark.parametrize("number", [1000, 1060])  # eleven blocks of 96 rows, and twelve
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(capability, one_and_many_threads, dtype, number, keys):
    if capability in SLOW:
        number, keys = 300, keys and 200
    rows, columns = rows_of(number, 24, dtype), None if keys is None else rows_of(keys, 24, dtype)
    weights, upstream = torch.rand(keys or number), torch.randn(number)

    def run(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        return log_d_and_gradients(rows, columns, weights, 0.5, upstream)

    first, *others = (run(threads) for threads in one_and_many_threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("number", [8200, 33_000])  # tiles of 192 rows; and blocks of 4 x 4 tiles
def test_many_rows(number):
    """Some rows of many, worked out alone."""
    rows = rows_of(number, 5, torch.float32)
    weights, a = torch.rand(number) / number, torch.rand(number)
    with use_backend("cpp"):
        log_d, grad = log_d_and_gradients(rows, None, weights, 0.5, a)
    some = torch.randperm(number)[:40]
    wide, w = rows.double(), weights.double()
    similarity = wide[some] @ wide.T / 0.5
    torch.testing.assert_close(log_d[some].double(), torch.logsumexp(similarity + w.log(), 1), rtol=0, atol=2e-6)
    shares = a[some, None] * (similarity + w.log() - log_d[some, None]).exp()
    shares = shares + a * w[some, None] * (similarity - log_d).exp()
    expected = shares @ wide / 0.5
    assert (grad[some] - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products_as_precise_as_torch_is_told(capability, precision):
    """ "high": factors of two bfloat16 numbers, where the chip multiplies them so fast that it pays."""
    rows, weights, upstream = rows_of(300, 64, torch.float32), torch.rand(300) / 300, torch.randn(300)
    truth = log_d_and_gradients(rows.double(), None, weights.double(), 1.0, upstream, oracle=True)
    torch.set_float32_matmul_precision(precision)
    try:
        log_d, grad = log_d_and_gradients(rows, None, weights, 1.0, upstream)
    finally:
        torch.set_float32_matmul_precision("highest")
    value, slope = (log_d - truth[0]).abs().max(), (grad - truth[1]).norm() / truth[1].norm()
    split = precision == "high" and capability.startswith("amx")
    assert value <= (4e-6 if split else 1e-6)
    assert slope <= (1e-5 if split else 1e-6)
    assert slope > 1e-6 or not split  # else it was not what it should have been


def loss_and_gradient(module, features: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    z = features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = module.intra_class_loss(z, labels, 5, estimator="exact", resolution="feature", **options)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("grid", "dim"), [((5, 4), 6), ((3, 130), 40), ((23, 17), 96)])
def test_the_loss(capability, grid, dim, layout, normalize):
    """Patches of a row, more than one of them; absent and singleton classes; zero rows; ignored rows of NaN."""
    if capability in SLOW and dim == 96:
        pytest.skip("emulated registers are slow")
    z, y = clustered(5, dim, features=grid, layout=layout, absent=(1,), singleton=4)
    z[0, :, 0, 0] = 0.0
    ignored = (y == 255)[:, None].expand_as(z)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        features = z.to(dtype)
        poisoned = torch.where(ignored, torch.nan, features)
        if layout == "strided":
            poisoned = torch.empty_strided(
                (z.shape[0], z.shape[1] * 2, *z.shape[2:]),
                (z[0].numel() * 2, 1, *(2 * z.shape[1] * s for s in (z.shape[3], 1))),
                dtype=dtype,
            )[:, ::2].copy_(poisoned)
        ours = loss_and_gradient(functional, poisoned, y, normalize=normalize)
        truth = loss_and_gradient(reference, features.double(), y, normalize=normalize)
        plain = loss_and_gradient(reference, features, y, normalize=normalize)
        epsilon = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        largest = 1.0 if normalize else float(features.double().square().sum(1).max())
        units = 100 if dtype == torch.float64 else 20  # in float64 the truth itself is off by some
        assert (ours[0] - truth[0]).abs() <= 2 * (plain[0] - truth[0]).abs() + units * epsilon * largest
        allowed = 3 * (plain[1] - truth[1]).norm() + 8 * epsilon * truth[1].norm() * largest
        assert (ours[1] - truth[1]).norm() <= allowed
        assert ours[1].dtype == dtype
        assert not ours[1][ignored].any()


@pytest.mark.parametrize("scale", [1e-9, 1e10, 1e17])
def test_features_of_any_size(capability, scale):
    """Squares of the larger ones leave float32's range; their directions do not."""
    z, y = clustered(5, 8, dtype=torch.float32)
    loss, grad = loss_and_gradient(functional, z, y)
    for dtype in (torch.float32, torch.bfloat16):
        found, slope = loss_and_gradient(functional, (z * scale).to(dtype), y)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, loss, rtol=tolerance, atol=tolerance)
        difference = (slope.double() * scale - grad).norm() / grad.norm()
        assert difference <= (1e-4 if dtype == torch.float32 else 5e-2)


def test_every_pixel_ignored(capability):
    z, y = torch.randn(1, 4, 3, 3), torch.full((1, 3, 3), 255)
    loss, grad = loss_and_gradient(functional, z, y)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": torch.randn(4, 3, 2)}, r"must be \(N, d\) and \(M, d\)"),
        ({"keys": torch.randn(5, 2)}, r"must be \(N, d\) and \(M, d\)"),
        ({"keys": torch.randn(6, 3).double()}, "keys must have the anchors' dtype, got Double and Float"),
        ({"weights": torch.ones(5)}, r"weights must be \(6,\) Float"),
        ({"anchors": torch.ones(4, 3).long(), "keys": torch.ones(6, 3).long()}, "bfloat16 or float16, got Long"),
        ({"temperature": 0.0}, "temperature must be positive, got 0"),
    ],
)
def test_errors_say_what_was_given(change, message):
    call = {"anchors": torch.randn(4, 3), "keys": torch.randn(6, 3), "weights": torch.ones(6), "temperature": 1.0}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.in2nect_cpp.pair_logsumexp(*(call | change).values(), False)


MEMORY = """
import sys
import torch
from in2nect import functional

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

def extra(pixels):
    z, y = torch.randn(1, 64, pixels // 128, 128, requires_grad=True), torch.randint(0, 7, (1, pixels // 128, 128))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    loss = functional.intra_class_loss(z, y, 7, estimator="exact", resolution="feature")
    grad, = torch.autograd.grad(loss, z)
    return status("VmHWM") - before - grad.nbytes / 2**20

torch.set_num_threads(2)
extra(2048)
print(extra(8192), extra(16384))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_linear():
    """At 16,384 rows of 64 numbers at most the gradient and 16 MiB; a matrix of the pairs would be a GiB."""
    # glibc maps blocks of 64 KiB or more for themselves, so that what was freed does not hide what is taken
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "IN2NECT_BACKEND": "cpp"}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    half, whole = map(float, done.stdout.split())
    assert whole <= 16
    assert whole <= 2.2 * half


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_weight_in_the_loss_is_no_nan(dtype: torch.dtype, capability: str) -> None:
    """Raw rows, the running maximum: 2^(x - peak) of a row through which nothing flows may be infinite."""
    limit = {torch.float32: 128, torch.float64: 1024}[dtype]
    weights, upstream = torch.ones(4, dtype=dtype), torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=dtype)
    for exponent in torch.linspace(limit - 1, limit + 2, 13).tolist():  # of the first row with itself
        rows = torch.full((4, 3), 0.1, dtype=dtype)
        rows[0] = torch.tensor([math.sqrt(exponent * math.log(2)), 0.0, 0.0])
        rows[3, 1] = 40.0  # far enough from the others that the constant shift does not serve
        truth = log_d_and_gradients(rows.double(), None, weights.double(), 1.0, upstream.double(), oracle=True)
        for found, wanted in zip(log_d_and_gradients(rows, None, weights, 1.0, upstream), truth):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
