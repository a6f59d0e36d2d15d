"""bench/train_step.py at a size of nothing: its table and JSON, that its step is the trainer's, which arguments it
refuses, and what it says of a network that fails."""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
TINY = ["--size", "64", "--batch", "1", "--encoder", "test_efficientnet", "--device", "cpu"]
QUICK = ["--seconds", "0", "--rounds", "3"]


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, whose plain names are gone again afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("train_step", "timing", "output")})
    finally:
        sys.path.remove(str(BENCH))
        for name in {path.stem for path in BENCH.glob("*.py")} - before:
            sys.modules.pop(name, None)


@pytest.fixture
def quick(bench, monkeypatch):
    """Without what takes a second a row: collecting garbage, and a step for its memory alone."""
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(bench.train_step.Host, "memory", lambda self, criterion: (2**20, "not measured"))
    return bench


def case(bench, **changes):
    settings = {
        "network": "unetformer",
        "encoder": "test_efficientnet",
        "size": 64,
        "batch": 2,
        "layout": "channels_last",
    }
    settings |= {"device": torch.device("cpu"), "dtype": torch.float32, "compiled": False, "optimizer": "adamw"}
    return bench.train_step.Case(**{**settings, "classes": 5, "seed": 0, **changes})


def test_rows_and_what_is_kept(quick, tmp_path, capsys) -> None:
    estimators = ["moments_class", "exact"]
    options = [
        *TINY,
        "--seconds",
        "0",
        "--rounds",
        "1",
        "--batch",
        "1",
        "2",
        "--estimator",
        *estimators,
        "--exact-pixels",
        "600",
    ]
    assert quick.train_step.main([*options, "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in shown) <= 120
    assert sum(line.startswith("unetformer, test_efficientnet: ") for line in shown) == 2
    assert sum(line.startswith("inference, tapped ") for line in shown) == 2

    document = json.loads((tmp_path / "out.json").read_text())
    assert set(document) == {"schema", "tool", "date", "machine", "versions", "arguments", "seconds", "rows"}
    assert document["schema"] == 1 and document["tool"] == "train_step"
    assert document["versions"]["timm"] and document["versions"]["torch"] == torch.__version__
    assert document["arguments"]["batch"] == [1, 2] and "json" not in document["arguments"]
    assert str(BENCH.parent) not in (tmp_path / "out.json").read_text()
    steps = {(row["batch"], row["estimator"], row["resolution"]): row for row in document["rows"] if row["estimator"]}
    assert set(steps) == {(b, e, r) for b in (1, 2) for e in estimators for r in ("feature", "label")}
    assert len(document["rows"]) == len(steps) + 2
    for (batch, estimator, resolution), row in steps.items():
        assert row["pixels"] == batch * (64 if resolution == "label" else 16) ** 2
        if estimator == "exact" and row["pixels"] > 600:
            assert row["status"] == "left out" and "--exact-pixels" in row["why"]
            assert row["overhead_percent"] is None and row["alone_percent"] is None
            continue
        assert row["status"] == "timed" and row["why"] is None
        assert row["outputs_equal"] is None
        if row["memory_how"].startswith("peak"):
            assert row["without_bytes"] > 2**20 and row["with_bytes"] > 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="takes Linux with /proc/self/clear_refs")
def test_memory_of_a_step(bench) -> None:
    """Losses that hold 16 MiB for the backward add as much to the peak, where that is before the backward."""
    host = bench.train_step.Host(case(bench, batch=1))

    class Hoarding(torch.nn.Module):
        def forward(self, features, labels):
            big = features.mean() * torch.ones(2**22)
            return SimpleNamespace(total=big.square().sum() * 1e-9)

    for criterion in (None, Hoarding()):
        host.step(criterion)
    (plain, how), (hoarded, _) = (host.memory(criterion) for criterion in (None, Hoarding()))
    assert "VmHWM" in how
    assert plain > 2**20 and plain + 10 * 2**20 < hoarded < plain + 120 * 2**20


def test_overhead_is_the_ratio_of_the_times(quick, tmp_path) -> None:
    options = [*TINY, "--seconds", "0", "--rounds", "3", "--estimator", "moments", "--resolution", "feature"]
    assert quick.train_step.main([*options, "--json", str(tmp_path / "out.json")]) == 0
    step, inference = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (step["task"], inference["task"]) == ("step", "inference")
    for row in (step, inference):
        without, with_ = row["without_ms"], row["with_ms"]
        assert len(without) == len(with_) == 3 and min(*without, *with_) > 0
        ratios = [100 * (b / a - 1) for a, b in zip(without, with_)]
        found = row["overhead_percent"]
        assert found["median"] == pytest.approx(median(ratios))
        assert min(ratios) <= found["q25"] <= found["median"] <= found["q75"] <= max(ratios)
        assert row["without_ms_median"] == pytest.approx(median(without))
    assert step["alone_percent"] == pytest.approx(100 * median(step["alone_ms"]) / median(step["with_ms"]))
    assert inference["alone_ms"] == [] and inference["outputs_equal"] is True


@pytest.mark.parametrize("estimator", ["moments", "sampled"])
def test_the_step_is_the_trainers(bench, estimator) -> None:
    """The same total and the same weights after it, from the same weights on."""
    from in2nect.data.classes import Classes
    from in2nect.training.module import SegmentationModule
    from in2nect.training.settings import TuningSettings

    host = bench.train_step.Host(case(bench))
    for tuning in (TuningSettings(enabled=False), TuningSettings(estimator=estimator, resolution="feature")):
        module = SegmentationModule(encoder="test_efficientnet", tuning=tuning)
        module.build(Classes(tuple("abcde"), ((0, 0, 0),) * 5))
        module.model.load_state_dict(host.model.state_dict())
        criterion = host.criterion(estimator, "feature") if tuning.enabled else None
        torch.manual_seed(7)
        expected, _ = module._losses(module.model.forward_training(host.images), host.labels)
        expected.backward()
        torch.manual_seed(7)
        found = host.loss(criterion)
        assert found.item() == expected.item()
        host.optimizer.zero_grad()
        found.backward()
        gradients = dict(module.model.named_parameters())
        for name, parameter in host.model.named_parameters():
            assert torch.equal(parameter.grad, gradients[name].grad), name


def test_a_step_trains(bench) -> None:
    for optimizer in ("adamw", "sgd"):
        host = bench.train_step.Host(case(bench, optimizer=optimizer, dtype=torch.bfloat16))
        criterion = host.criterion("moments", "feature")
        before = [parameter.detach().clone() for parameter in host.model.parameters()]
        assert host.features().dtype == torch.bfloat16
        losses = [float(host.step(criterion)) for _ in range(8)]
        assert all(map(math.isfinite, losses)) and min(losses[4:]) < losses[0]
        assert all(not torch.equal(a, b) for a, b in zip(before, host.model.parameters()) if b.grad is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_cuda_never_waits_and_is_timed(quick, capsys) -> None:
    host = quick.train_step.Host(case(quick, device=torch.device("cuda"), dtype=torch.bfloat16))
    for estimator in ("moments", "sampled", "exact"):
        criterion = host.criterion(estimator, "feature")
        host.step(criterion)
        torch.cuda.set_sync_debug_mode("error")
        try:
            host.step(criterion)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    options = ["--size", "64", "--batch", "2", "--encoder", "test_efficientnet", *QUICK]
    assert quick.train_step.main([*options, "--device", "cuda"]) == 0
    assert "failed" not in capsys.readouterr().out


def test_labels_are_long_tailed_patches_some_of_them_ignored(bench) -> None:
    for size in (512, 75):
        settings = case(bench, size=size, batch=4, classes=7)
        labels = bench.train_step.make_labels(settings, torch.Generator().manual_seed(0))
        again = bench.train_step.make_labels(settings, torch.Generator().manual_seed(0))
        assert labels.shape == (4, size, size) and labels.dtype == torch.uint8 and torch.equal(labels, again)
        counts = torch.bincount(labels.flatten().long(), minlength=256)
        assert counts[7:255].sum() == 0
        assert counts[255] / labels.numel() == pytest.approx(0.05, abs=0.002)
        assert (labels[:, :, 1:] == labels[:, :, :-1]).float().mean() > 0.9
        if size == 512:
            assert counts[0] > 3 * counts[6] > 0


def test_tasks_take_turns(bench) -> None:
    order: list[str] = []
    names = ("a", "b", "c")
    times = bench.timing.time_in_turns(
        [lambda name=name: order.append(name) for name in names], torch.device("cpu"), seconds=0, least=3, most=3
    )
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert [len(one) for one in times] == [3, 3, 3]


def test_times_belong_to_their_tasks(bench, monkeypatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(bench.timing.time, "perf_counter", lambda: clock.now)

    def task(seconds: float):
        def run() -> None:
            clock.now += seconds

        return run

    times = bench.timing.time_in_turns([task(1), task(2), task(4)], torch.device("cpu"), seconds=29, least=1, most=50)
    assert times == [[1e3, 2e3, 4e3]] * 4


def test_a_tap_that_changes_the_prediction_is_an_error(quick, monkeypatch, capsys) -> None:
    class Meddling(quick.train_step.RepresentationTap):
        def __init__(self, model) -> None:
            super().__init__(model)
            self._handles.append(model.register_forward_hook(lambda module, given, logits: logits + 1))

    monkeypatch.setattr(quick.train_step, "RepresentationTap", Meddling)
    assert quick.train_step.main([*TINY, *QUICK, "--resolution", "feature"]) == 1
    assert "wrong: the tapped network gives other logits" in capsys.readouterr().out


def test_what_fails_is_a_row_and_the_next_goes_on(quick, monkeypatch, capsys) -> None:
    made = quick.train_step.Host.criterion

    def criterion(self, estimator, resolution):
        if resolution == "feature":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")
        return made(self, estimator, resolution)

    monkeypatch.setattr(quick.train_step.Host, "criterion", criterion)
    assert quick.train_step.main([*TINY, *QUICK]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "moments, feature out of memory: OutOfMemoryError: CUDA out of memory" in shown
    assert "moments, label 4,096" in shown and "inference, tapped -" in shown


def test_a_loss_that_is_not_finite_is_no_time(quick, monkeypatch, capsys) -> None:
    monkeypatch.setattr(quick.train_step.Host, "step", lambda self, criterion: torch.tensor(float("nan")))
    quick.train_step.main([*TINY, *QUICK, "--resolution", "feature"])
    assert "moments, feature failed: the loss of the network is not finite" in " ".join(capsys.readouterr().out.split())


def test_nothing_is_begun_beyond_the_budget(quick, capsys) -> None:
    assert quick.train_step.main([*TINY, *QUICK, "--budget", "0"]) == 1  # nothing was timed
    assert capsys.readouterr().out.count("left out: the time is spent (--budget)") == 3


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--network", "segnet"], "--network segnet: expected one of"),
        (["--size", "0"], "expected a positive whole number"),
        (["--classes", "1"], "need at least 2"),
        (["--estimator", "magic"], "invalid choice: 'magic'"),
        (["--resolution", "image"], "invalid choice: 'image'"),
        (["--bat", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_refused(bench, capsys, arguments, why) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.train_step.main(arguments)
    assert stopped.value.code == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_help_explains_every_option(bench) -> None:
    for action in bench.train_step._parser()._actions:
        assert action.help, action.option_strings
