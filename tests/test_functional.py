"""The differentiable functions against the float64 reference: values, gradients, gradcheck, errors; on every CPU
backend."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from in2nect import functional, reference, simplex_etf
from tests.samples import clustered

GRIDS = {  # features, labels
    "feature": ((5, 4), (20, 16), "feature"),
    "feature-uneven": ((5, 4), (13, 9), "feature"),
    "label-same": ((5, 4), (5, 4), "label"),
    "label-x2": ((4, 3), (8, 6), "label"),
    "label-x4": ((3, 4), (12, 16), "label"),
    "label-uneven": ((4, 5), (7, 11), "label"),
}
CASES = {
    "long-tailed": {},
    "absent-and-singleton": {"absent": (1,), "singleton": 3},
    "all-ignored": {"ignored": 1.1},
    "narrow": {"num_classes": 3, "dim": 2},
    "channels-last": {"layout": "channels_last"},
    "strided": {"layout": "strided"},
}
# Every case on one grid and every grid with one case: the product would say no more and take minutes.
PLACES = [(case, "label-uneven") for case in CASES] + [("absent-and-singleton", grid) for grid in GRIDS]
INTRA = {
    "exact": {"estimator": "exact"},
    "exact-raw": {"estimator": "exact", "normalize": False, "temperature": 2.0},
    "moments-pooled": {"estimator": "moments", "temperature": 0.7},
    "moments-class": {"estimator": "moments", "covariance": "class", "temperature": 0.4},
    "sampled": {"estimator": "sampled", "per_class": 3},
    "sampled-many": {"estimator": "sampled", "per_class": 50},
    "sampled-raw": {"estimator": "sampled", "per_class": 50, "normalize": False},
}


def sample(case, grid):
    options = {"num_classes": 5, "dim": 6, **CASES[case]}
    features, labels, resolution = GRIDS[grid]
    z, y = clustered(**options, features=features, labels=labels)
    return z.requires_grad_(), y, options["num_classes"], resolution


def intra(module, z, y, k, **options):
    return module.intra_class_loss(z, y, k, generator=torch.Generator().manual_seed(7), **options)


@pytest.mark.parametrize(("case", "grid"), PLACES)
def test_class_means(cpu_backend, case, grid):
    z, y, k, resolution = sample(case, grid)
    means, counts = functional.class_means(z, y, k, resolution=resolution)
    expected, expected_counts = reference.class_means(z, y, k, resolution=resolution)
    torch.testing.assert_close(means, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(counts, expected_counts)
    upstream = torch.randn_like(means)
    ours, theirs = (torch.autograd.grad(m, z, upstream)[0] for m in (means, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert ours.stride() == torch.empty_like(z).stride()  # the gradient comes in the features' layout


@pytest.mark.parametrize(("case", "grid"), PLACES)
@pytest.mark.parametrize("settings", INTRA)
def test_intra_class_loss(cpu_backend, settings, case, grid):
    z, y, k, resolution = sample(case, grid)
    losses = [intra(m, z, y, k, resolution=resolution, **INTRA[settings]) for m in (functional, reference)]
    torch.testing.assert_close(*losses, rtol=1e-11, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, z)[0] for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    if case == "all-ignored":
        assert float(losses[0].detach()) == 0.0
        assert not ours.any()


@pytest.mark.parametrize("denominator", ["vertices", "means"])
@pytest.mark.parametrize("counts", [[3, 1, 2, 9], [3, 0, 2, 0], [0, 0, 0, 0]])
def test_inter_class_loss(denominator, counts):
    etf = simplex_etf(4, 6, dtype=torch.float64)
    counts = torch.tensor(counts)
    means = (2 * torch.randn(4, 6, dtype=torch.float64) * (counts > 0)[:, None]).requires_grad_()
    losses = [m.inter_class_loss(means, counts, etf, denominator=denominator) for m in (functional, reference)]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    ours, theirs = (torch.autograd.grad(loss, means)[0] for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert not ours[counts == 0].any()


@pytest.mark.parametrize(
    ("case", "grid"),
    [
        ("absent-and-singleton", "feature"),
        ("absent-and-singleton", "label-uneven"),
        ("channels-last", "label-x2"),
        ("strided", "label-uneven"),
        ("narrow", "feature-uneven"),
    ],
)
def test_gradcheck_means_and_inter(cpu_backend, case, grid):
    z, y, k, resolution = sample(case, grid)
    etf = simplex_etf(k, z.shape[1], dtype=torch.float64)

    def loss(z):
        means, counts = functional.class_means(z, y, k, resolution=resolution)
        return means, functional.inter_class_loss(means, counts, etf)

    assert gradcheck(loss, z)
    assert gradgradcheck(loss, z)


@pytest.mark.parametrize(
    ("case", "grid"),
    [
        ("absent-and-singleton", "feature"),
        ("absent-and-singleton", "label-uneven"),
        ("channels-last", "label-x2"),
        ("strided", "label-uneven"),
        ("narrow", "feature-uneven"),
    ],
)
@pytest.mark.parametrize("settings", INTRA)
def test_gradcheck_intra(cpu_backend, settings, case, grid):
    z, y, k, resolution = sample(case, grid)
    assert gradcheck(lambda z: intra(functional, z, y, k, resolution=resolution, **INTRA[settings]), z)


@pytest.mark.parametrize("settings", INTRA)
def test_second_derivative_of_intra_is_refused_in_words(cpu_backend, settings):
    z, y, k, resolution = sample("long-tailed", "label-x2")
    (grad,) = torch.autograd.grad(
        intra(functional, z, y, k, resolution=resolution, **INTRA[settings]), z, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"once differentiable.*in2nect.reference"):
        grad.sum().backward()


@pytest.mark.parametrize("settings", INTRA)
def test_reference_gradgradcheck(settings):
    z, y = clustered(3, 3, batch=1, features=(3, 3))
    assert gradgradcheck(lambda z: intra(reference, z, y, 3, **INTRA[settings]), z.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("resolution", ["feature", "label"])
@pytest.mark.parametrize("settings", INTRA)
def test_error_in_low_precision(cpu_backend, settings, resolution, dtype):
    """At most 2x the error of the equations in the same dtype's autograd, 3x for gradients, against float64 on the same
    (rounded) features."""
    z, y = clustered(6, 24, features=(23, 17), labels=(46, 34), dtype=dtype)
    z.requires_grad_()
    exact = z.detach().double().requires_grad_()
    options = {"resolution": resolution, **INTRA[settings]}
    results = []
    for module, features in ((functional, z), (reference, z), (reference, exact)):
        loss = intra(module, features, y, 6, **options)
        results.append((loss.double(), torch.autograd.grad(loss, features)[0].double()))
    (ours, our_grad), (plain, plain_grad), (truth, true_grad) = results
    epsilon = torch.finfo(torch.float32).eps  # both accumulate in float32, so errors are of its size
    largest = 1.0 if options.get("normalize", True) else float(exact.detach().square().sum(1).max())
    similarity = 6 * largest / options.get("temperature", 1.0)  # the loss is a difference of sums over 6 classes
    assert abs(ours - truth).detach() <= 2 * abs(plain - truth).detach() + 4 * epsilon * similarity
    assert (our_grad - true_grad).norm() <= 3 * (plain_grad - true_grad).norm() + 8 * epsilon * true_grad.norm()


def test_rows_and_grid_agree(cpu_backend):
    z, y = clustered(5, 6)
    rows, flat = z.permute(0, 2, 3, 1).flatten(0, 2), y.flatten()
    for estimator in ("exact", "moments"):
        options = {"estimator": estimator}
        torch.testing.assert_close(
            functional.intra_class_loss(rows, flat, 5, **options), functional.intra_class_loss(z, y, 5, **options)
        )
    torch.testing.assert_close(functional.class_means(rows, flat, 5), functional.class_means(z, y, 5))


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes(cpu_backend, label_dtype):
    z, y = clustered(5, 6, labels=(10, 8))
    expected = functional.class_means(z, y, 5)
    torch.testing.assert_close(functional.class_means(z, y.to(label_dtype), 5), expected)


@pytest.mark.parametrize("ignore_index", [-1, -100, 2, 255])
def test_ignore_index_anywhere(cpu_backend, ignore_index):
    z, y = clustered(5, 6)
    expected = reference.class_means(z, torch.where(y == 2, 255, y) if ignore_index == 2 else y, 5)
    if ignore_index != 2:
        y = torch.where(y == 255, ignore_index, y)
        means = functional.class_means(z, y, 5, ignore_index=ignore_index)
    else:
        means = functional.class_means(z, torch.where(y == 255, 2, y), 5, ignore_index=2)
    torch.testing.assert_close(means, expected)


def test_no_pixels(cpu_backend):
    z = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(0, dtype=torch.int64)
    for settings in INTRA.values():
        loss = functional.intra_class_loss(z, y, 3, **settings)
        assert float(loss.detach()) == 0.0
        assert torch.autograd.grad(loss, z)[0].shape == (0, 4)


def test_one_pixel(cpu_backend):
    z, y = torch.randn(1, 4, dtype=torch.float64, requires_grad=True), torch.tensor([2])
    for settings in INTRA.values():
        loss = functional.intra_class_loss(z, y, 3, **settings)
        assert float(loss.detach()) == 0.0
        assert not torch.autograd.grad(loss, z)[0].any()
    assert functional.class_means(z, y, 3)[1].tolist() == [0, 0, 1]


def test_zero_rows(cpu_backend):
    z, y = clustered(3, 4, features=(6, 6))
    z[0, :, :2] = 0.0
    z.requires_grad_()
    for settings in ("exact", "moments-pooled", "moments-class", "sampled"):
        losses = [intra(m, z, y, 3, **INTRA[settings]) for m in (functional, reference)]
        torch.testing.assert_close(*losses)
        ours, theirs = (torch.autograd.grad(loss, z)[0] for loss in losses)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert not ours[0, :, :2].any()
        assert ours[0, :, 2:].any()


def test_autocast_does_not_lower_the_precision(cpu_backend):
    z, y = clustered(5, 6, dtype=torch.float32)
    expected = functional.intra_class_loss(z, y, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(functional.intra_class_loss(z, y, 5), expected, rtol=0, atol=0)
        means, counts = functional.class_means(z, y, 5)
        loss = functional.inter_class_loss(means, counts, simplex_etf(5, 6))
    assert loss.dtype == torch.float32


def test_sampled_is_a_function_of_the_generator():
    z, y = clustered(4, 6, features=(20, 20))
    draws = [
        functional.intra_class_loss(
            z, y, 4, estimator="sampled", per_class=5, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("resolution", ["feature", "label"])
@pytest.mark.parametrize("settings", INTRA)
def test_ignored_pixels_may_hold_anything(cpu_backend, settings, resolution):
    z, y = clustered(4, 6, singleton=3)
    expected = z.clone().requires_grad_()
    bad = z.clone()
    bad[0, :, 1, 1], bad[1, 2, 3, 3] = float("nan"), float("inf")
    y[0, 1, 1] = y[1, 3, 3] = 255
    bad.requires_grad_()
    options = {"resolution": resolution, **INTRA[settings]}
    losses = [intra(functional, features, y, 4, **options) for features in (expected, bad)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, z)[0] for loss, z in zip(losses, (expected, bad), strict=True))
    )
    torch.testing.assert_close(functional.class_means(bad, y, 4), functional.class_means(expected, y, 4))


def test_nan_features_show(cpu_backend):
    z, y = clustered(3, 4)
    z[0, 0, 0, 0] = float("nan")
    y[0, 0, 0] = 0
    for settings in ("exact", "moments-pooled"):
        assert torch.isnan(intra(functional, z, y, 3, **INTRA[settings]))


Z, Y = torch.zeros(2, 4, 3, 3), torch.zeros(2, 6, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("features", "labels", "num_classes", "options", "error", "message"),
    [
        (Z, Y[:, None], 3, {}, ValueError, r"\(2, 1, 6, 6\).*squeeze\(1\)"),
        (Z, Y[:1], 3, {}, ValueError, r"features.*\(2, 4, 3, 3\) and labels \(1, 6, 6\)"),
        (Z[0], Y, 3, {}, ValueError, r"\(4, 3, 3\); expected \(B, d, h, w\) or \(N, d\)"),
        (Z, Y.float(), 3, {}, TypeError, r"labels are torch.float32.*labels.long"),
        (Z.long(), Y, 3, {}, TypeError, "features are torch.int64"),
        (Z, Y, 1, {}, ValueError, "num_classes is 1"),
        (Z, Y, 3, {"resolution": "image"}, ValueError, "resolution is 'image'"),
        (Z, Y + 9, 3, {}, ValueError, r"labels hold 9 \(72 pixels\); expected 0..2 or ignore_index=255"),
        (Z, Y - 1, 3, {"resolution": "feature"}, ValueError, r"-1 \(72 pixels\)"),
        (Z[:, :, :0], Y, 3, {}, ValueError, "empty grid"),
    ],
)
def test_errors(cpu_backend, features, labels, num_classes, options, error, message):
    with pytest.raises(error, match=message):
        functional.class_means(features, labels, num_classes, **options)
    with pytest.raises(error, match=message):
        functional.intra_class_loss(features, labels, num_classes, **options)
    with pytest.raises(error, match=message):
        reference.intra_class_loss(features, labels, num_classes, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": 0.4}, r'temperature >= 0.5.*"exact" or "sampled"'),
        ({"temperature": 0.1, "covariance": "class"}, r"temperature is 0.1"),
        ({"normalize": False}, "normalize=False.*unbounded"),
        ({"estimator": "all"}, "estimator is 'all'"),
        ({"covariance": "full"}, "covariance is 'full'"),
    ],
)
def test_setting_errors(options, message):
    with pytest.raises(ValueError, match=message):
        functional.intra_class_loss(Z, Y, 3, **options)


def test_uint8_labels_never_wrap():
    with pytest.raises(ValueError, match=r"labels hold 255 \(72 pixels\)"):
        functional.class_means(Z, torch.full_like(Y, 255).to(torch.uint8), 3, ignore_index=-1)
