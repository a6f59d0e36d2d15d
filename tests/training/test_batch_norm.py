"""BatchNorm over several processes: every layer is converted, keeps its activation and its numbers, and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from in2nect.training.batch_norm import SyncBatchNorm
from in2nect.training.cli import main


@pytest.mark.parametrize("encoder", ["test_efficientnet", "resnet10t"])
def test_layers_are_converted_with_their_activation_and_back(encoder: str) -> None:
    """test_efficientnet norms and activates in one layer, resnet10t in two. One process: there is nothing to share, and
    both forms give the same."""
    model = timm.create_model(encoder).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        norms = sum(isinstance(part, _BatchNorm) for part in model.modules())
        assert norms
        layer = SyncBatchNorm()
        model = layer.apply(model)
        assert sum(isinstance(part, nn.SyncBatchNorm) for part in model.modules()) == norms
        assert torch.equal(model(images), expected)
        for part in model.modules():
            if isinstance(part, nn.SyncBatchNorm):
                part._buffers["running_mean"] = part.running_mean + 1  # as by a move to another device
        moved = model(images)
        model = layer.revert(model)
        assert not any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())
        torch.testing.assert_close(model(images), moved)
    assert not torch.allclose(moved, expected)


def test_the_command_line_takes_it(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SyncBatchNorm] = []
    monkeypatch.setattr("in2nect.training.lightning_cli.SyncBatchNorm", lambda: made.append(SyncBatchNorm()) or made[0])
    explained = ["--explain", "--model.encoder=test_efficientnet", "--trainer.accelerator=cpu", "--data.crop_size=64"]
    fit = ["fit", f"--data.root={dataset}", f"--output={tmp_path}", "--trainer.max_epochs=1", *explained]
    taken = []
    monkeypatch.setattr("in2nect.training.explain.explain", lambda trainer, *_, **__: taken.append(trainer))
    for options in ([], ["--trainer.sync_batchnorm=true", "--trainer.devices=2"]):
        assert main([*fit, *options]) == 0
    assert [trainer.strategy._layer_sync for trainer in taken if hasattr(trainer.strategy, "_layer_sync")] == made
    assert len(made) == 1 and len(taken) == 2


def test_torchs_own_conversion_takes_activations_away() -> None:
    """Why there is one of our own; should it fail, Lightning's may do."""
    model = timm.create_model("test_efficientnet").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        assert not torch.allclose(nn.SyncBatchNorm.convert_sync_batchnorm(model)(images), expected)
