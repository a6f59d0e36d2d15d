import pytest
import torch

from in2nect import EtfClassifier, reference, simplex_etf

SIMPLEX = simplex_etf(4, 6)


def gram(num_classes: int) -> torch.Tensor:
    """Eq. 2: K/(K-1) I - 1/(K-1) 11^T."""
    k = num_classes
    return k / (k - 1) * torch.eye(k, dtype=torch.float64) - torch.full((k, k), 1.0 / (k - 1), dtype=torch.float64)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (2, 3), (6, 5), (7, 6), (7, 64), (150, 149), (19, 300)])
def test_vertices_satisfy_equation_2(num_classes, dim):
    vertices = simplex_etf(num_classes, dim, dtype=torch.float64)
    assert vertices.shape == (num_classes, dim)
    torch.testing.assert_close(vertices @ vertices.T, gram(num_classes), rtol=0, atol=1e-12)


def test_paper_construction_satisfies_equation_2():
    vertices = reference.simplex_etf(7, 7, dtype=torch.float64, construction="paper")
    torch.testing.assert_close(vertices @ vertices.T, gram(7), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"7 classes in 6 dimensions.*dim >= 7"):
        reference.simplex_etf(7, 6, construction="paper")


def test_seed_decides():
    assert torch.equal(simplex_etf(5, 8, seed=3), simplex_etf(5, 8, seed=3))
    assert not torch.allclose(simplex_etf(5, 8, seed=3), simplex_etf(5, 8, seed=4), atol=0.1)
    state = torch.get_rng_state()
    simplex_etf(5, 8)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


def test_the_default_device_gets_it_but_does_not_draw_it():
    with torch.device("meta"):
        assert simplex_etf(4, 6).device.type == "meta"
        assert torch.equal(simplex_etf(4, 6, device="cpu"), SIMPLEX)


def test_impossible_sizes():
    with pytest.raises(ValueError, match=r"7 classes in 5 dimensions.*dim >= 6"):
        simplex_etf(7, 5)
    with pytest.raises(ValueError, match="at least 2"):
        simplex_etf(1, 5)


def test_classifier_is_fixed_and_saved():
    classifier = EtfClassifier(4, 6, seed=1)
    assert list(classifier.parameters()) == []
    rows = torch.randn(3, 2, 6)
    torch.testing.assert_close(classifier(rows), rows @ simplex_etf(4, 6, seed=1).T)
    assert classifier(rows.double()).dtype == torch.float64
    assert list(classifier.state_dict()) == ["weight"]
