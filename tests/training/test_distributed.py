"""`in2nect fit` on two processes takes the steps of one, where nothing else depends on how a batch is cut."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "--data.crop_size=64",
    "--data.samples_per_epoch=8",
    "--model.encoder=test_efficientnet",
    "--model.tuning.intra_audit=1",  # which one process makes alone
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
]
# BatchNorm by its running statistics and no dropout: both else depend on which images a process has.
PROGRAM = """
import sys
import torch.nn.functional as F
from torch import nn

def batch_norm(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

nn.BatchNorm2d.forward = batch_norm
nn.Dropout.forward = nn.Dropout2d.forward = lambda self, x: x

from timm.layers import BatchNormAct2d, DropPath

BatchNormAct2d.forward = lambda self, x: self.act(self.drop(batch_norm(self, x)))
DropPath.forward = lambda self, x: x

from in2nect.training.cli import main

sys.exit(main())
"""


def test_two_processes_take_the_steps_of_one(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    losses, weights = [], []
    for devices in (1, 2):
        output = tmp_path / str(devices)
        how = [f"--trainer.devices={devices}", f"--data.batch_size={4 // devices}", f"--output={output}"]
        line = [sys.executable, str(tmp_path / "program.py"), "fit", f"--data.root={dataset}", *SETTINGS, *how]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        told = subprocess.run(line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
        assert told.returncode == 0, told.stderr
        assert "sync_dist" not in told.stderr
        events = EventAccumulator(str(output)).Reload()
        terms = ("seg", "aux", "inter", "intra", "total")
        losses.append(torch.tensor([[event.value for event in events.Scalars(f"train/{term}")] for term in terms]))
        state = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        weights.append(torch.cat([value.flatten() for value in state.values() if value.is_floating_point()]))
    assert losses[0].shape == (5, 4) and (losses[0][:, 0] != losses[0][:, -1]).all()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    # Adam makes steps of lr even of gradients that are rounding alone
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=2e-4)
