"""bench/loss_throughput.py at a size of nothing: what it shows and keeps, which arguments it refuses, that every peer
computes the same thing, and that one which does not is never timed."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
MODULES = ("arguments", "problems", "ceilings", "timing", "peers", "rows", "growth", "output", "loss_throughput")
NOTHING = {"seconds": 0.0, "repeats": 1, "least": 1, "memory": False}


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, whose plain names are gone again afterwards."""
    sys.path.insert(0, str(BENCH))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(BENCH))
        for name in (*MODULES, "exponentials"):
            sys.modules.pop(name, None)


@pytest.fixture
def quick(bench, monkeypatch):
    """Ceilings of small copies and products."""
    monkeypatch.setattr(bench.ceilings, "SECONDS", 0.01)
    monkeypatch.setattr(bench.ceilings, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(bench.ceilings, "MATRIX_SIDE_CPU", 64)
    monkeypatch.setattr(bench.rows, "ROTATING_BYTES_CPU", 2**16)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # a tenth of a second, several times a row
    return bench


def problem(bench, **changes):
    base = bench.problems.Problem(
        op="intra_class_loss",
        estimator="exact",
        device=torch.device("cpu"),
        dtype=torch.float32,
        pixels=144,
        dim=10,
        classes=4,
        per_class=9,
    )
    return replace(base, **changes)


def measured(bench, one, name, answers=None):
    """The row of an implementation, by name."""
    implementation = next(found for found in bench.rows.implementations(one) if found.name == name)
    ceilings = bench.ceilings.Ceilings(1e9, 1e9, 1e9, 1e9, {})
    return bench.rows.measure(
        one, implementation, ceilings, bench.rows.Settings(**NOTHING), answers or bench.rows.Answers()
    )


def test_from_a_checkout_with_nothing_installed(tmp_path) -> None:
    """Run from elsewhere by a Python that knows torch and not in2nect: tables, missing peers, JSON, plot, trace."""
    packages = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
    options = ["--pixels", "256", "--dim", "8", "--seconds", "0.01", "--repeats", "3", "--no-growth"]
    options += ["--impl", "reference,cpp,triton_*,torch_naive,keops,index_add,torch_scatter"]
    options += ["--json", "out.json", "--plot", "plots/out.png", "--trace", "trace.json"]
    program = (
        f"import sys, runpy; sys.path += {sorted(packages)!r}; sys.argv = {['bench', *options]!r}; "
        f"runpy.run_path({str(BENCH / 'loss_throughput.py')!r}, run_name='__main__')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", program]  # -S: no .pth file is read, so no editable install is found
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines) <= 120
    table = [line for line in lines if line.startswith(("intra_class_loss, exact: N = 256", "class_sums: N = 256"))]
    assert len(table) == 2
    naive = next(line for line in lines if line.startswith("torch_naive"))
    assert naive.count("±") == 3 and "1.00x" in naive
    assert any(line.startswith("keops") and "absent: pykeops is not installed" in line for line in lines)
    assert any(line.startswith("no row for cuda: ") for line in lines)

    document = json.loads((tmp_path / "out.json").read_text())
    assert {"schema", "date", "machine", "versions", "arguments", "ceilings", "rows", "growth"} <= set(document)
    assert document["schema"] == 1 and document["arguments"]["pixels"] == 256
    assert document["versions"]["torch"] == torch.__version__ and document["machine"]["cores"] == os.cpu_count()
    assert all(document["ceilings"]["fp32"][rate] > 0 for rate in ("bytes", "reads", "flops", "exponentials"))
    rows = {(row["op"], row["implementation"]): row for row in document["rows"]}
    timed = rows["intra_class_loss", "torch_naive"]
    assert timed["status"] == "timed" and timed["kind"] == "peer" and timed["ratio_to_best_peer"] == 1
    for direction in ("forward", "backward", "both"):
        spread = timed[f"{direction}_ms"]
        assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
        assert timed["percent_of_bound"][direction] == pytest.approx(
            100 * timed["bound_ms"][direction] / spread["median"]
        )
    assert timed["gradient_bytes"] == 256 * 8 * 4
    assert timed["error"]["pixels"] == 256 and timed["error"]["gradient"] < 1e-5
    assert rows["intra_class_loss", "keops"]["status"] == "absent"
    assert rows["class_sums", "index_add"]["read_share"] > 0 and timed["read_share"] is None
    assert "reads, over the rate of a sum of the same features" in done.stdout
    assert rows["class_sums", "torch_scatter"]["why"].startswith("torch_scatter is not installed")
    assert str(BENCH.parent) not in (tmp_path / "out.json").read_text()

    assert (tmp_path / "plots" / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "torch_naive backward" in (tmp_path / "trace.json").read_text()


def test_growth_and_its_budget(quick, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(quick.growth, "PIXELS_OF_PAIRS", {"cpu": [64, 128, 2**20]})
    monkeypatch.setattr(quick.growth, "PIXELS", [64, 256])
    monkeypatch.setattr(quick.growth, "BASE", {"cpu": 256})
    monkeypatch.setattr(quick.growth, "BASE_OF_PAIRS", {"cpu": 256})
    monkeypatch.setattr(quick.growth, "DIMS", [4, 8])
    monkeypatch.setattr(quick.growth, "CLASSES", [2, 4])
    kept = tmp_path / "out.json"
    options = [
        "--op",
        "intra_class_loss",
        "--pixels",
        "128",
        "--impl",
        "reference,torch_naive",
        "--growth",
        "--no-plot",
    ]
    options += ["--seconds", "0.01", "--per-class", "8", "--budget", "60", "--json", str(kept)]
    assert quick.loss_throughput.main(options) == 0
    growth = json.loads(kept.read_text())["growth"]
    series = {(row["axis"], row["series"]) for row in growth}
    estimators = ("exact", "sampled", "moments")
    assert series == {("pixels", "torch_naive"), *((a, e) for a in ("pixels", "dim", "classes") for e in estimators)}
    exact = [row for row in growth if (row["axis"], row["series"]) == ("pixels", "exact")]
    assert [row["status"] for row in exact] == ["timed", "timed", "left out"]
    assert exact[0]["exponent"] is None and exact[2]["exponent"] is None and "--budget" in exact[2]["why"]
    times = [row["both_ms"]["median"] for row in exact[:2]]
    assert 2 ** exact[1]["exponent"] == pytest.approx(times[1] / times[0])
    shown = capsys.readouterr().out
    assert "cost over pixels N (d = 64, K = 7, fp32)" in shown and "exact ends before 1,048,576" in shown


def test_nothing_is_begun_beyond_the_budget(quick, capsys) -> None:
    options = ["--op", "class_sums", "--pixels", "64", "--no-plot", "--budget", "0", "--impl", "one_hot,torch_scatter"]
    assert quick.loss_throughput.main(options) == 1  # nothing was timed
    shown = capsys.readouterr().out
    assert "left out: the time is spent (--budget)" in shown
    assert "absent: torch_scatter is not installed" in shown


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"ratio": 3, "layout": "channels_last"}, {"layout": "rows"}, {"temperature": 0.5}]
)
def test_every_implementation_computes_the_loss(quick, changes, dtype) -> None:
    """All that is here without a compilation; odd sizes, both resolutions."""
    shapes = [changes] if "ratio" not in changes else [changes | {"resolution": r} for r in ("label", "feature")]
    for shape in shapes:
        for op, estimator in (("intra_class_loss", e) for e in ("exact", "sampled", "moments")):
            _all_timed(quick, problem(quick, op=op, estimator=estimator, dtype=dtype, **shape))


@pytest.mark.parametrize("changes", [{}, {"ratio": 3, "layout": "channels_last"}, {"layout": "rows"}])
@pytest.mark.parametrize("op", ["class_sums", "sample_pixels", "gather_rows"])
def test_every_implementation_computes_the_operator(quick, op, changes) -> None:
    shapes = [changes] if "ratio" not in changes else [changes | {"resolution": r} for r in ("label", "feature")]
    for shape in shapes:
        _all_timed(quick, problem(quick, op=op, estimator=None, **shape))


@pytest.mark.parametrize("keys", [0, 33])
def test_every_implementation_computes_the_log_sum_exp(quick, keys) -> None:
    _all_timed(quick, problem(quick, op="pair_logsumexp", estimator=None, keys=keys, temperature=0.7))


def _all_timed(bench, one) -> None:
    here = [found for found in bench.rows.implementations(one) if found.missing is None and not found.compiles]
    assert {"ours", "peer"} == {found.kind for found in here}
    answers = bench.rows.Answers()
    for found in here:
        row = measured(bench, one, found.name, answers)
        assert row.status == "timed", (found.name, row.why)


def without_weights(anchors, keys, log_weights, chunk):
    return torch.logsumexp(anchors @ keys.T, dim=1)


def without_the_gradient_of_keys(anchors, keys, log_weights, chunk):
    return torch.logsumexp(anchors @ keys.detach().T + log_weights, dim=1)


def not_a_number(anchors, keys, log_weights, chunk):
    return torch.logsumexp(anchors @ keys.T + log_weights, dim=1) * float("nan")


@pytest.mark.parametrize(
    ("log_d", "why"),
    [
        (without_weights, "its value is off by"),
        (without_the_gradient_of_keys, "its gradient is off by"),
        (not_a_number, "its value is off by inf"),
    ],
)
def test_a_peer_that_computes_something_else_is_not_timed(quick, monkeypatch, capsys, log_d, why) -> None:
    ways = (quick.peers.PairSum("impostor", log_d), quick.peers.PairSum("torch_naive", quick.peers._naive))
    monkeypatch.setattr(quick.peers, "PAIR_SUMS", ways)
    row = measured(quick, problem(quick), "impostor")
    assert row.status == "wrong" and row.times is None and row.why.startswith(why)
    options = [
        "--op",
        "intra_class_loss",
        "--pixels",
        "144",
        "--no-plot",
        "--seconds",
        "0",
        "--impl",
        "impostor,torch*",
    ]
    assert quick.loss_throughput.main(options) == 0  # a wrong peer is its own fault
    shown = capsys.readouterr().out
    assert f"wrong: {why}" in " ".join(shown.split())


def test_ours_being_wrong_is_an_error(quick, monkeypatch) -> None:
    right = quick.rows.ours
    monkeypatch.setattr(quick.rows, "ours", lambda *arguments: tuple(1.01 * t for t in right(*arguments)))
    options = [
        "--op",
        "intra_class_loss",
        "--pixels",
        "144",
        "--no-plot",
        "--seconds",
        "0",
        "--impl",
        "reference,torch_n*",
    ]
    assert quick.loss_throughput.main(options) == 1


@pytest.mark.parametrize(
    ("drawn", "why"),
    [
        (lambda own: own[:, :-1], "it drew (4, 8) pixels"),
        (lambda own: own.clone().fill_(-1), "it drew 0 pixels of the"),
        (lambda own: own[:, :1].expand(-1, own.shape[1]), "twice"),
        (lambda own: own.roll(1, 0), "that are of another"),
        (lambda own: own, "it drew the same pixels twice"),
    ],
)
def test_a_sampler_that_does_not_sample_is_not_timed(quick, monkeypatch, drawn, why) -> None:
    one = problem(quick, op="sample_pixels", estimator=None)
    own = quick.peers._topk(one, quick.problems.make_inputs(one))
    peer = quick.peers.Peer("impostor", lambda *_: (drawn(own),), sampler=lambda *_: drawn(own))
    monkeypatch.setattr(quick.peers, "SAMPLERS", [peer])
    row = measured(quick, one, "impostor")
    assert row.status == "wrong" and why in row.why


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (NotImplementedError("no backward\nhere"), "failed"),
    ],
)
def test_a_failing_implementation_is_a_row(quick, monkeypatch, error, status) -> None:
    def fail(*_):
        raise error

    monkeypatch.setattr(quick.peers, "PAIR_SUMS", (quick.peers.PairSum("broken", fail),))
    row = measured(quick, problem(quick), "broken")
    assert row.status == status and row.why.startswith(type(error).__name__) and "\n" not in row.why
    assert row.why in " ".join(quick.output.table_row(row).split())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--op", "class_sum"], "expected some of intra_class_loss, class_sums"),
        (["--estimator", ""], "expected some of exact, sampled, moments"),
        (["--impl", "nobody"], "names no implementation; there are"),
        (["--pixels", "0"], "expected a positive whole number"),
        (["--pixels", "13"], "7 classes need 14 at least"),
        (["--classes", "1"], "need at least 2"),
        (["--keys", "64"], "--keys belongs to --op pair_logsumexp"),
        (["--ratio", "2", "--layout", "rows"], "--layout rows has none"),
        (["--ratio", "3", "--pixels", "4096"], "does not divide the 64 x 64 labels"),
        (["--temperature", "0"], "expected a positive number"),
        (["--device", "cpu", "--nvtx"], "--trace works on both"),
        (["--pix", "64"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_refused(bench, capsys, arguments, why) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.loss_throughput.main(arguments)
    assert stopped.value.code == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_the_interpreter_is_never_timed(quick, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        quick.loss_throughput.main(["--impl", "triton", "--device", "cpu"])
    assert stopped.value.code == 2 and "Unset it" in capsys.readouterr().err
    options = ["--op", "class_sums", "--pixels", "64", "--device", "cpu", "--no-plot", "--impl", "tri*,one_hot"]
    assert quick.loss_throughput.main([*options, "--seconds", "0"]) == 0
    shown = capsys.readouterr().out
    assert "no row for triton: TRITON_INTERPRET=1" in shown
    assert not any(line.startswith("triton") for line in shown.splitlines())


def test_help_explains_every_option(bench) -> None:
    for action in bench.loss_throughput._parser()._actions:
        assert action.help, action.option_strings


def test_the_bound_by_hand(bench) -> None:
    """N = 144 rows of d = 10 against each other: N^2 = 20,736."""
    forward, backward = bench.ceilings.least_work(problem(bench))
    assert (forward.flops, forward.exponentials) == (20_736 * 10, 20_736 / 2)
    assert (backward.flops, backward.exponentials) == (3 * 20_736 * 10, 20_736 / 2)
    assert forward.bytes == 144 * 10 * 4 + 144 * 8
    on_cuda = problem(bench, device=torch.device("cuda"))
    forward, backward = bench.ceilings.least_work(on_cuda)
    assert (forward.flops, backward.flops) == (20_736 * 10, 4 * 20_736 * 10)
    assert (forward.exponentials, backward.exponentials) == (20_736 / 2, 20_736)
    ceilings = bench.ceilings.Ceilings(bytes=1e6, flops=1e7, exponentials=1e6, reads=2e6, how={})
    assert forward.milliseconds(ceilings) == (pytest.approx(1e3 * 207_360 / 1e7), "matrix products")
    sums, gradient = bench.ceilings.least_work(problem(bench, op="class_sums", estimator=None, dtype=torch.bfloat16))
    assert (sums.reads, sums.bytes) == (144 * 10 * 2 + 144 * 8, 4 * (10 * 4 + 8))
    assert (gradient.reads, gradient.bytes) == (144 * 8 + 4 * 10 * 4, 144 * 10 * 2)
    assert sums.milliseconds(ceilings) == (pytest.approx(1e3 * (4032 / 2e6 + 192 / 1e6)), "bytes")


def test_percentiles_by_hand(bench) -> None:
    spread = bench.timing.spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.median, spread.p10, spread.p90) == (3.0, pytest.approx(1.4), pytest.approx(4.6))
    assert spread.relative == pytest.approx(1.6 / 3)
    assert bench.timing.spread([7.0]).p90 == 7.0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="takes Linux with /proc/self/clear_refs")
def test_memory_at_the_peak(bench) -> None:
    """16 MiB that live together; of them 8 are freed, and 6 come after. Free blocks of the heap change nothing."""
    bench.timing.settle_allocator()
    blocks = [torch.ones(2**20) for _ in range(16)]
    del blocks[::2]

    def forward(inputs):
        first, second = torch.ones(2**21), torch.ones(2**21)
        del second
        return (first,)

    def backward(inputs, outputs):
        return (torch.ones(2**20), torch.ones(2**19))

    found, how = bench.timing.extra_memory(forward, backward, None, torch.device("cpu"))
    assert "VmHWM" in how
    assert abs(found - 16 * 2**20) < 2**19
    del blocks


def test_inputs_take_turns(bench) -> None:
    """Copies at other addresses, in the same layout, of which each has the same loss."""
    one = problem(bench, layout="channels_last")
    inputs = bench.problems.make_inputs(one)
    sets = bench.problems.rotated(one, inputs, cache=3 * inputs.bytes(), most=2**30)
    assert sum(each.bytes() for each in sets) > 3 * inputs.bytes()
    assert len({each.leaves[0].data_ptr() for each in sets}) == len(sets)
    assert {each.leaves[0].stride() for each in sets} == {inputs.leaves[0].stride()}
    losses = torch.stack([bench.problems.ours(one, each)[0].detach() for each in sets])
    torch.testing.assert_close(losses, losses[:1].expand_as(losses))
    assert len(bench.problems.rotated(one, inputs, cache=3 * inputs.bytes(), most=0)) == 1


def test_every_class_has_two_pixels(bench) -> None:
    for changes in ({"pixels": 16, "classes": 8}, {"pixels": 36, "classes": 8, "ratio": 3, "resolution": "feature"}):
        one = problem(bench, **changes)
        labels = bench.problems.make_inputs(one).constants["labels"]
        at_cells = bench.problems.to_feature_grid(labels, *one.grid[1:])
        assert torch.bincount(at_cells.flatten(), minlength=8).min() >= 2
