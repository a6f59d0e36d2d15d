"""A tiny folder data set: four scenes of three classes that differ in colour, with a CRS."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from in2nect.data.classes import Classes

CLASSES = Classes(("field", "road", "water"), ((0, 128, 0), (128, 128, 128), (0, 0, 255)))
COLORS = np.array([(60, 120, 50), (150, 140, 130), (30, 60, 140)])


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    random = np.random.default_rng(0)
    lines = ["image,split"]
    for number, split in enumerate(("train", "train", "val", "test")):
        label = random.integers(0, 3, (12, 10)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        image = np.clip(COLORS[label] + random.normal(0, 12, (*label.shape, 3)), 0, 255).astype(np.uint8)
        label[:4] = 255
        _write(root / "images" / f"scene{number}.tif", image.transpose(2, 0, 1))
        _write(root / "labels" / f"scene{number}.tif", label[None])
        lines.append(f"scene{number}.tif,{split}")
    (root / "split.csv").write_text("\n".join(lines) + "\n")
    CLASSES.to_yaml(root / "classes.yaml")
    return root


def _write(path: Path, values: np.ndarray) -> None:
    count, height, width = values.shape
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(
        path, "w", driver="GTiff", crs="EPSG:32640", transform=from_origin(3e5, 28e5, 0.5, 0.5), **shape
    ) as raster:
        raster.write(values)
