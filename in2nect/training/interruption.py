"""A training that is told to stop (SIGTERM, or Ctrl-C) does so behind its current step, with last.ckpt written, and
goes on from there, on a CPU bit for bit.

Lightning's own handler stops too, but saves nothing; and each process stops by itself, while the others wait for it.
Here the processes agree first, which costs them one reduction of a number a step.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from in2nect.training.checkpoints import goes_on_exactly, mark_pending_validation, trains_on
from in2nect.training.failures import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# `timeout`, torchrun and others signal a process and then its group, so that one stop may arrive twice.
_SAME_STOP_SECONDS = 1.0


class StopOnSignal(Callback):
    """Stops a training behind the step in which the first signal arrives; a second one, over a second later, kills it.

    Args:
        target: the checkpoint to write; None where the run keeps none.
    """

    def __init__(self, target: Path | None) -> None:
        self.target = target
        self._asked: signal.Signals | None = None
        self._asked_at = 0.0
        self._trains = False

    @contextmanager
    def listening(self, trainer: lightning.Trainer) -> Iterator[None]:
        """Handles the signals while `trainer` fits."""
        self._trainer = trainer
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._listen()
        try:
            yield
        finally:
            if _is_main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._listen()  # again: Lightning has put its own handler in front
        self._trains = True

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._agreed(trainer):  # the last epoch's end has written the checkpoint
            raise self._stopped(trainer)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trains_on(trainer):  # else it stops there, so that the resumed run leaves nothing out
            self._save_and_stop(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save_and_stop(trainer)

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._save_and_stop(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mark_pending_validation(trainer, checkpoint)

    def _save_and_stop(self, trainer: lightning.Trainer) -> None:
        if not goes_on_exactly(trainer) or not self._agreed(trainer):
            return
        if self.target is not None:
            trainer.save_checkpoint(self.target, weights_only=False)
        raise self._stopped(trainer)

    def _agreed(self, trainer: lightning.Trainer) -> bool:
        """Whether any process was told to stop; all of them hear the same."""
        return trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False)

    def _stopped(self, trainer: lightning.Trainer) -> Stopped:
        name = self._asked.name if self._asked is not None else "a signal to another process"
        step = trainer.global_step
        when = f"after step {step} (epoch {trainer.current_epoch + 1})" if step else "before the first step"
        kept = self.target if self.target is not None and self.target.is_file() else None
        return Stopped(name, when, kept)

    def _listen(self) -> None:
        if _is_main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked, self._asked_at = signal.Signals(number), now
            if not self._trains:
                self._kill_children()
                raise self._stopped(self._trainer)
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{self._asked.name}: stopping behind this step; once more stops at once\n".encode())
        elif now - self._asked_at > _SAME_STOP_SECONDS:
            self._kill_children()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _kill_children(self) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGKILL)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
