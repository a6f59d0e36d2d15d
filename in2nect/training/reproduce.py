"""`python -m in2nect.training.reproduce FILE`: computes the batch again that a training stopped at, and names the first
tensor that is not finite.

Looked at are, in this order, the weights, what each module of the network gives out, the loss terms, and the gradients.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from in2nect.training.module import SegmentationModule

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where something is not finite again, 1 where everything is finite, 2 for a file of another kind."""
    parser = argparse.ArgumentParser(prog="python -m in2nect.training.reproduce", description=__doc__)
    parser.add_argument("file", type=Path, help="OUTPUT/failed_batch.pt")
    parser.add_argument("--device", default="cpu", help="where to compute it; as in training, to draw the same dropout")
    given = parser.parse_args(arguments)
    try:
        module, failed = load(given.file, torch.device(given.device))
    except (OSError, KeyError, RuntimeError) as error:
        print(f"{given.file}: not a batch that a training stopped at: {error}", file=sys.stderr)
        return 2
    place = f"epoch {failed['epoch'] + 1}, batch {failed['batch_idx'] + 1}, process {failed['rank']}"
    print(f"step {failed['step']} ({place})")
    terms, first = reproduce(module, failed)
    for name, value in failed["terms"].items():
        print(f"  {name:<6} {value:.6g} in training, {terms[name]:.6g} here")
    print(f"first not finite: {first or f'nothing on {given.device}; try the --device of the training'}")
    return 0 if first else 1


def load(path: Path, device: torch.device) -> tuple[SegmentationModule, dict[str, Any]]:
    """The network as it was before the step, and the batch.

    Raises:
        OSError, KeyError, RuntimeError: not a file of `failed_batch.save_failed_batch`.
    """
    failed = torch.load(path, map_location="cpu", weights_only=True)["failed_batch"]
    module = SegmentationModule.load_from_checkpoint(path, map_location=device, weights_only=True)
    return module.train(), failed


def reproduce(module: SegmentationModule, failed: dict[str, Any]) -> tuple[dict[str, float], str | None]:
    """The loss terms of the batch, and what is not finite first, in words; None where everything is finite."""
    found = [f"the weight {name}" for name, value in module.named_parameters() if not _finite(value)]
    batch = {name: value.to(module.device) for name, value in failed.items() if isinstance(value, Tensor)}
    torch.manual_seed(failed["seed"])
    with _outputs_watched(module, found), _precision(failed["precision"], module.device):
        output = module.model.forward_training(module.normalise(batch["image"]))
        with torch.autocast(module.device.type, enabled=False):
            total, terms = module._losses(output, batch["label"])
    found += [f"the loss term {name}" for name, value in terms.items() if not _finite(value)]
    if not found:
        total.backward()
        found = [f"the gradient of {name}" for name, value in module.named_parameters() if not _finite(value.grad)]
    return {name: value.item() for name, value in {"total": total, **terms}.items()}, found[0] if found else None


@contextmanager
def _outputs_watched(module: nn.Module, found: list[str]) -> Iterator[None]:
    """Notes the modules that give out something which is not finite, in the order in which they are done."""

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                found.append(f"the output of {name}")

        return hook

    handles = [child.register_forward_hook(watch(name)) for name, child in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _precision(name: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=_AUTOCAST[name]) if name in _AUTOCAST else nullcontext()


def _finite(values: Tensor | None) -> bool:
    return values is None or not values.is_floating_point() or bool(torch.isfinite(values).all())


if __name__ == "__main__":
    sys.exit(main())
