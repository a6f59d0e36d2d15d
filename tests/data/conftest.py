"""Small folder data sets for the tests of the data half."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from in2nect.data.classes import Classes

WriteRaster = Callable[..., Path]
MakeFolder = Callable[..., Path]


@pytest.fixture
def classes() -> Classes:
    return Classes(("land", "water", "wood"), ((200, 180, 90), (0, 0, 255), (0, 120, 0)))


@pytest.fixture
def write_raster() -> WriteRaster:
    """write_raster(path, array (C, H, W) or (H, W)): a raster in the format of the path's suffix."""

    def write(path: Path, values: NDArray[np.generic]) -> Path:
        bands = values[None] if values.ndim == 2 else values
        driver = {".tif": "GTiff", ".png": "PNG", ".jpg": "JPEG"}[path.suffix]
        count, height, width = bands.shape
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"width": width, "height": height, "count": count, "dtype": bands.dtype}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, "w", driver=driver, **options) as target:
                target.write(bands)
        path.with_name(path.name + ".aux.xml").unlink(missing_ok=True)
        return path

    return write


@pytest.fixture
def make_folder(tmp_path: Path, write_raster: WriteRaster, classes: Classes) -> MakeFolder:
    """make_folder(sizes, splits): images hold 100 * label in band 0, the row in band 1 and the column in band 2."""

    def make(sizes: list[tuple[int, int]], splits: list[str], suffix: str = ".tif") -> Path:
        rng = np.random.default_rng(0)
        lines = ["image,split"]
        for number, ((height, width), split) in enumerate(zip(sizes, splits, strict=True)):
            coarse = rng.integers(0, 3, (-(-height // 16), -(-width // 16)), dtype=np.uint8)
            label = np.kron(coarse, np.ones((16, 16), np.uint8))[:height, :width]
            row, col = np.mgrid[:height, :width]
            image = np.stack([label * 100, row * 255 // height, col * 255 // width]).astype(np.uint8)
            write_raster(tmp_path / "images" / f"part{number}{suffix}", image)
            write_raster(tmp_path / "labels" / f"part{number}.png", label)
            lines.append(f"images/part{number}{suffix},{split}")
        (tmp_path / "split.csv").write_text("\n".join(lines) + "\n")
        classes.to_yaml(tmp_path / "classes.yaml")
        return tmp_path

    return make
