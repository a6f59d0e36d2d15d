"""Export of a host network for inference, by torch.export: a graph without auxiliary head, tap or losses."""

from copy import deepcopy
from os import PathLike

import torch
from torch.export import Dim, ExportedProgram

from in2nect.files import replacing
from in2nect.models.gradient_checkpointing import checkpoint_blocks
from in2nect.models.registry import SegmentationModel


def export_program(model: SegmentationModel, size: tuple[int, int]) -> ExportedProgram:
    """The network in eval mode as a graph: normalised images (B, C, height, width) to logits (B, K, height, width).

    B is free; the size is fixed. What only training needs (``model.training_only``) is left out. The model itself stays
    as it is, taps included.

    Raises:
        ValueError: a size that is no multiple of ``model.size_multiple``.
    """
    if any(side < 1 or side % model.size_multiple for side in size):
        raise ValueError(f"size is {size}; expected positive multiples of {model.size_multiple}")
    inference = deepcopy(model).eval().requires_grad_(False)  # a copy is not tapped
    checkpoint_blocks(inference, False)
    for name in inference.training_only:
        parent, _, leaf = name.rpartition(".")
        setattr(inference.get_submodule(parent), leaf, None)
    first = next(inference.parameters())
    images = torch.zeros(2, len(model.input_mean), *size, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        return torch.export.export(inference, (images,), dynamic_shapes=({0: Dim("batch")},))


def export_model(model: SegmentationModel, path: str | PathLike[str], size: tuple[int, int]) -> None:
    """Write ``export_program`` to a .pt2 file, which ``torch.export.load(path).module()`` runs without this package."""
    with replacing(path) as temporary:
        torch.export.save(export_program(model, size), temporary)
