"""Scalars come back over all event files of a run; what a resumed run logged again counts."""

import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from in2nect.report.history import read_scalars


def test_resumed_run_is_one_curve(tmp_path: Path) -> None:
    for run, (steps, value) in enumerate([((0, 1, 2), 1.0), ((2, 3), 2.0)]):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{run}") as writer:
            for step in steps:
                writer.add_scalar("train/seg", value, step)
        os.utime(next(tmp_path.glob(f"*.{run}")), (run, run))
    assert read_scalars(tmp_path) == {"train/seg": [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]}
