import copy

import pytest
import torch

from in2nect import In2NeCTLoss, InterClassLoss, IntraClassLoss, functional, simplex_etf
from tests.samples import clustered


def test_total_is_equation_7():
    features, labels = clustered(5, 8, labels=(10, 8), dtype=torch.float32)
    criterion = In2NeCTLoss(5, 8, weight=0.3, seed=4)
    total, inter, intra = criterion(features, labels)
    means, counts = functional.class_means(features, labels, 5)
    expected_inter = functional.inter_class_loss(means, counts, simplex_etf(5, 8, seed=4))
    expected_intra = functional.intra_class_loss(features, labels, 5)
    torch.testing.assert_close(inter, expected_inter)
    torch.testing.assert_close(intra, expected_intra)
    torch.testing.assert_close(total, 0.3 * (expected_inter + expected_intra))


def test_every_setting_arrives():
    settings = {
        "estimator": "sampled",
        "covariance": "class",
        "per_class": 3,
        "temperature": 0.4,
        "normalize": False,
        "resolution": "feature",
        "ignore_index": 0,
    }
    intra = IntraClassLoss(5, **settings)
    features, labels = clustered(5, 8, labels=(10, 8))
    labels[labels == 255] = 0
    ours = intra(features, labels, generator=torch.Generator().manual_seed(1))
    expected = functional.intra_class_loss(features, labels, 5, **settings, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    inter = InterClassLoss(5, 8, denominator="means", resolution="feature", ignore_index=0, seed=2)
    means, counts = functional.class_means(features, labels, 5, resolution="feature", ignore_index=0)
    etf = simplex_etf(5, 8, seed=2)
    torch.testing.assert_close(
        inter(features, labels), functional.inter_class_loss(means, counts, etf, denominator="means")
    )


def test_descent_collapses_the_classes():
    """Gradient descent on free features must reach the floor of both losses: collapsed onto the ETF."""
    features, _ = clustered(4, 6, dtype=torch.float32)
    features.requires_grad_()
    labels = (
        torch.arange(2 * 5 * 4).remainder(4).view(2, 5, 4)
    )  # every class is there: the floor is that of all classes
    criterion = In2NeCTLoss(4, 6, weight=1.0)
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        criterion(features, labels).total.backward()
        optimizer.step()
    terms = criterion(features, labels)
    assert float(terms.intra.detach()) == pytest.approx(criterion.intra_floor, rel=2e-3)
    assert float(terms.inter.detach()) < 0.05  # raw means grow along their vertices


def test_projection_is_trained_and_used():
    features, labels = clustered(5, 8, dtype=torch.float32)
    criterion = In2NeCTLoss(5, 8, projection=16)
    assert criterion.inter.classifier.weight.shape == (5, 16)
    criterion(features.requires_grad_(), labels).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in criterion.projection.parameters())
    rows = features.detach().permute(0, 2, 3, 1).flatten(0, 2)
    criterion.eval()
    torch.testing.assert_close(criterion(rows, labels.flatten()), criterion(features.detach(), labels))
    assert list(In2NeCTLoss(5, 8).parameters()) == []


def test_projection_takes_low_precision_and_names_a_wrong_width():
    features, labels = clustered(5, 8, dtype=torch.bfloat16)
    criterion = In2NeCTLoss(5, 8, projection=16)
    assert criterion(features, labels).total.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert criterion(features, labels).total.isfinite()
    with pytest.raises(ValueError, match=r"features have 6 channels.*dim=8"):
        criterion(features[:, :6], labels)


def test_state_dict_and_copies():
    criterion = In2NeCTLoss(5, 8, seed=3)
    other = In2NeCTLoss(5, 8, seed=9)
    other.load_state_dict(criterion.state_dict())
    features, labels = clustered(5, 8, dtype=torch.float32)
    torch.testing.assert_close(other(features, labels), criterion(features, labels), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(criterion)(features, labels), criterion(features, labels), rtol=0, atol=0)


def test_errors():
    with pytest.raises(ValueError, match=r"7 classes in 4 dimensions.*projection=6"):
        In2NeCTLoss(7, 4)
    with pytest.raises(ValueError, match=r"temperature >= 0.5"):
        In2NeCTLoss(4, 8, temperature=0.1)
    features, labels = clustered(4, 6)
    with pytest.raises(ValueError, match=r"features have 6 channels.*dim=8"):
        In2NeCTLoss(4, 8)(features, labels)


def test_compiles_into_one_graph():
    features, labels = clustered(5, 8, labels=(10, 8), dtype=torch.float32)
    for estimator in ("moments", "exact"):
        criterion = In2NeCTLoss(5, 8, estimator=estimator)
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        results = []
        for function in (criterion, compiled):
            z = features.clone().requires_grad_()
            total = function(z, labels).total
            results.append((total.detach(), torch.autograd.grad(total, z)[0]))
        torch.testing.assert_close(results[1], results[0])
