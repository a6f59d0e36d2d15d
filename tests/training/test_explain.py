"""What `--explain` says of the configurations of 1024 x 1024: they must fit the paper's card, and hold its batch."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from in2nect.models import list_models
from in2nect.training.cli import main
from in2nect.training.explain import Schedule
from tests.data import trees

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the estimate is for that one")
@pytest.mark.parametrize(
    ("config", "network"), [("unetformer", "unetformer"), ("manet", "manet"), ("lsknet", "lsknet_t")]
)
def test_full_size_fits_48_gb(config: str, network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if network not in list_models():
        pytest.skip(f"there is no network {network} here")
    trees.loveda(tmp_path / "loveda")
    path = ROOT / "configs" / f"loveda_{config}_1024.yaml"
    arguments = [f"--config={path}", f"--data.root={tmp_path / 'loveda'}", f"--output={tmp_path / 'run'}"]
    assert main(["fit", *arguments, "--trainer.devices=1", "--explain"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "16 crops a step: 16 x 1 devices x 1 accumulated batches" in told
    assert "bf16-mixed, channels_last, compiled; an A6000 of 48 GB is assumed" in told
    total = re.search(r"([\d.]+) GB on each device, of 48\.0: fits", told)
    assert total is not None and 5 < float(total[1]) < 44
    parts = told.split(" memory ")[1].split(total[0])[0]
    assert sum(float(size) for size in re.findall(r"([\d.]+) GB ", parts)) == pytest.approx(float(total[1]), abs=0.05)


@pytest.mark.parametrize(
    ("options", "batches", "per_epoch", "steps"),
    [
        ({}, 12, 12, 36),
        ({"accumulate_grad_batches": 5}, 12, 3, 9),
        ({"max_steps": 20}, 12, 12, 20),
        ({"max_epochs": None, "max_steps": 20}, 12, 12, 20),
        ({"max_epochs": -1}, 12, 12, float("inf")),
        ({"max_epochs": None}, 12, 12, 12_000),
        ({"limit_train_batches": 7}, 7, 7, 21),
        ({"limit_train_batches": 0.5}, 6, 6, 18),
        ({"num_devices": 2, "num_nodes": 2}, 3, 3, 9),
    ],
)
def test_schedule(options: dict[str, Any], batches: int, per_epoch: int, steps: float) -> None:
    """Of 100 crops in batches of 8, on one device for three epochs."""
    usual: dict[str, Any] = {"num_devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0}
    trainer = SimpleNamespace(**usual | {"max_epochs": 3, "max_steps": -1} | options)
    data = SimpleNamespace(train=range(100), batch_size=8)
    found = Schedule.of(trainer, data)  # type: ignore[arg-type]
    assert (found.batches, found.steps_per_epoch, found.steps) == (batches, per_epoch, steps)
    assert found.global_batch == 8 * trainer.num_devices * trainer.num_nodes * trainer.accumulate_grad_batches
