"""Class codes of a whole raster by overlapping windows, blended with a raised-cosine weight, written to a GeoTIFF as
they are finished.

One row of windows is held at a time: K x window x (width of the raster) float32 values, whatever the raster's height
(7 classes, window 512, 50,000 pixels wide: 0.7 GB). Windows are shifted back at the edge instead of padded, so no
network input is ever made up, but for networks that take certain sizes alone (`sizes.any_size`).
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
import torch
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.windows import Window
from torch import Tensor

from in2nect.data.classes import Classes
from in2nect.data.windows import axis_spans, open_raster, transform_of
from in2nect.files import replacing
from in2nect.prediction.augmentation import AugmentationName, Model, class_probabilities, views

_BLOCK = 256  # side of a GeoTIFF tile in pixels: the customary size for cloud-optimised readers


def predict_raster(
    model: Model,
    source: str | Path,
    target: str | Path,
    *,
    classes: Classes,
    window: int = 512,
    overlap: int = 128,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    bands: Sequence[int] | None = None,
    colour_png: bool = False,
    tta: AugmentationName = "none",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Predicts every pixel of a raster and writes the class codes as a tiled, compressed GeoTIFF with the source's
    CRS and transform, or its ground control points.

    Pixels that are nodata in the source (nodata value, alpha or mask) become `classes.ignore_index`, which is the
    target's nodata value.

    Args:
        model: (B, C, H, W) uint8 windows on `device` to (B, K, H, W) logits; called without gradients. The sides of a
            window are `window` or, where it is smaller, the raster's; a network that takes certain sizes alone is
            wrapped in `sizes.any_size`.
        source: a raster of uint8 bands that rasterio can open, with or without a CRS, of any size.
        target: the GeoTIFF to write; an existing file is replaced once the new one is complete.
        classes: names, colours (the target's palette) and `ignore_index`.
        window: side of a window in pixels; a smaller raster is predicted as it is.
        overlap: pixels that neighbouring windows share, over which they are blended; below `window`.
        batch_size: windows a call of the model.
        device: where windows are sent.
        bands: 1-based bands to read, in the model's channel order; None for all.
        colour_png: also write `target` with the suffix .png, in the classes' colours.
        tta: test-time augmentation of every window: none, flips, or paper (flips and scales).
        progress: called with (finished, total) rows of windows.

    Returns:
        The path of the GeoTIFF.

    Raises:
        ValueError: an overlap outside 0..window-1, an unknown `tta`, bands that are not uint8, source and target that
            are the same file, or logits of another shape than expected.
        OSError: the source cannot be read, naming it.
    """
    views(tta)  # a name that is wrong is told before anything is opened
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is both source and target; give another output folder")
    with _quiet_without_crs(), open_raster(source) as raster, replacing(target) as partial:
        bands = tuple(bands or raster.indexes)
        _check_bands(raster, bands)
        with rasterio.open(partial, "w", **_profile(raster, classes)) as output:
            output.write_colormap(1, _palette(classes))
            for row, codes in _bands_of_codes(
                model, raster, bands, classes.num_classes, tta, window, overlap, batch_size, device, progress
            ):
                rows = Window(0, row, raster.width, len(codes))
                with _naming(raster):
                    codes[raster.dataset_mask(window=rows) == 0] = classes.ignore_index
                output.write(codes, 1, window=rows)
    if colour_png:
        _write_png(target)
    return target


def blend_weight(height: int, width: int, overlap: int) -> Tensor:
    """(height, width) float32 weights: 1 in the middle, falling to nearly 0 at the rim along half a period of a
    cosine; positive everywhere.
    """
    return torch.outer(_ramp(height, overlap), _ramp(width, overlap))


def _ramp(size: int, overlap: int) -> Tensor:
    distance = torch.arange(size, dtype=torch.float64) + 0.5
    distance = torch.minimum(distance, size - distance).clamp(max=max(overlap, 1))
    rising = (1 - torch.cos(math.pi * distance / overlap)) / 2 if overlap else torch.ones_like(distance)
    return rising.float()


def _bands_of_codes(
    model: Model,
    raster: DatasetReader,
    bands: tuple[int, ...],
    num_classes: int,
    tta: AugmentationName,
    window: int,
    overlap: int,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, uint8 codes (rows, width)) of consecutive bands of rows, from top to bottom."""
    rows = [span.start for span in axis_spans(raster.height, window, overlap)]
    columns = [span.start for span in axis_spans(raster.width, window, overlap)]
    height, width = min(window, raster.height), min(window, raster.width)
    weight = blend_weight(height, width, overlap).to(device)
    scores = torch.zeros(num_classes, height, raster.width)
    for index, (row, following) in enumerate(pairwise([*rows, raster.height])):
        for first in range(0, len(columns), batch_size):
            group = columns[first : first + batch_size]
            with _naming(raster):
                windows = [raster.read(bands, window=Window(column, row, width, height)) for column in group]
            images = torch.from_numpy(np.stack(windows)).to(device)
            blended = (_probabilities(model, images, num_classes, tta) * weight).cpu()
            for column, part in zip(group, blended, strict=True):
                scores[:, :, column : column + width] += part
        finished = following - row  # rows that no later window touches
        yield row, scores[:, :finished].argmax(0).to(torch.uint8).numpy()
        # argmax needs no division by the sum of weights: it is the same for every class of a pixel.
        scores[:, : height - finished] = scores[:, finished:].clone()
        scores[:, height - finished :] = 0
        if progress is not None:
            progress(index + 1, len(rows))


@torch.inference_mode()
def _probabilities(model: Model, images: Tensor, num_classes: int, tta: AugmentationName) -> Tensor:
    return class_probabilities(model, images, num_classes, tta)


@contextmanager
def _naming(raster: DatasetReader) -> Iterator[None]:
    """Errors of reading with the file's name, which rasterio leaves out."""
    try:
        yield
    except RasterioIOError as error:
        raise OSError(
            f"{raster.name}: cannot be read to its end ({error.__cause__ or error}); fetch it anew, or take it out"
        ) from error


def _check_bands(raster: DatasetReader, bands: tuple[int, ...]) -> None:
    missing = [band for band in bands if band not in raster.indexes]
    if missing:
        raise ValueError(f"{raster.name} has {raster.count} bands, and band {missing[0]} was asked for")
    types = {raster.dtypes[band - 1] for band in bands}
    if types != {"uint8"}:
        raise ValueError(
            f"{raster.name} holds {', '.join(sorted(types))}; expected uint8 bands. "
            "Rescale it to 0..255 as the training images were"
        )


def _profile(raster: DatasetReader, classes: Classes) -> dict[str, object]:
    return {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 1,
        "width": raster.width,
        "height": raster.height,
        **_georeference(raster),
        "nodata": classes.ignore_index,
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        "compress": "deflate",
        "bigtiff": "if_safer",
    }


def _georeference(raster: DatasetReader) -> dict[str, object]:
    points, system = raster.gcps
    return {"gcps": points, "crs": system} if points else {"crs": raster.crs, "transform": transform_of(raster.name)}


def _palette(classes: Classes) -> dict[int, tuple[int, int, int]]:
    return {**dict(enumerate(classes.colors)), classes.ignore_index: (0, 0, 0)}


def _write_png(codes: Path) -> None:
    """GDAL copies block by block and keeps the palette; without PAM there is no .aux.xml beside the picture."""
    with _quiet_without_crs(), rasterio.Env(GDAL_PAM_ENABLED="NO"), replacing(codes.with_suffix(".png")) as partial:
        rasterio.shutil.copy(codes, partial, driver="PNG")


def _quiet_without_crs() -> warnings.catch_warnings:
    """A raster without a CRS is allowed, so rasterio's warning about it says nothing new."""
    return warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning)
