"""A checkpoint that could not be written to its end leaves the one before as it was."""

from pathlib import Path

import pytest
import torch

from in2nect.training.checkpoints import AtomicCheckpointIO


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
