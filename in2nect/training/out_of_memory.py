"""What is said where memory runs out: what was asked for, what is there, and what to lower, the gentlest first."""

from collections.abc import Mapping
from typing import Any

import torch

_WORKER_GONE = ("is killed by signal: Killed", "exited unexpectedly", "insufficient shared memory")
_NO_HOST_MEMORY = "DefaultCPUAllocator"


def out_of_memory(error: BaseException, subcommand: str, config: Mapping[str, Any]) -> str | None:
    """The message for an error that comes from too little memory; None for any other.

    Args:
        error: what a run of `in2nect` ended with.
        subcommand: fit, validate, test or predict.
        config: its settings under dotted names.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{_asked(text)}{_on_the_device()} To make do with less, in this order: {_mends(subcommand, config)}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_HOST_MEMORY in text):
        asked = f": {_first_line(text)}" if text else ""
        return f"the memory of the machine ran out{asked}. To make do with less: {_mends(subcommand, config)}"
    if isinstance(error, RuntimeError) and any(sign in text for sign in _WORKER_GONE):
        shared = " (/dev/shm is full; a container may be given more, with --shm-size)" if "shared" in text else ""
        return (
            f"{_first_line(text)}{shared}. Most likely the memory of the machine ran out (`dmesg` tells). Lower "
            f"data.num_workers (now {config.get('data.num_workers')}): each keeps up to GDAL_CACHEMAX MiB (128) of "
            "decoded blocks and two batches; then data.batch_size"
        )
    return None


def _mends(subcommand: str, config: Mapping[str, Any]) -> str:
    """What to lower, with its present value."""

    def now(name: str) -> str:
        return f"{name} (now {config.get(name)})"

    if subcommand == "predict":
        steps = [now("prediction.batch_size"), now("prediction.window")]
    elif subcommand in ("validate", "test"):
        steps = [now("data.batch_size"), now("data.eval_window")]
    else:
        steps = [f"{now('data.batch_size')}, with {now('trainer.accumulate_grad_batches')} raised as much"]
        if config.get("trainer.precision") in (None, "32", 32, "32-true"):
            steps.append("trainer.precision=bf16-mixed")
        if config.get("model.gradient_checkpointing") is False:
            steps.append("model.gradient_checkpointing=true")
        steps.append(now("data.crop_size"))
    return "; ".join(steps)


def _asked(text: str) -> str:
    """The first sentences of torch's message: what was asked for, and what of it was free."""
    return text.split(" Of the allocated memory")[0].split(" If reserved but")[0].rstrip(". ") + "."


def _on_the_device() -> str:
    if not torch.cuda.is_available():
        return ""
    peak = torch.cuda.max_memory_allocated() / 2**30
    free, total = (value / 2**30 for value in torch.cuda.mem_get_info())
    return f" This process had {peak:.2f} GiB at its peak; {free:.2f} of {total:.2f} GiB are free now."


def _first_line(text: str) -> str:
    return text.splitlines()[0].rstrip(". ")
