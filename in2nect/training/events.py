"""TensorBoard's curves, which are not worth a training: on a full disk they stop, and the training goes on until it has
a checkpoint to write.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from in2nect.files import disk_error


class EventLogger(TensorBoardLogger):
    """TensorBoard's event files. After the first event that the disk refuses, none is written any more: TensorBoard
    writes them in a thread, which does not outlive it.
    """

    _refused = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._unless_refused(lambda: super(EventLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def save(self) -> None:
        self._unless_refused(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._unless_refused(lambda: super(EventLogger, self).finalize(status))

    def _unless_refused(self, write: Callable[[], Any]) -> None:
        if self._refused:
            return
        try:
            write()
        except (OSError, ValueError) as error:  # Lightning takes any error for that of a value which cannot be shown
            refusal = disk_error(error)
            if refusal is None:
                raise
            self._refused = True
            rank_zero_warn(
                f"{self.log_dir}: TensorBoard's events could not be written: {refusal.strerror}. The training goes on, "
                "and its curves end here"
            )


@contextmanager
def quiet_writer() -> Iterator[None]:
    """Leaves out the traceback of TensorBoard's thread; `EventLogger` tells of the error in its place."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        refused = arguments.exc_value is not None and disk_error(arguments.exc_value) is not None
        if not (refused and type(arguments.thread).__module__.startswith("tensorboard.")):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
