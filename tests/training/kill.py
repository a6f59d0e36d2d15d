"""Callbacks that are given to the command line by their import path, and do to a training what may happen to one.
Places are given as hook, epoch and batch, the last two counted from 0.
"""

import multiprocessing
import os
import resource
import signal
import time
import zlib
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback


class KillAt(Callback):
    """SIGKILL before a batch of an epoch (both counted from 0)."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            os.kill(os.getpid(), signal.SIGKILL)


class Batches(Callback):
    """Writes a line for every training batch into a file: epoch, batch, and a checksum of its crops."""

    def __init__(self, target: str) -> None:
        self.target = target

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with open(self.target, "a") as file:
            file.write(f"{trainer.current_epoch} {batch_idx} {zlib.crc32(batch['image'].numpy().tobytes())}\n")


class Diary(Callback):
    """Writes down what a training does, in order: each batch with a checksum of its crops, each validation with its
    score and the step under which it is logged.
    """

    def __init__(self, target: str) -> None:
        self.target = target

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._write(f"batch {trainer.current_epoch} {batch_idx} {zlib.crc32(batch['image'].numpy().tobytes())}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._write(f"validation {trainer.global_step} {logged} {pl_module.scores.mean_iou.item()}")

    def _write(self, line: str) -> None:
        with open(self.target, "a") as file:
            file.write(f"{line}\n")


class SignalAt(Callback):
    """Signals a place: train, validation or epoch_end.

    Args:
        to: process, the process; group, its group and so its workers too; twice, the process now and 1.5 s later.
        rank: the process of several that does it.
    """

    def __init__(
        self, hook: str, epoch: int, batch: int = 0, name: str = "SIGTERM", to: str = "process", rank: int = 0
    ) -> None:
        self.hook, self.epoch, self.batch, self.number = hook, epoch, batch, signal.Signals[name]
        self.to, self.rank = to, rank

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._at("setup", trainer, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._at("train", trainer, batch_idx)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._at("validation", trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._at("epoch_end", trainer, 0)

    def _at(self, hook: str, trainer: Any, batch: int) -> None:
        if (hook, trainer.current_epoch, batch, trainer.global_rank) != (self.hook, self.epoch, self.batch, self.rank):
            return
        if self.to == "group":
            os.killpg(os.getpgrp(), self.number)
            return
        os.kill(os.getpid(), self.number)
        if self.to == "twice":
            os.kill(os.getpid(), self.number)  # at once: the same stop
            time.sleep(1.5)
            os.kill(os.getpid(), self.number)


class SmallFiles(Callback):
    """From an epoch on, no file may be larger than `most` bytes: the kernel refuses what lies beyond, as on a full
    disk.
    """

    def __init__(self, epoch: int, most: int) -> None:
        self.epoch, self.most = epoch, most

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, self.most))


class PoisonAt(Callback):
    """Before a step, in one process of several, sets a weight to `value`, or has its gradient become so."""

    def __init__(self, step: int, weight: str, value: float, gradient: bool = False, rank: int = 0) -> None:
        self.step, self.weight, self.value, self.gradient, self.rank = step, weight, value, gradient, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_step, trainer.global_rank) != (self.step, self.rank):
            return
        parameter = pl_module.get_parameter(self.weight)
        if self.gradient:
            parameter.register_hook(lambda gradient: torch.full_like(gradient, self.value))
        else:
            with torch.no_grad():
                parameter.view(-1)[0] = self.value


TEXTS = {
    "device": "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.00 GiB of which 1.21 "
    "GiB is free. Of the allocated memory 70 GiB is allocated by PyTorch. If reserved but unallocated memory is large",
    "host": "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 9000000000 bytes. Error code 12 (Cannot allocate memory)",
}


class RaiseAt(Callback):
    """After the first step, an error of torch: no memory on the device, or no memory of the host."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            raise (torch.OutOfMemoryError if self.kind == "device" else RuntimeError)(TEXTS[self.kind])


class KillWorker(Callback):
    """Before the second batch, SIGKILL to a process that reads ahead, as the kernel does where memory runs out."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)  # type: ignore[arg-type]
            time.sleep(1)
