import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from in2nect import ops, reference
from in2nect.ops import backend
from tests.samples import clustered

SIZES = {  # cells and pixels: ratios 1, 2, 4, 8, of no whole number, below 1, and single cells
    "same": ((5, 4), (5, 4)),
    "2": ((5, 4), (10, 8)),
    "4": ((3, 5), (12, 20)),
    "8": ((3, 2), (24, 16)),
    "uneven": ((5, 4), (12, 7)),
    "down": ((9, 8), (4, 5)),
    "column": ((6, 1), (13, 3)),
    "cell": ((1, 1), (4, 6)),
}


def losses(features, labels, num_classes, **options):
    """The loss and the raw sums' own scalar, by the operator, and both by the reference with their gradient."""
    upstream = torch.randn(num_classes, features.shape[1], dtype=features.dtype, generator=torch.manual_seed(3))
    both = []
    for of in (ops.class_moments, reference_terms):
        z = features.detach().clone().requires_grad_()
        loss, sums, counts = of(z, labels, num_classes, **options)
        (grad,) = torch.autograd.grad(1.7 * loss + (upstream * sums).sum(), z)
        both.append((loss.detach(), sums.detach(), counts, grad))
    return both


def reference_terms(features, labels, num_classes, *, sums=True, resolution="label", ignore_index=255, **options):
    means, counts = reference.class_means(
        features, labels, num_classes, resolution=resolution, ignore_index=ignore_index
    )
    loss = reference.intra_class_loss(
        features, labels, num_classes, resolution=resolution, ignore_index=ignore_index, **options
    )
    return loss, means * counts[:, None], counts


def check(features, labels, num_classes, tolerance=1e-10, **options):
    found, expected = losses(features, labels, num_classes, sums=True, **options)
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(scale, 1e-3))


@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("resolution", ["label", "feature"])
@pytest.mark.parametrize("size", SIZES)
def test_losses_and_gradient(cpu_backend, size, resolution, covariance):
    cells, pixels = SIZES[size]
    features, labels = clustered(5, 6, features=cells, labels=pixels, absent=(1,), singleton=4)
    check(features, labels, 5, resolution=resolution, covariance=covariance, temperature=0.6)


@pytest.mark.parametrize("dim", [1, 2, 3, 19, 40])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("pixels", [(7, 21), (14, 42)])
def test_widths_and_layouts(cpu_backend, pixels, layout, dim):
    features, labels = clustered(6, dim, features=(7, 21), labels=pixels, layout=layout, absent=(2,))
    check(features, labels, 6)


def test_many_classes(cpu_backend):
    features, labels = torch.randn(2, 7, 12, 9, dtype=torch.float64), torch.randint(0, 40, (2, 24, 18))
    check(features, labels.to(torch.uint8), 50)


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("pixels", [(5, 4), (10, 8)])
def test_given_weights(cpu_backend, pixels, by_class):
    """With process groups the second moments are weighted by the classes of all ranks, some of which are not here."""
    features, labels = clustered(5, 6, labels=pixels, absent=(1,))
    weights = torch.rand(5, dtype=features.dtype)
    run = backend.select("class_moments", features.device)
    counts, *_, given = run(features, labels, 5, 255, False, by_class, weights)
    *_, by_counts = run(features, labels, 5, 255, False, True)
    expected = by_counts * (counts * weights)[:, None, None]
    torch.testing.assert_close(given, expected if by_class else expected.sum(0))


@pytest.mark.parametrize("covariance", ["pooled", "class"])
def test_long_strips(cpu_backend, covariance):
    """More cell rows than a strip of them holds, and more pixels than a slab."""
    features, labels = clustered(4, 9, batch=1, features=(45, 70), labels=(90, 140))
    check(features, labels, 4, covariance=covariance)
    check(features, labels, 4, covariance=covariance, resolution="feature")


@pytest.mark.parametrize("covariance", ["pooled", "class"])
def test_zero_rows(cpu_backend, covariance):
    features, labels = clustered(3, 5, features=(6, 6), labels=(12, 12))
    features[0, :, 1:5, 1:5] = 0.0  # pixels between zero cells are zero rows
    check(features, labels, 3, covariance=covariance)
    check(features, labels, 3, covariance=covariance, resolution="feature")


@pytest.mark.parametrize("pixels", [(6, 6), (12, 12)])
def test_ignored_pixels_may_hold_nan(cpu_backend, pixels):
    features, labels = clustered(3, 5, features=(6, 6), labels=pixels)
    ratio = pixels[0] // 6
    labels[0, : 4 * ratio, : 4 * ratio] = 255
    clean = features.clone()
    clean[0, :, 1:3, 1:3] = 0.5
    features[0, :, 1:3, 1:3] = float("nan")  # whose neighbours are ignored too
    grads = []
    for z in (features, clean):
        z = z.requires_grad_()
        loss, sums, _ = ops.class_moments(z, labels, 3, sums=True)
        grads.append(torch.autograd.grad(loss + sums.sum(), z)[0])
        assert torch.isfinite(loss)
    torch.testing.assert_close(*grads)
    assert not grads[0][0, :, 1:3, 1:3].any()


def test_nan_of_a_labelled_pixel_shows(cpu_backend):
    features, labels = clustered(3, 5, labels=(10, 8), ignored=0.0)
    features[0, 0, 2, 2] = float("nan")
    assert ops.class_moments(features, labels, 3).loss.isnan()
    assert ops.class_moments(features, labels, 3, resolution="feature").loss.isnan()


@pytest.mark.parametrize("pixels", [(5, 4), (10, 8)])
def test_nothing_labelled(cpu_backend, pixels):
    features, labels = clustered(3, 4, labels=pixels)
    z = features.requires_grad_()
    loss, sums, counts = ops.class_moments(z, torch.full_like(labels, 255), 3, sums=True)
    (grad,) = torch.autograd.grad(loss + sums.sum(), z)
    assert loss == 0 and not sums.any() and not counts.any() and not grad.any()


def test_no_pixels(cpu_backend):
    z = torch.zeros(0, 4, requires_grad=True)
    loss, _, counts = ops.class_moments(z, torch.zeros(0, dtype=torch.int64), 3)
    loss.backward()
    assert loss == 0 and counts.tolist() == [0, 0, 0] and z.grad.shape == (0, 4)


def test_singletons_alone(cpu_backend):
    """No class has a pair: a zero that is connected to the graph, with a zero gradient."""
    z = torch.randn(3, 4, requires_grad=True)
    loss = ops.class_moments(z, torch.arange(3), 3).loss
    loss.backward()
    assert loss.abs() < 1e-6 and not z.grad.any()


def test_one_of_the_two_gradients(cpu_backend):
    features, labels = clustered(3, 5, labels=(10, 8))
    z = features.requires_grad_()
    loss, sums, _ = ops.class_moments(z, labels, 3, sums=True)
    weights = torch.randn_like(sums)
    of_loss = torch.autograd.grad(loss, z, retain_graph=True)[0]
    of_sums = torch.autograd.grad((sums * weights).sum(), z, retain_graph=True)[0]
    both = torch.autograd.grad(loss + (sums * weights).sum(), z)[0]
    torch.testing.assert_close(of_loss + of_sums, both)
    torch.testing.assert_close(of_loss, torch.autograd.grad(ops.class_moments(z, labels, 3).loss, z)[0])
    assert ops.class_moments(z, labels, 3).sums.shape == (0, 5)


@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("pixels", [(3, 3), (6, 6), (5, 7)])
def test_gradcheck(cpu_backend, pixels, covariance):
    features, labels = clustered(3, 4, features=(3, 3), labels=pixels, singleton=2)

    def outputs(z):
        loss, sums, _ = ops.class_moments(z, labels, 3, covariance=covariance, sums=True, temperature=0.7)
        return loss, sums

    assert gradcheck(outputs, features.requires_grad_())


@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_opcheck(cpu_backend, resolution, covariance):
    features, labels = clustered(4, 6, labels=(10, 8))
    settings = (4, 255, resolution, 0.7, covariance, True)
    opcheck(torch.ops.in2nect.class_moments, (features.requires_grad_(), labels, *settings))
    outputs = [t.detach() for t in torch.ops.in2nect.class_moments(features, labels, *settings)]
    for grad_sums in (None, torch.ones_like(outputs[1])):
        arguments = (outputs[0], grad_sums, features.detach(), labels, *outputs[2:], 255, resolution, 0.7, covariance)
        opcheck(torch.ops.in2nect.class_moments_backward, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("covariance", ["pooled", "class"])
@pytest.mark.parametrize("pixels", [(24, 24), (48, 48)])
def test_error_against_torch(cpu_backend, pixels, covariance, dtype):
    """At most twice the error, of gradients three times, that the reference has in the same dtype."""
    features, labels = clustered(5, 16, features=(24, 24), labels=pixels, dtype=dtype, singleton=4)
    options = {"covariance": covariance, "temperature": 0.6}

    def run(of, z):
        z = z.detach().clone().requires_grad_()
        value = of(z)
        return value.detach().double(), torch.autograd.grad(value, z)[0].double()

    def plain(z):
        return reference.intra_class_loss(z, labels, 5, **options)

    exact = run(plain, features.double())
    ours, theirs = run(lambda z: ops.class_moments(z, labels, 5, **options).loss, features), run(plain, features)
    unit = torch.finfo(torch.float32).eps  # a value that torch has right by luck
    assert (ours[0] - exact[0]).abs() <= 2 * (theirs[0] - exact[0]).abs() + 4 * unit * exact[0].abs()
    assert (ours[1] - exact[1]).norm() <= 3 * (theirs[1] - exact[1]).norm()
    assert ours[1].isfinite().all()


def test_opposite_neighbours_in_float32(cpu_backend):
    """Rows between cells that nearly cancel, down to a tenth of the cells' length."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 8, 6, 6, generator=generator)
    z[:, :, :, 1::2] = -z[:, :, :, ::2] * (1 + 0.2 * torch.rand(1, 1, 6, 3, generator=generator))
    labels = torch.randint(0, 3, (1, 12, 12), generator=generator)
    check(z, labels, 3, tolerance=1e-4)


def test_second_derivative_is_refused(cpu_backend):
    features, labels = clustered(3, 4)
    loss = ops.class_moments(features.requires_grad_(), labels, 3).loss
    (grad,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"in2nect\.reference"):
        grad.sum().backward()


def test_errors(cpu_backend):
    features, labels = clustered(3, 4, labels=(10, 8))
    with pytest.raises(ValueError, match=r"labels hold 7 \(160 pixels\)"):
        ops.class_moments(features, torch.full_like(labels, 7), 3)
    with pytest.raises(ValueError, match=r"temperature is 0\.3"):
        ops.class_moments(features, labels, 3, temperature=0.3)
    with pytest.raises(ValueError, match="covariance is 'full'"):
        ops.class_moments(features, labels, 3, covariance="full")
