"""Seconds that a network takes an image, over all windows and views of it, on one process or several."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class ImageTimer:
    """Adds up the time of forward passes, and the images that they belong to.

    The queue of a CUDA device is drained before the clock is read; reading, scoring and writing stay outside. Over
    several processes, seconds and images are those of all of them.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._images: set[str] = set()

    @contextmanager
    def timed(self, images: Iterable[str], device: torch.device) -> Iterator[None]:
        """Adds the time that the body takes on `device`, for windows of the images of these names."""
        _drain(device)
        started = time.perf_counter()
        yield
        _drain(device)
        self._seconds += time.perf_counter() - started
        self._images.update(images)

    def seconds_per_image(self) -> float | None:
        """The mean since the last call, and starts anew; None where nothing was timed. Every process must call it."""
        gathered: list[tuple[float, set[str]]] = [(self._seconds, self._images)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, (self._seconds, self._images))
        self._seconds, self._images = 0.0, set()
        images = set().union(*(names for _, names in gathered))
        return sum(seconds for seconds, _ in gathered) / len(images) if images else None


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
