"""Every way to draw crops sees class codes, whatever the label files hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data import trees
from tests.data.test_datasets import module


@pytest.mark.parametrize("name", ["loveda", "potsdam"])
@pytest.mark.parametrize("sampling", ["balanced", "dominance", "uniform"])
def test_crops_hold_class_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sampling: str) -> None:
    monkeypatch.setenv("IN2NECT_CACHE", str(tmp_path / "cache"))
    root = {"loveda": trees.loveda, "potsdam": trees.potsdam}[name](tmp_path / name).root
    batches = module(root, name, sampling=sampling).train_dataloader()
    codes = {code for batch in batches for code in batch["label"].unique().tolist()}
    assert codes <= {*range(7 if name == "loveda" else 6), 255}
    assert codes - {255}
