"""bench/estimator_error.py at a size of nothing: what it compares, shows and keeps, and that its checks can fail."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from in2nect import functional

BENCH = Path(__file__).resolve().parents[2] / "bench"
MODULES = ("distributions", "estimators", "estimator_report", "trained_features", "estimator_error")
THEIRS = ("problems", "ceilings", "timing", "peers", "rows", "growth", "output", "exponentials")


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, whose plain names are gone again afterwards."""
    sys.path.insert(0, str(BENCH))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(BENCH))
        for name in (*MODULES, *THEIRS):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def rows(bench):
    """Every estimator on every synthetic feature set, at temperatures 1 and 0.3."""
    sets = bench.distributions.synthetic_sets(600, 64, 7, 0, torch.float64)
    compared = bench.estimators.estimators([8, 32])
    return [row for one in sets for tau in (1.0, 0.3) for row in bench.estimator_error.compare(one, tau, compared, 3)]


def test_from_the_command_line(bench, tmp_path, capsys) -> None:
    options = ["--no-trained", "--pixels", "400", "--per-class", "8,16"]
    options += ["--temperatures", "1,0.3", "--sweep", "4,8,32", "--draws", "2", "--seconds", "0", "--dtype", "fp64"]
    options += ["--json", str(tmp_path / "out.json"), "--picture", str(tmp_path / "out.png")]
    assert bench.estimator_error.main(options) == 0
    shown = capsys.readouterr().out
    assert "at the cost of moments pooled: sampled " in shown
    assert "2 modes a class, ReLU6: N = 400, K = 7" in shown and shown.count("pass  moments pooled") == 2
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out.json").read_text()
    document = json.loads(text)
    assert {"schema", "tool", "date", "machine", "versions", "arguments", "cost", "rows", "checks"} <= set(document)
    assert document["tool"] == "estimator_error" and document["training"] is None
    assert str(tmp_path) not in text and str(BENCH.parent) not in text
    assert {row["family"] for row in document["rows"]} == {"raw", "relu6", "multimodal", "low-dimensional"}
    exact = next(row for row in document["cost"] if row["estimator"] == "exact")
    assert exact["gradient_error"] == exact["class_gradient_error"] == 0 and exact["milliseconds"] > 0


def test_moments_are_closer_than_samples(rows) -> None:
    """Pooled moments beat `sampled` at every spread, and class beats pooled where classes are far from one point."""
    at_one = [row for row in rows if row["temperature"] == 1.0]
    for features in {row["features"] for row in at_one}:
        error = {row["estimator"]: row["gradient_error"] for row in at_one if row["features"] == features}
        assert 0 < error["moments pooled"] < 0.3 * error["sampled 32"] < error["sampled 8"], features
        assert error["sampled 8"] < 20 and error["everything sampled 8"] > 0.5, features
        if features.startswith("spread 0."):
            assert error["moments class"] < error["moments pooled"], features
    refused = {row["estimator"] for row in rows if row["refused"]}
    assert refused == {"moments pooled"}  # at 0.3, where `class` is allowed


def test_noise_averages_out_over_pixels_and_bias_does_not(rows) -> None:
    for row in rows:
        if row["estimator"].startswith("sampled") and row["family"] == "raw":
            assert row["class_gradient_error"] < 0.7 * row["gradient_error"], row


def test_sampled_has_several_draws_and_the_rest_one(rows) -> None:
    for row in rows:
        assert row["draws"] == (1 if row["estimator"].startswith("moments") else 3)
        assert (row["bias_error"] is None) == (row["draws"] == 1)


def test_checks_fail_on_a_bad_estimator(bench, rows) -> None:
    good = bench.estimator_report.checks(rows)
    assert len(good) == 2 and all(check["passed"] for check in good)
    bad = bench.estimator_report.checks(rows, "sampled 8")
    assert not any(check["passed"] for check in bad)
    assert bad[0]["worst"] == good[0]["beside"]["sampled 8"] > bench.estimator_report.GRADIENT_LIMIT


def test_checks_fail_on_a_number_that_is_none(bench, rows) -> None:
    broken = [dict(row, gradient_error=float("nan")) if row["features"] == "spread 1" else row for row in rows]
    assert [check["passed"] for check in bench.estimator_report.checks(broken)] == [False, True]


def test_checks_of_trained_features(bench, rows) -> None:
    limit = bench.estimator_report.TRAINED_LIMIT
    for error, passes in ((0.9 * limit, True), (1.1 * limit, False)):
        trained = [dict(row, family="trained", gradient_error=error) for row in rows if row["features"] == "spread 1"]
        assert [check["passed"] for check in bench.estimator_report.checks(rows + trained)] == [True, True, passes]


def test_main_fails_with_a_check(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench.estimator_report, "GRADIENT_LIMIT", 1e-9)
    options = ["--no-trained", "--pixels", "60", "--dim", "8", "--classes", "3", "--per-class", "4", "--sweep", "4"]
    options += ["--temperatures", "1", "--draws", "1", "--seconds", "0", "--no-picture"]
    assert bench.estimator_error.main(options) == 1
    assert "FAIL  moments pooled, gradient error" in capsys.readouterr().out


def test_what_is_refused_is_the_packages_expansion(bench) -> None:
    """Where the package does not refuse it, the script's own expansion is the package's estimator."""
    one = bench.distributions.synthetic_sets(200, 8, 4, 0, torch.float64)[6]
    for covariance in ("pooled", "class"):
        mine = bench.estimators.refused_moments(one.features, one.labels, 4, 0.5, covariance)
        theirs = functional.intra_class_loss(one.features, one.labels, 4, covariance=covariance, temperature=0.5)
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("form", ["every anchor", "drawn anchors", "plain"])
def test_a_remainder_over_all_keys_is_exact(bench, form) -> None:
    one = bench.distributions.synthetic_sets(200, 8, 4, 0, torch.float64)[8]
    generator = torch.Generator().manual_seed(0)
    z = one.features.clone().requires_grad_()
    found = bench.estimators.with_remainder(z, one.labels, 4, 0.5, 200, generator, form=form)
    wanted = bench.estimators.exact_loss(z, one.labels, 4, 0.5)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(wanted, z))


def test_sampled_by_hand_is_sampled(bench) -> None:
    one = bench.distributions.synthetic_sets(200, 8, 4, 0, torch.float64)[8]
    arguments = one.features, one.labels, 4, 0.5
    mine = bench.estimators.sampled_by_hand(*arguments, 8, torch.Generator().manual_seed(3), corrected=False)
    theirs = bench.estimators.sampled(8).loss(*arguments, torch.Generator().manual_seed(3))
    torch.testing.assert_close(mine, theirs)


def test_the_delta_method_takes_bias_off(bench) -> None:
    """16 modes in a class are badly seen by 4 keys: log D is too small on average, by less once corrected."""
    y = bench.distributions.long_tailed(400, 3, 0)
    u = torch.nn.functional.normalize(bench.distributions.multimodal(y, 3, 16, 16, 0), dim=1)
    counts, tau = torch.bincount(y), 0.3
    exact = bench.estimators.exact_log_d(u, y, 3, tau)
    bias = {}
    for corrected in (False, True):
        off = []
        for seed in range(60):
            _, keys = bench.estimators.draw(y, 3, 4, torch.Generator().manual_seed(seed))
            found = bench.estimators.sampled_log_d(u, u, keys, counts, tau, corrected=corrected)
            off.append(float((found - exact).mean()))
        bias[corrected] = sum(off) / len(off)
    assert bias[False] < -0.02 and abs(bias[True]) < 0.6 * abs(bias[False])


def test_equal_cost_names_the_nearest_sample(bench) -> None:
    cost = [{"estimator": "exact", "per_class": None, "milliseconds": 100.0}]
    cost += [{"estimator": "moments pooled", "per_class": None, "milliseconds": 5.0}]
    cost += [{"estimator": f"sampled {m}", "per_class": m, "milliseconds": m / 10} for m in (16, 64, 256, 1024)]
    assert bench.estimator_report.equal_per_class(cost, "moments pooled") == 64
    assert bench.estimator_report.equal_per_class(cost, "exact") == 1024
    assert [one.per_class for one in bench.estimator_error.equal_cost(cost, [64, 256])] == [1024]


def test_features_cache(bench, tmp_path) -> None:
    """What was trained is found again; a cache of another training is an error that names both."""
    module = bench.trained_features
    settings = module.TrainingSettings(images="fields", steps=4)
    snapshots = [module.Snapshot(step, torch.randn(6, 3), torch.arange(6) % 2) for step in (0, 4)]
    cache = tmp_path / "features.npz"
    module._write(cache, settings, module.TrainedFeatures(snapshots, {"classes": ["a", "b"]}, [{"draws": 2}]))
    arguments = {"folder": None, "classes": None, "scratch": tmp_path, "cache": cache}
    found = module.trained_features(settings, **arguments)
    assert found.about == {"classes": ["a", "b"]} and found.parameters == [{"draws": 2}]
    assert [one.step for one in found.snapshots] == [0, 4]
    assert torch.equal(found.snapshots[1].features, snapshots[1].features)
    assert torch.equal(found.snapshots[0].labels, snapshots[0].labels)
    with pytest.raises(ValueError, match=r"(?s)'steps': 4.*asked for are.*'steps': 8"):
        module.trained_features(module.TrainingSettings(images="fields", steps=8), **arguments)


@pytest.mark.filterwarnings("ignore:.*has no image in split 'val'")
def test_features_of_a_training(bench, tmp_path, monkeypatch) -> None:
    """Four steps on a small synthetic scene: rows at the feature grid, of the same labelled pixels each time."""
    pytest.importorskip("lightning")
    monkeypatch.setattr(bench.trained_features, "SCENES", {"train": 1, "val": 0, "test": 1, "size": 256})
    settings = bench.trained_features.TrainingSettings(images="synthetic", steps=4, batch_size=2, crop_size=128)
    found = bench.trained_features.trained_features(
        settings, folder=None, classes=None, scratch=tmp_path, cache=tmp_path / "features.npz"
    )
    assert [one.step for one in found.snapshots] == [0, 1, 4] and found.about["steps"] == 4
    assert 0 <= found.about["test_mean_iou"] <= 100
    for one in found.snapshots:
        assert one.features.shape[0] == len(one.labels) <= 2 * 32 * 32 and one.features.min() >= 0
        assert torch.equal(one.labels, found.snapshots[0].labels) and int(one.labels.max()) < 7
    assert not torch.equal(found.snapshots[0].features, found.snapshots[2].features)
    assert {row["estimator"] for row in found.parameters} >= {"moments pooled", "sampled 64", "everything sampled 64"}
    for row in found.parameters:
        assert 0 < row["parameter_error"] < 2 * row["gradient_error"]  # the network's map is no amplifier of errors
    assert "parameters" in bench.estimator_report.parameters_table(found.parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "1"], "need at least 2"),
        (["--pixels", "5"], "7 classes need 14"),
        (["--temperatures", "0.5"], "the checks are at 1"),
        (["--per-class", "0"], "positive numbers"),
        (["--images", "no/such/folder"], "no such folder"),
        (["--dim", "1"], "in one dimension"),
    ],
)
def test_refuses(bench, capsys, options, message) -> None:
    with pytest.raises(SystemExit):
        bench.estimator_error.main(options)
    assert message in capsys.readouterr().err
