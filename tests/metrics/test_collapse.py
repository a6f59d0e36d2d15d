import math

import pytest
import torch

from in2nect import reference, simplex_etf
from in2nect.metrics import CollapseMetrics
from tests.samples import clustered


def test_streaming_equals_the_reference_on_everything():
    features, labels = clustered(5, 6, batch=6, labels=(10, 8), absent=(3,), singleton=4)
    metrics = CollapseMetrics(5, 6)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metrics.update(features[part].float(), labels[part])
    measured = metrics.compute()
    inter, intra = reference.collapse_degrees(features.float().double(), labels, 5)
    assert measured["delta_inter"] == pytest.approx(float(inter), rel=1e-9)
    assert measured["delta_intra"] == pytest.approx(float(intra), rel=1e-9)
    inter, _ = reference.collapse_degrees(features.float().double(), labels, 5, global_mean="pixels")
    assert metrics.compute(global_mean="pixels")["delta_inter"] == pytest.approx(float(inter), rel=1e-9)


def test_neural_collapse_measures_by_definition():
    features, labels = clustered(4, 3, labels=None, ignored=0.0)
    z, y = reference.labelled_rows(features, labels, 4, ignore_index=255, resolution="feature")
    means = torch.stack([z[y == k].mean(0) for k in range(4)])
    centred = means - means.mean(0)
    within = sum(torch.outer(r - means[k], r - means[k]) for r, k in zip(z, y, strict=True)) / len(z)
    between = sum(torch.outer(m, m) for m in centred) / 4
    classifier = torch.randn(4, 3, 1, 1)
    metrics = CollapseMetrics(4, 3)
    metrics.update(features, labels)
    predictions = labels.clone()
    metrics.update_agreement(features, labels, predictions)
    measured = metrics.compute(classifier)
    assert measured["nc1"] == pytest.approx(float(torch.trace(within @ torch.linalg.pinv(between)) / 4), rel=1e-9)
    norms = centred.norm(dim=1)
    assert measured["nc2_equinorm"] == pytest.approx(float(norms.std(correction=0) / norms.mean()))
    w = classifier.flatten(1).double()
    assert measured["nc3"] == pytest.approx(float((w / w.norm() - centred / centred.norm()).norm()))
    nearest = torch.stack([(z - m).norm(dim=1) for m in means]).argmin(0)
    assert measured["nc4"] == pytest.approx(float((nearest != y).double().mean()))


def test_perfect_collapse_is_zero():
    etf = simplex_etf(5, 8, dtype=torch.float64)
    metrics = CollapseMetrics(5, 8)
    labels = torch.arange(5).repeat(6)
    metrics.update(etf.repeat(6, 1), labels)
    metrics.update_agreement(etf.repeat(6, 1), labels, labels)
    assert all(abs(v) < 1e-6 for v in metrics.compute(etf).values()), metrics.compute(etf)


def test_nothing_to_measure_is_nan():
    metrics = CollapseMetrics(3, 4)
    with pytest.raises(RuntimeError, match="call update"):
        metrics.update_agreement(torch.randn(5, 4), torch.zeros(5).long(), torch.zeros(5).long())
    assert all(math.isnan(v) for v in metrics.compute().values())
    metrics.update(torch.randn(5, 4), torch.full((5,), 1))
    with_one_class = metrics.compute()
    assert math.isnan(with_one_class.pop("delta_inter"))
    assert with_one_class.pop("delta_intra") > 0
    assert all(math.isnan(v) for v in with_one_class.values())
    metrics.update(torch.randn(5, 4), torch.full((5,), 2))
    assert metrics.compute()["delta_inter"] >= 0
    metrics.reset()
    assert math.isnan(metrics.compute()["delta_inter"])
