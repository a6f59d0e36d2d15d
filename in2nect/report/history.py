"""Scalars of a run out of its TensorBoard events, over all files of the folder: a resumed run writes a second one."""

import logging
from pathlib import Path


def read_scalars(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """By name, (step, value) in the order of steps; where a step was logged twice (before a kill and after it), the
    later value.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # a second to import

    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(Path(folder).glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            curves.setdefault(name, {}).update((event.step, event.value) for event in events.Scalars(name))
    return {name: sorted(curve.items()) for name, curve in curves.items()}
