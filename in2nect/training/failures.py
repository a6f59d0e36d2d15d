"""What ends a training that was set up rightly: a checkpoint that the disk refuses, memory that runs out, a stop that
was asked for. Standard library alone, so that the command line can tell them apart without loading the pipeline.
"""

from pathlib import Path


class TrainingFailure(Exception):
    """A run that could not go on, told in one message; the command exits with 1."""


class Stopped(BaseException):
    """A signal asked the training to stop, and it did.

    A BaseException, so that nothing on its way up takes it for an error.

    Attributes:
        signal: name of the signal.
        when: the step, in words.
        checkpoint: what a resume goes on from; None where there is nothing to go on from.
    """

    def __init__(self, signal: str, when: str, checkpoint: Path | None) -> None:
        super().__init__(f"{signal} {when}")
        self.signal, self.when, self.checkpoint = signal, when, checkpoint
