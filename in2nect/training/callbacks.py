"""What surrounds a run: progress on a terminal or in a log, and the table of scores. Nothing here
touches the weights.
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

from in2nect.files import write_json
from in2nect.report.tables import scores_table
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
    """At the end of `validate` and `test`: the scores of each class on the console, and in metrics_validate.json or
    metrics_test.json.
    """

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show(trainer, pl_module, "validate")

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._show(trainer, pl_module, "test")

    def _show(self, trainer: lightning.Trainer, module: lightning.LightningModule, name: str) -> None:
        assert isinstance(module, SegmentationModule) and module.scores is not None
        if not trainer.is_global_zero:
            return
        names = module.classes.names
        target = Path(trainer.log_dir or trainer.default_root_dir) / f"metrics_{name}.json"
        write_json(target, module.scores.to_dict(names))
        Console().print(scores_table(module.scores, names, f"{name}, %"))
        print(f"{target}")
