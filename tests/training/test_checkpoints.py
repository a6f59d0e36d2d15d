"""A checkpoint that could not be written to its end leaves the one before as it was."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from in2nect.training.checkpoints import AtomicCheckpointIO, checkpoints
from in2nect.training.failures import TrainingFailure


class Unpicklable:
    def __reduce__(self) -> str:
        raise RuntimeError("half way")


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"weights": torch.ones(1000)}, path)
    with pytest.raises(RuntimeError, match="half way"):
        writer.save_checkpoint({"weights": torch.zeros(1000), "more": Unpicklable()}, path)
    assert torch.equal(writer.load_checkpoint(path, weights_only=True)["weights"], torch.ones(1000))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, whose every write finds the disk full")
def test_a_full_disk_is_told_with_the_checkpoint_that_is_good(tmp_path: Path) -> None:
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    partial = tmp_path / f".last.{os.getpid()}.partial.ckpt"
    weights = torch.ones(500_000)
    partial.symlink_to("/dev/full")
    none = r"step 3 could not be written: No space left on device\. It takes 2\.0 MB.*No checkpoint was written before"
    with pytest.raises(TrainingFailure, match=none):
        writer.save_checkpoint({"global_step": 3, "weights": [weights]}, path)
    writer.save_checkpoint({"global_step": 6, "weights": [weights]}, path)
    partial.symlink_to("/dev/full")
    with pytest.raises(TrainingFailure, match=rf"step 9 .*The last good checkpoint is {path} of step 6\. Make room"):
        writer.save_checkpoint({"global_step": 9, "weights": [0 * weights]}, path)
    assert torch.equal(writer.load_checkpoint(path)["weights"][0], weights)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("asked", [None, False])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, asked: bool | None) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save({"callback": Path("executed")}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=asked)


def test_the_last_checkpoint_is_written_after_the_best(tmp_path: Path) -> None:
    assert [callback.filename for callback in checkpoints(tmp_path)] == ["best", "last"]  # type: ignore[attr-defined]
