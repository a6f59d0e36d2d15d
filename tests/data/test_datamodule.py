"""FolderDataModule: batches that workers do not change, evaluation that counts pixels once, rasters to predict."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from in2nect.data.crops import Augmentations
from in2nect.training.checkpoints import StepCheckpoint
from in2nect.training.datamodule import FolderDataModule

SIZES = [(140, 150), (90, 70), (80, 130), (64, 64), (40, 50)]
SPLITS = ["train", "train", "val", "test", "test"]


@pytest.fixture
def root(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IN2NECT_CACHE", str(tmp_path / "cache"))
    return make_folder(SIZES, SPLITS)


def module(root: Path, stage: str = "fit", **options: Any) -> FolderDataModule:
    defaults = {"batch_size": 4, "crop_size": 48, "samples_per_epoch": 10, "eval_window": 64, "eval_overlap": 8}
    data = FolderDataModule(root, **{**defaults, **options})
    data.setup(stage)
    return data


def epoch_of(data: FolderDataModule, epoch: int) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    pairs = [(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in ("image", "label", "window")]
    return all(torch.equal(a, b) for a, b in pairs)


def test_training_batches(root: Path) -> None:
    batches = epoch_of(module(root), 0)
    assert [batch["image"].shape for batch in batches] == [(4, 3, 48, 48)] * 2
    assert batches[0]["label"].shape == (4, 48, 48)
    assert not same(batches[:1], batches[1:])


@pytest.mark.parametrize("sampling", ["uniform", "balanced", "dominance"])
def test_batches_do_not_depend_on_workers(root: Path, sampling: Any) -> None:
    """The handles opened before the workers are forked must not be shared with them either."""
    changes = Augmentations(rotation=20.0, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
    data = module(root, sampling=sampling, augmentations=changes)
    alone = [epoch_of(data, epoch) for epoch in (0, 1)]
    assert not same(alone[0], alone[1])
    for workers in (1, 4):
        data.num_workers = workers
        loader = data.train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            assert same(list(loader), alone[epoch])


def test_a_later_epoch_needs_no_earlier_one(root: Path) -> None:
    data = module(root)
    for epoch in range(4):
        last = epoch_of(data, epoch)
    assert same(epoch_of(module(root), 3), last)
    assert not same(epoch_of(module(root, seed=1), 3), last)


def test_length_of_an_epoch(root: Path) -> None:
    assert len(module(root, samples_per_epoch=None, batch_size=2).train) == round((140 * 150 + 90 * 70) / 48**2)
    assert len(module(root, samples_per_epoch=None, crop_size=512).train) == 4
    with pytest.raises(ValueError, match="samples_per_epoch: 3; expected at least one batch on every device, 4"):
        module(root, samples_per_epoch=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_counts_every_pixel_once(root: Path, workers: int) -> None:
    data = module(root, "test", num_workers=workers)
    batches = list(data.test_dataloader())
    assert {tuple(batch["image"].shape[2:]) for batch in batches} == {(64, 64), (40, 50)}
    assert sum(int((batch["label"] != 255).sum()) for batch in batches) == 64 * 64 + 40 * 50
    data.setup("validate")
    assert sum(int((batch["label"] != 255).sum()) for batch in data.val_dataloader()) == 80 * 130


def test_classes_come_from_the_root_or_from_a_file(root: Path, tmp_path: Path) -> None:
    assert module(root).classes.names == ("land", "water", "wood")
    other = tmp_path / "other.yaml"
    (root / "classes.yaml").rename(other)
    assert FolderDataModule(root, classes=other).classes.num_classes == 3
    with pytest.raises(FileNotFoundError, match=r"classes\.yaml: missing, .* set `classes` to a YAML"):
        FolderDataModule(root).classes  # noqa: B018 - read when they are asked for


def test_predicting_given_rasters_needs_no_data_set(root: Path) -> None:
    image = root / "images" / "part0.tif"
    data = FolderDataModule(predict_images=str(image))
    data.setup("predict")
    assert [item["path"] for item in data.predict_dataloader()] == [str(image)]
    with pytest.raises(ValueError, match=r"data\.root is not given; set it to a folder"):
        data.setup("test")


def test_training_without_a_validation_split_says_so(root: Path) -> None:
    table = root / "split.csv"
    table.write_text(table.read_text().replace(",val", ",test"))
    with pytest.warns(UserWarning, match=r"no image in split 'val': the training is not validated .* use last\.ckpt"):
        data = module(root)
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="no image in split 'val'"):
        module(root, "validate")


def test_rasters_to_predict(root: Path) -> None:
    image = root / "images" / "part0.tif"

    def paths(given: Any) -> list[str]:
        return [item["path"] for item in module(root, "predict", predict_images=given).predict_dataloader()]

    assert paths(None) == [str(root / "images" / f"part{number}.tif") for number in (3, 4)]
    assert paths(str(image)) == paths([str(image)]) == paths(image) == [str(image)]
    assert len(paths(root / "images")) == 5
    with pytest.raises(FileNotFoundError, match=r"predict_images: nowhere\.tif: no such file; give a raster, a folder"):
        paths(["nowhere.tif"])
    with pytest.raises(FileNotFoundError, match="an empty list"):
        paths([])
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match=r"predict_images: .* holds no raster"):
        paths(root / "empty")


class Recorder(lightning.LightningModule):
    """Notes the windows of the batches that a trainer hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[tuple[str, list[int]]]] = []
        self.scored = 0

    def training_step(self, batch: dict[str, Any], number: int) -> Tensor:
        if number == 0:
            self.seen.append([])
        self.seen[-1] += zip(batch["name"], batch["window"].tolist(), strict=True)
        return self.weight * 0

    def validation_step(self, batch: dict[str, Any], number: int) -> None:
        self.scored += int((batch["label"] != 255).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Flat(Recorder):
    """Notes every batch by itself, with its epoch and its number."""

    def training_step(self, batch: dict[str, Any], number: int) -> Tensor:
        self.batches.append((self.current_epoch, number, batch["window"].tolist()))
        return self.weight * 0

    def on_fit_start(self) -> None:
        self.batches: list[tuple[int, int, list[list[int]]]] = []


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 9}], ids=["epochs", "steps"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_after_any_step_goes_on_with_the_next_batch(
    root: Path, tmp_path: Path, length: dict[str, int], workers: int
) -> None:
    """Three batches an epoch, so that checkpoints within it, and before and behind its end, are all met."""

    def fit(checkpoint: Path | None = None) -> tuple[list[Any], int]:
        recorder = Flat()
        every = StepCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        ends = ModelCheckpoint(tmp_path / "epochs", filename="{step}", save_on_train_epoch_end=True, save_top_k=-1)
        trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[] if checkpoint else [every, ends],
            enable_checkpointing=checkpoint is None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **length,
        )
        data = module(root, samples_per_epoch=7, batch_size=2, num_workers=workers)
        trainer.fit(recorder, data, ckpt_path=checkpoint)
        return recorder.batches, recorder.scored

    whole, scored = fit()
    assert [batch[:2] for batch in whole] == list(itertools.product(range(3), range(3)))
    within = sorted((tmp_path / "steps").iterdir())
    last = 9 if "max_steps" not in length else 8  # none with a validation to come where Lightning would leave it out
    assert [path.stem for path in within] == [f"step={step}" for step in range(1, last + 1)]
    for path in [*within, *sorted((tmp_path / "epochs").iterdir())[:2]]:
        batches, validated = fit(path)
        done = int(path.stem.removeprefix("step="))
        assert batches == whole[done:], path
        before = (done - 1) // 3 if path in within else done // 3  # one within is written as its validation begins
        assert validated == scored - before * (80 * 130), path


def test_lightning_moves_through_the_epochs_and_resumes(root: Path, tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[Recorder, lightning.Trainer]:
        recorder = Recorder()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        data = FolderDataModule(root, batch_size=4, crop_size=48, samples_per_epoch=8, eval_window=64, eval_overlap=8)
        trainer.fit(recorder, data, ckpt_path=checkpoint)
        return recorder, trainer

    through, _ = fit(3)
    assert all(a != b for a, b in itertools.combinations(through.seen, 2))
    assert through.scored == 3 * 80 * 130
    _, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(3, tmp_path / "two.ckpt")
    assert resumed.seen == through.seen[2:]
