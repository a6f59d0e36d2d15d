"""The averaged weights: what the average is, what validation and checkpoints hold, and that whole numbers are left."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import get_ema_avg_fn

from in2nect.training.averaging import AveragedWeights, _average
from in2nect.training.cli import main
from in2nect.training.settings import OptimizerSettings

DECAY = 0.75


class Record(Callback):
    """The weights of every step, and those of every validation."""

    steps: list[dict[str, torch.Tensor]]
    validated: list[dict[str, torch.Tensor]]
    last: Record

    def __init__(self) -> None:
        self.steps, self.validated = [], []
        Record.last = self

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(_copied(pl_module))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(_copied(pl_module))


def _copied(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_average_of_steps_is_what_is_validated_and_kept(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    arguments = [
        "fit",
        f"--data.root={dataset}",
        f"--output={tmp_path}",
        "--data.crop_size=64",
        "--data.batch_size=2",
        "--data.samples_per_epoch=8",
        "--model.encoder=test_efficientnet",
        f"--model.optimizer.ema_decay={DECAY}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.callbacks=test_averaging.Record",
    ]
    assert main(arguments) == 0
    import test_averaging  # type: ignore[import-not-found]  # as the command line has it

    record = test_averaging.Record.last
    assert len(record.steps) == 4
    expected = record.steps[0]
    averages = [expected]
    for step in record.steps[1:]:
        expected = {
            name: DECAY * expected[name] + (1 - DECAY) * value if value.is_floating_point() else value
            for name, value in step.items()
        }
        averages.append(expected)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    for found, wanted in ((record.validated[0], averages[1]), (last["state_dict"], averages[3])):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, record.steps[3][name]) for name, value in last["current_model_state"].items())
    weight = "model.decoder.segmentation_head.classifier.weight"
    assert not torch.equal(last["state_dict"][weight], last["current_model_state"][weight])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?i).*callback")
        assert main(["test", f"--ckpt_path={tmp_path}/checkpoints/best.ckpt"]) == 0


def test_whole_numbers_are_copied_and_equal_numbers_stay() -> None:
    """torch's average of integers rounds down: of the same indices it makes others."""
    index = torch.arange(225)
    rounded = index.clone().copy_(get_ema_avg_fn(0.9)(index, index, 1))  # type: ignore[arg-type]
    assert not torch.equal(rounded, index)
    averaged, current = [index.clone()], [index.flip(0)]
    _average(averaged, current, 1, decay=0.9)
    assert torch.equal(averaged[0], current[0])
    constant = torch.randn(100)
    averaged = [constant.clone()]
    _average(averaged, [constant], 1, decay=0.999)
    assert torch.equal(averaged[0], constant)


def test_a_decay_out_of_its_range_is_told() -> None:
    with pytest.raises(ValueError, match=r"optimizer.ema_decay is 1.0; expected 0 for no average"):
        OptimizerSettings(ema_decay=1.0)
    assert AveragedWeights(0.9).should_update(step_idx=0)
