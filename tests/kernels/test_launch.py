"""The launch table: an entry for everything, the chip's own, and the search that proposes new ones."""

import pytest
import torch

from in2nect.kernels import launch, table
from in2nect.kernels.class_moments import SAME_GRID_DIM

CUDA = torch.device("cuda")
# Kernels that hold whole rows; wider ones go another way.
WIDEST = {name: SAME_GRID_DIM for name in table.TABLE if name.startswith("class_moments_same_grid")}


@pytest.mark.parametrize("kernel", table.TABLE)
def test_every_width_and_architecture_has_an_entry(kernel):
    groups = {group for entry in table.TABLE[kernel] for group in entry.dtypes}
    dtypes = {"half": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    assert groups >= {"float32", "float64"}
    for architecture in table.ARCHITECTURES:
        with launch.assumed_architecture(architecture):
            for group in groups:
                for dim in (width for width in (1, 64, 65, 128, 256, 1024) if width <= WIDEST.get(kernel, 1024)):
                    entry = launch.choose(kernel, CUDA, dtypes[group], dim)
                    assert entry in table.TABLE[kernel]
                    assert architecture in entry.architectures
                    assert dim <= entry.max_dim


def test_every_entry_has_a_reason():
    assert all(len(entry.reason) > 10 for entries in table.TABLE.values() for entry in entries)


def test_what_no_entry_is_for():
    with pytest.raises(ValueError, match="no launch entry for sm_86, float32, d = 1025; the widest is 1024"):
        launch.choose("pair_forward", torch.device("cpu"), torch.float32, 1025)
    with pytest.raises(ValueError, match="no launch table for 'sm_70'"), launch.assumed_architecture("sm_70"):
        pass


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_89"),
    ],
)
def test_architecture_of_a_device(capability, name):
    assert launch._architecture(*capability) == name


@pytest.fixture
def searching(monkeypatch):
    """A GPU on which warps cost time, and 128 rows a program do not fit."""
    monkeypatch.setattr(launch, "_tuned", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    runs = []

    def run(entry):
        runs.append(entry)
        if entry.blocks["BLOCK_M"] == 128:
            raise launch.triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    def do_bench(call):
        call()
        return runs[-1].warps * runs[-1].stages / runs[-1].blocks["BLOCK_M"]

    monkeypatch.setattr(launch.triton.testing, "do_bench", do_bench)
    with launch.assumed_architecture("sm_80"):
        yield run, runs


def test_no_search_unless_asked(searching, monkeypatch):
    run, runs = searching
    monkeypatch.delenv("IN2NECT_AUTOTUNE", raising=False)
    entry = launch.tuned("pair_symmetric_backward", CUDA, torch.bfloat16, 64, run)
    assert entry is launch.choose("pair_symmetric_backward", CUDA, torch.bfloat16, 64)
    assert not runs


def test_a_search_prints_the_entry_to_add(searching, monkeypatch, capsys):
    run, runs = searching
    monkeypatch.setenv("IN2NECT_AUTOTUNE", "1")
    name, dtype, dim = "pair_symmetric_backward", torch.bfloat16, 64
    default = launch.choose(name, CUDA, dtype, dim)
    best = launch.tuned(name, CUDA, dtype, dim, run)
    assert (best.blocks["BLOCK_M"], best.warps, best.stages) == (64, 4, 2)
    assert {entry.blocks["BLOCK_D"] for entry in runs} == {default.blocks["BLOCK_D"]}
    assert launch.choose(name, CUDA, dtype, dim) is best
    printed = capsys.readouterr().out
    assert f"{name} on sm_80, half, d = 64: 0.1250 ms, 1.50 x the table's entry" in printed
    line = printed.splitlines()[-1].strip().rstrip(",")
    proposed = eval(line, {"Entry": table.Entry})
    assert proposed._replace(reason=best.reason) == best._replace(
        architectures=("sm_80",), dtypes=("half",), max_dim=64
    )
    del runs[:]
    assert launch.tuned(name, CUDA, dtype, dim, run) is best
    assert not runs


def test_tf32_only_where_torch_may_use_it():
    assert launch.input_precision(torch.bfloat16) == launch.input_precision(torch.float64) == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert launch.input_precision(torch.float32) == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert launch.input_precision(torch.float32) == "tf32x3"
    finally:
        torch.set_float32_matmul_precision(before)
