"""Checkpoints: which ones a run keeps, when, how they reach the disk (under a temporary name beside them, then
renamed), and the model files that are made of them.

(Lightning's own writer renames out of the system's temporary folder, which on another file system is a copy that a kill
can cut short.)
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from in2nect.data.classes import Classes
from in2nect.files import disk_error, replacing
from in2nect.models.files import SUFFIX, ModelDescription, save_model
from in2nect.models.pretrained import UNREADABLE
from in2nect.training.failures import TrainingFailure

_BEST = "best"
_NAMING: dict[str, Any] = {"enable_version_counter": False, "auto_insert_metric_name": False}


def checkpoints(folder: Path, every: int = 0) -> list[Callback]:
    """Both checkpoints of a run. best.ckpt comes first: last.ckpt then holds what is known of the best one after the
    same epoch, and not of the epoch before.

    Args:
        every: steps after which last.ckpt is also written within an epoch; 0 for never.
    """
    within = [StepCheckpoint(dirpath=folder, filename="last", every_n_train_steps=every, **_NAMING)] if every else []
    return [best_checkpoint(folder), last_checkpoint(folder), *within]


def best_checkpoint(folder: Path) -> Callback:
    """best.ckpt by validation mIoU, and of it best.safetensors; nothing is written where there is no validation."""
    return _checkpoint(folder, _BEST, monitor="val/mean_iou", mode="max")


def last_checkpoint(folder: Path) -> Callback:
    """last.ckpt after every epoch, to resume from."""
    return _checkpoint(folder, "last", save_on_train_epoch_end=True)


class StepCheckpoint(ModelCheckpoint):
    """A checkpoint after every so many steps. Where a validation follows the step, it is written as that begins, and
    says that it is still to come; an epoch that ends without one writes its own.
    """

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any, **options: Any) -> None:
        if goes_on_exactly(trainer) and trains_on(trainer):
            super().on_train_batch_end(trainer, *arguments, **options)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if goes_on_exactly(trainer):
            super().on_train_batch_end(trainer, pl_module, None, None, 0)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mark_pending_validation(trainer, checkpoint)


def goes_on_exactly(trainer: lightning.Trainer) -> bool:
    """Whether a checkpoint of this moment is one that a resumed run goes on from as if it had not been broken off.

    Not so among the batches that are accumulated into a step, whose gradients no checkpoint holds; nor after the last
    step of trainer.max_steps, where Lightning leaves out the validation that is still to come; nor at the end of a
    validation, whose scores no checkpoint holds.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or trainer.global_step == trainer.max_steps:
        return False
    validated = trainer.validating and loop.val_loop.batch_progress.is_last_batch
    return not validated and not loop._should_accumulate()


def trains_on(trainer: lightning.Trainer) -> bool:
    """At the end of a training batch: whether another follows, with neither a validation nor an epoch's end between."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return not loop.batch_progress.is_last_batch and not loop._should_check_val_fx(fetcher)


def mark_pending_validation(trainer: lightning.Trainer, checkpoint: dict[str, Any]) -> None:
    """Has a run that is resumed from a checkpoint written within a validation begin with this validation, all of it.

    (Lightning goes back into a validation that was broken off in a batch, behind the batches before it. Their scores
    are lost; so the checkpoint says that it was the first batch.)
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    if not trainer.validating or progress.is_last_batch:
        return
    stored = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    before = progress.total.completed - progress.current.completed
    for counts, done in ((stored["total"], before), (stored["current"], 0)):
        counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically; with best.ckpt the model file best.safetensors."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint, or leaves the one that is there as it is.

        Raises:
            TrainingFailure: the disk refuses it.
        """
        try:
            # A file of Python's own: into a path torch writes by itself, and does not say why it could not.
            with replacing(path) as partial, open(partial, "wb") as file:
                torch.save(checkpoint, file)
            # A kill in between leaves the earlier model file; last.ckpt is older too then, and a resume writes both.
            if Path(path).name == f"{_BEST}.ckpt":
                save_model(Path(path).with_suffix(SUFFIX), *model_of(checkpoint))
        except (OSError, RuntimeError) as error:
            refusal = disk_error(error)
            if refusal is None:
                raise
            raise TrainingFailure(_refused(Path(path), checkpoint, refusal)) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Plain values and tensors alone, whatever is asked for: reading a file must not run what it holds."""
        return super().load_checkpoint(path, map_location, weights_only=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run; its tensors are read from the disk when they are used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of in2nect, or one that was cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; a run writes them to OUTPUT/checkpoints")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes): another kind of file than the checkpoint of a run, or one that "
            "was cut short or damaged"
        ) from error
    if not isinstance(checkpoint, dict) or not {"classes", "hyper_parameters", "state_dict"} <= checkpoint.keys():
        raise ValueError(f"{path}: holds no classes and settings; it is no checkpoint that `in2nect fit` wrote")
    return checkpoint


def model_of(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], ModelDescription]:
    """What a model file holds of a checkpoint: the weights of the network, as evaluated, and their description."""
    settings, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    prefix = "model."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    bands = checkpoint.get("bands")
    description = ModelDescription(
        network=settings["network"],
        classes=classes_of(checkpoint),
        mean=_decimals(state["input_mean"]),
        std=_decimals(state["input_std"]),
        encoder=settings["encoder"],
        bands=None if bands is None else tuple(bands),
        metrics=checkpoint.get("metrics"),
    )
    return weights, description


def classes_of(checkpoint: Mapping[str, Any]) -> Classes:
    """The classes that the network of a checkpoint tells apart."""
    stored = checkpoint["classes"]
    colors = tuple((red, green, blue) for red, green, blue in stored["colors"])
    return Classes(tuple(stored["names"]), colors, stored["ignore_index"])


def _decimals(values: Tensor) -> tuple[float, ...]:
    """float32 values as the shortest decimals that become the same float32 again: 0.485, not 0.48500001430511475."""
    return tuple(float(str(value)) for value in values.flatten().cpu().numpy())


def _checkpoint(folder: Path, name: str, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename=name, **_NAMING, **options)


def _refused(path: Path, checkpoint: dict[str, Any], refusal: OSError) -> str:
    size, free = sum(_tensor_sizes(checkpoint)), shutil.disk_usage(_existing(path)).free
    good = _newest(path.parent)
    if good is None:
        kept = "No checkpoint was written before it"
        mend = "train again, if need be into another --output"
    else:
        kept = "The last good checkpoint is {} of step {}".format(*good)
        mend = f"go on with --ckpt_path {good[0]}"
    return (
        f"{path}: the checkpoint of step {checkpoint.get('global_step')} could not be written: {refusal.strerror}. It "
        f"takes {_megabytes(size)}, beside the one it replaces, and {_megabytes(free)} are free there. {kept}. Make "
        f"room, then {mend}"
    )


def _newest(folder: Path) -> tuple[Path, int] | None:
    """The checkpoint of the latest step in a folder, and the step."""
    steps = {
        path: int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
        for path in (folder / "last.ckpt", folder / "best.ckpt")
        if path.is_file()
    }
    return max(steps.items(), key=lambda item: item[1], default=None)


def _tensor_sizes(values: Any) -> Iterator[int]:
    if isinstance(values, torch.Tensor):
        yield values.nbytes
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensor_sizes(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensor_sizes(value)


def _existing(path: Path) -> Path:
    """The innermost folder around a path that is there."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
