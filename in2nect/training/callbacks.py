"""What surrounds a run: progress on a terminal or in a log, the scores as table and picture, and the
submission to a test server. Nothing here touches the weights.
"""

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from in2nect.files import write_json, write_text
from in2nect.metrics import SegmentationScores
from in2nect.prediction.submission import SubmissionName, check_classes, check_ids, write_submission
from in2nect.report.tables import percent, scores_csv, scores_table
from in2nect.training.module import SegmentationModule

_LINE_SECONDS = 5.0  # between two lines of progress in a log


def progress() -> ProgressBar:
    """A bar where somebody watches it, lines where the output goes to a file or a pipe."""
    return BarProgress() if sys.stdout.isatty() else LineProgress()


def quieten() -> None:
    """Drops messages of Lightning that do not concern who runs a command of ours."""
    for text in (
        "does not have many workers",  # on the few cores of a laptop, workers take time from the training itself
        "LightningCLI's args parameter",  # meant for calls from a program that is itself a command
        "is deprecated, use `isinstance",  # between Lightning and torch
        "Checkpoint directory .* exists and is not empty",  # a resumed run
        "could not find the monitored key",  # a run without validation has no best checkpoint
        "Total length of `list` across ranks is zero",  # nor a loader to validate with
        "It is recommended to use `self.log.*sync_dist=True",  # the scores are of all processes already
    ):
        warnings.filterwarnings("ignore", f".*{text}")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


class BarProgress(RichProgressBar):
    """Lightning's bar with the loss terms under short names, so that they fit a line of a terminal."""

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".3f"))

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        return _terms(super().get_metrics(trainer, pl_module))


class LineProgress(ProgressBar):
    """A line with the loss terms every few seconds."""

    def __init__(self, seconds: float = _LINE_SECONDS) -> None:
        super().__init__()
        self._seconds = seconds
        self._printed = self._started = time.monotonic()
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        return self._enabled

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, *_: Any) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done, total = batch_idx + 1, int(self.total_train_batches)
        if self._due(last=done == total):
            terms = _terms(self.get_metrics(trainer, pl_module))
            text = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
            step = f"step {trainer.global_step}/{trainer.estimated_stepping_batches}"
            self.print(f"epoch {trainer.current_epoch + 1}  {step}  {text}  {time.monotonic() - self._started:.0f} s")

    def on_validation_batch_end(self, trainer: lightning.Trainer, *arguments: Any, **_: Any) -> None:
        self._evaluation("validate", arguments[3], sum(trainer.num_val_batches))

    def on_test_batch_end(self, trainer: lightning.Trainer, *arguments: Any, **_: Any) -> None:
        self._evaluation("test", arguments[3], sum(trainer.num_test_batches))

    def print(self, *text: Any, **options: Any) -> None:
        if self._enabled:
            print(*text, flush=True, **options)

    def _evaluation(self, name: str, batch_idx: int, total: float) -> None:
        if self._due(last=False):
            self.print(f"{name}  batch {batch_idx + 1}/{total}")

    def _due(self, last: bool) -> bool:
        now = time.monotonic()
        if not last and now - self._printed < self._seconds:
            return False
        self._printed = now
        return True


def _terms(metrics: dict[str, Any]) -> dict[str, float]:
    """The loss terms among what Lightning shows: neither the logger's version nor anything else that is no float."""
    return {name.removeprefix("train/"): value for name, value in metrics.items() if isinstance(value, float)}


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in str(record.msg)


class ScoresTable(Callback):
    """At the end of `validate` and `test`: the scores of each class on the console; in metrics_validate.json and .csv,
    or metrics_test.json and .csv; and the confusion matrix in confusion_validate.png or confusion_test.png.
    """

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show(trainer, pl_module, "validate")

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._show(trainer, pl_module, "test")

    def _show(self, trainer: lightning.Trainer, module: lightning.LightningModule, name: str) -> None:
        assert isinstance(module, SegmentationModule) and module.scores is not None
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # every process must ask for it
        if not trainer.is_global_zero:
            return
        from in2nect.report.figures import confusion_figure  # matplotlib, which a training does without

        names, scores = module.classes.names, module.scores
        made: dict[str, Any] = {"protocol": module.protocol}
        if name == "test":
            made |= {"tta": module.tta, "seconds_per_image": module.seconds_per_image}
        table, rows, picture = (
            folder / name for name in (f"metrics_{name}.json", f"metrics_{name}.csv", f"confusion_{name}.png")
        )
        write_json(table, {**made, **scores.to_dict(names)})
        write_text(rows, scores_csv(scores, names))
        confusion_figure(
            picture,
            confusion=scores.confusion.cpu().numpy(),
            names=names,
            title=f"Confusion matrix, {name}",
            subtitle=_in_words(scores, module.protocol),
        )
        Console().print(scores_table(scores, names, f"{name}, %, protocol {module.protocol}"))
        if made.get("seconds_per_image") is not None:
            print(f"{made['seconds_per_image']:.3f} s an image, the network alone (tta {module.tta}, {module.device})")
        for path in (table, rows, picture):
            print(path)


class SubmissionWriter(Callback):
    """After `predict`, the zip of its predictions that a test server takes. Whether the right images are predicted is
    asked before the first of them.
    """

    def __init__(self, name: SubmissionName, output: Path) -> None:
        self.name, self.target = name, output / f"submission_{name}.zip"

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, SegmentationModule)
        check_classes(self.name, pl_module.classes.num_classes)
        check_ids(self.name, [path.stem for path in self._images(trainer)])

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.strategy.barrier()  # the other processes predict into the same folder
        if trainer.is_global_zero:
            assert isinstance(pl_module, SegmentationModule)
            write_submission(
                self.name, [pl_module.prediction_path(path) for path in self._images(trainer)], self.target
            )
            print(self.target)

    @staticmethod
    def _images(trainer: lightning.Trainer) -> list[Path]:
        return [Path(path) for path in trainer.datamodule.predict.paths]  # type: ignore[attr-defined]


def _in_words(scores: SegmentationScores, protocol: str) -> str:
    means = [("mIoU", scores.mean_iou), ("AF", scores.mean_f1), ("OA", scores.overall_accuracy)]
    found = ", ".join(f"{name} {percent(float(value))} %" for name, value in means)
    return f"{found} (protocol {protocol}); {int(scores.confusion.sum()):,} pixels"
