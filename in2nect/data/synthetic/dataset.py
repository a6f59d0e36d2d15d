"""A folder data set of synthetic scenes: georeferenced images and labels, split.csv and classes.yaml.

Files are written under a temporary name and renamed, and `synthetic.json` records the parameters, so a second call
costs nothing and an interrupted one goes on with the scenes that are missing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import Affine

from in2nect.data.classes import LOVEDA
from in2nect.data.synthetic.scene import synthetic_scene
from in2nect.files import replacing, write_json, write_text

MARKER = "synthetic.json"
FORMAT = 1
"""Counts changes of the scenes' look: a data set of another number is drawn again."""

COORDINATES = "EPSG:32650"
PIXEL = 0.3
EAST, NORTH = 500_000.0, 3_400_000.0
"""Upper left corner of the first scene, in metres."""


def write_synthetic_dataset(
    root: str | os.PathLike[str], *, seed: int = 0, train: int = 6, val: int = 2, test: int = 2, size: int = 1024
) -> Path:
    """Write scenes as GeoTIFFs (UTM zone 50 N, 0.3 m pixels, side by side from west to east) with their labels.

    Args:
        root: the folder; made where it is missing. What an earlier call left there is kept if it was called with the
            same parameters and replaced if not.
        seed: 0 or more; scene i is drawn from (seed, i).
        train, val, test: scenes in each split.
        size: side of a scene, in pixels.

    Returns:
        `root`, a folder that `FolderDataModule` reads.

    Raises:
        ValueError: `root` holds images that this function did not write; no scene at all is asked for.
    """
    root = Path(root)
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    if not splits:
        raise ValueError("train, val and test are all 0; ask for at least one scene")
    wanted = {"format": FORMAT, "seed": seed, "train": train, "val": val, "test": test, "size": size}
    found = _read_marker(root)
    names = [f"scene_{number:03d}" for number in range(len(splits))]
    files = {name: (root / "images" / f"{name}.tif", root / "labels" / f"{name}.tif") for name in names}
    if found == {**wanted, "complete": True} and all(path.is_file() for pair in files.values() for path in pair):
        return root
    if found is None and (root / "images").is_dir() and any((root / "images").iterdir()):
        raise ValueError(f"{root}: holds images that were not drawn here; give another folder for the synthetic scenes")
    if found is not None and {**found, "complete": True} != {**wanted, "complete": True}:
        _remove_scenes(root)
    for folder in (root / "images", root / "labels"):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(root / MARKER, {**wanted, "complete": False})
    for number, (image, label) in enumerate(files.values()):
        if image.is_file() and label.is_file():
            continue
        scene = synthetic_scene((seed, number), size)
        place = Affine(PIXEL, 0, EAST + number * size * PIXEL, 0, -PIXEL, NORTH)
        _write_raster(image, np.moveaxis(scene.image, -1, 0), place, photometric="RGB")
        _write_raster(label, scene.label[None], place, nodata=LOVEDA.ignore_index)
    rows = [f"images/{name}.tif,{split}" for name, split in zip(names, splits, strict=True)]
    write_text(root / "split.csv", "\n".join(["image,split", *rows]) + "\n")
    LOVEDA.to_yaml(root / "classes.yaml")
    write_json(root / MARKER, {**wanted, "complete": True})
    return root


def _read_marker(root: Path) -> dict[str, Any] | None:
    path = root / MARKER
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        content = None
    return content if isinstance(content, dict) else {}


def _remove_scenes(root: Path) -> None:
    for folder in (root / "images", root / "labels"):
        for path in folder.glob("scene_*.tif"):
            path.unlink()


def _write_raster(path: Path, bands: NDArray[np.uint8], place: Affine, **options: Any) -> None:
    """Bands (C, H, W) as a tiled, compressed GeoTIFF; a single band gets the classes' palette."""
    count, height, width = bands.shape
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "width": width,
        "height": height,
        "count": count,
        "dtype": "uint8",
        "crs": COORDINATES,
        "transform": place,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
        "predictor": 2,
        "interleave": "pixel",
    }
    with replacing(path) as partial, rasterio.open(partial, "w", **profile, **options) as target:
        target.write(bands)
        if count == 1:
            target.write_colormap(1, dict(enumerate(LOVEDA.colors)))
