"""The oracle itself against values worked out by hand or in closed form, in loops that share nothing with it."""

import math

import pytest
import torch

from in2nect import functional, reference, simplex_etf
from tests.samples import clustered


def test_class_means_by_hand():
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0], [9.0, 9.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 2, 255])
    means, counts = reference.class_means(features, labels, 3)
    assert means.tolist() == [[2.0, 1.0], [0.0, 0.0], [5.0, 5.0]]
    assert counts.tolist() == [2, 0, 1]


def test_inter_class_loss_at_the_etf_and_at_zero():
    k = 7
    etf = simplex_etf(k, 64, dtype=torch.float64)
    counts = torch.ones(k, dtype=torch.int64)
    zero = torch.zeros_like(etf)
    # Eq. 5 as printed cannot tell a perfect ETF from all-zero features; Eq. 10 can
    printed = [reference.inter_class_loss(m, counts, etf, denominator="means") for m in (etf, zero)]
    assert [float(x) for x in printed] == pytest.approx([k * math.log(k)] * 2)
    perfect = reference.inter_class_loss(etf, counts, etf)
    assert float(perfect) == pytest.approx(k * (math.log(math.e + (k - 1) * math.exp(-1 / (k - 1))) - 1))
    assert float(reference.inter_class_loss(zero, counts, etf)) == pytest.approx(k * math.log(k))


def test_inter_class_gradient_is_equation_9_mended():
    features, labels = clustered(5, 6, absent=(3,))
    etf = simplex_etf(5, 6, dtype=torch.float64)
    features.requires_grad_()
    means, counts = reference.class_means(features, labels, 5)
    (grad,) = torch.autograd.grad(reference.inter_class_loss(means, counts, etf), features)
    p = torch.softmax(means.detach() @ etf.T, dim=1)
    expected = torch.zeros_like(features)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(4)).tolist():
        k = int(labels[b, i, j])
        if k < 5:
            expected[b, :, i, j] = (p[k] - torch.eye(5, dtype=p.dtype)[k]) @ etf / counts[k]
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_exact_intra_class_loss_is_equation_6(normalize, temperature):
    features, labels = clustered(4, 3, batch=1, singleton=3)
    z = features.permute(0, 2, 3, 1).reshape(-1, 3)
    y = labels.flatten().tolist()
    rows = [(z[i] / z[i].norm() if normalize else z[i], y[i]) for i in range(len(y)) if y[i] < 4]
    n = [sum(label == k for _, label in rows) for k in range(4)]
    s = [[float(a @ b) / temperature for b, _ in rows] for a, _ in rows]
    total = 0.0
    for i, (_, k) in enumerate(rows):
        if n[k] < 2:
            continue
        d = sum(math.exp(s[i][j]) / n[other] for j, (_, other) in enumerate(rows))
        for j, (_, other) in enumerate(rows):
            if other == k and j != i:
                total -= (s[i][j] - math.log(d)) / (n[k] * (n[k] - 1))
    loss = reference.intra_class_loss(
        features, labels, 4, estimator="exact", temperature=temperature, normalize=normalize
    )
    assert float(loss) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_floor_of_the_intra_class_loss(temperature):
    etf = simplex_etf(7, 12, dtype=torch.float64).repeat_interleave(5, dim=0)
    labels = torch.arange(7).repeat_interleave(5)
    loss = reference.intra_class_loss(3 * etf, labels, 7, estimator="exact", temperature=temperature)
    assert float(loss) == pytest.approx(functional.intra_class_floor(7, temperature), rel=1e-12)
    if temperature == 1.0:
        assert float(loss) == pytest.approx(7.38, abs=0.005)
        for covariance in ("pooled", "class"):  # collapsed classes have no covariance: the expansion is exact
            moments = reference.intra_class_loss(etf, labels, 7, covariance=covariance)
            assert float(moments) == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.parametrize(("covariance", "bound"), [("pooled", 0.0034), ("class", 0.0013)])
def test_moments_gradient_error(covariance, bound):
    """The table of docs/mathematics.md at tau = 1: relative error of the gradient."""
    features, labels = clustered(7, 64, batch=1, features=(75, 80), spread=1.0, ignored=0.0)
    gradients = []
    for module, estimator in ((functional, "exact"), (reference, "moments")):  # functional: the same pairs, less memory
        z = features.clone().requires_grad_()
        loss = module.intra_class_loss(z, labels, 7, estimator=estimator, covariance=covariance)
        gradients.append(torch.autograd.grad(loss, z)[0])
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0 < float(error) <= bound


def test_sampled_with_all_pixels_is_exact():
    features, labels = clustered(5, 6, singleton=4)
    exact = reference.intra_class_loss(features, labels, 5, estimator="exact")
    everything = reference.intra_class_loss(features, labels, 5, estimator="sampled", per_class=1000)
    torch.testing.assert_close(everything, exact)


def test_sampled_is_consistent():
    """More pixels a class, less error: the mean absolute error falls by well over 2 from m = 4 to m = 64."""
    features, labels = clustered(4, 8, batch=1, features=(24, 24), spread=2.0)
    exact = float(reference.intra_class_loss(features, labels, 4, estimator="exact"))
    generator = torch.Generator().manual_seed(0)

    def error(per_class):
        options = {"estimator": "sampled", "per_class": per_class, "generator": generator}
        draws = [float(reference.intra_class_loss(features, labels, 4, **options)) - exact for _ in range(20)]
        return sum(map(abs, draws)) / len(draws)

    assert error(64) < 0.4 * error(4)


def test_hash_is_splitmix64():
    """SplitMix64 seeded with s gives mix(s + g), mix(s + 2 g), ...: the published first outputs for seed 1234567."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert [mix((1234567 + golden * i) & mask) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]
    stream = mix((42 + golden * 8) & mask)
    expected = [mix((stream + golden * i) & mask) >> 1 for i in (1, 2, 3)]
    assert reference.hash_pixels(3, 42, 7).tolist() == expected


def test_collapse_degrees():
    etf = simplex_etf(6, 8, dtype=torch.float64)
    labels = torch.arange(6).repeat_interleave(4)
    inter, intra = reference.collapse_degrees(etf.repeat_interleave(4, 0) + 5.0, labels, 6)
    assert float(inter) == pytest.approx(0.0, abs=1e-12)  # whatever the offset: the global mean is taken off
    assert float(intra) == pytest.approx(0.0, abs=1e-12)
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    inter, intra = reference.collapse_degrees(square, torch.tensor([0, 1, 2, 3]), 4)
    assert float(inter) == pytest.approx((8 * (1 / 3) + 4 * (2 / 3)) / 12)
    pair = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)  # one class, unit rows at right angles
    assert float(reference.collapse_degrees(pair, torch.tensor([1, 1]), 2)[1]) == pytest.approx(0.5)
    uneven = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
    by_pixels = reference.collapse_degrees(uneven, torch.tensor([0, 0, 0, 1]), 2, global_mean="pixels")[0]
    assert float(by_pixels) == pytest.approx(0.0, abs=1e-12)  # two classes: opposite from any point between them


def test_unknown_settings_are_refused():
    features, labels = clustered(4, 3)
    with pytest.raises(ValueError, match="estimator is 'exakt'"):
        reference.intra_class_loss(features, labels, 4, estimator="exakt")
    with pytest.raises(ValueError, match="denominator is 'vertex'"):
        reference.inter_class_loss(torch.zeros(4, 3), torch.ones(4), simplex_etf(4, 3), denominator="vertex")


def test_zero_rows():
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    for estimator in ("exact", "moments"):
        loss = reference.intra_class_loss(features, labels, 2, estimator=estimator)
        (grad,) = torch.autograd.grad(loss, features)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()
        assert grad[0].tolist() == [0.0, 0.0]
        assert grad[1:].abs().sum() > 0
