"""A checkpoint that could not be written to its end leaves the one before as it was."""

import pickle
from pathlib import Path

import pytest
import torch

from in2nect.training.checkpoints import AtomicCheckpointIO, checkpoints


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


@pytest.mark.parametrize("asked", [None, False])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, asked: bool | None) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save({"callback": Path("executed")}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=asked)


def test_the_last_checkpoint_is_written_after_the_best(tmp_path: Path) -> None:
    assert [callback.filename for callback in checkpoints(tmp_path)] == ["best", "last"]  # type: ignore[attr-defined]
