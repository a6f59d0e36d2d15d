"""Crops of a raster of 20,000 x 20,000 take memory for the crops alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio

SIDE = 20_000
LIMIT = 300  # MiB

CODE = """
import re, sys
from pathlib import Path
from torchvision.transforms import v2  # what imports take is no part of it
from in2nect.data.classes import Classes
from in2nect.data.crops import CropDataset
from in2nect.data.folder import Pair
from in2nect.data.sampling import Sampling

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

root, side = Path(sys.argv[1]), int(sys.argv[2])
before = peak()
classes = Classes(("land", "water"), ((0, 0, 0), (0, 0, 255)))
pair = Pair("scene", root / "image.tif", root / "label.tif", side, side)
dataset = CropDataset([pair], classes, crop_size=1024, length=40, sampling=Sampling(sys.argv[3]))
seen = {tuple(dataset[item]["window"].tolist()) for item in range(40)}
assert len(seen) == 40
print(peak() - before)
"""


TILED = {"tiled": True, "blockxsize": 512, "blockysize": 512}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "layout"),
    [("uniform", TILED), ("dominance", TILED), ("balanced", {})],
    ids=["uniform, tiled", "dominance, tiled", "balanced, striped"],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_of_crops_out_of_a_big_raster(tmp_path: Path, sampling: str, layout: dict) -> None:
    for name, bands in (("image", 3), ("label", 1)):
        options = {"height": SIDE, "width": SIDE, "count": bands, "dtype": "uint8", "SPARSE_OK": True, **layout}
        with rasterio.open(tmp_path / f"{name}.tif", "w", driver="GTiff", **options):
            pass
        assert (tmp_path / f"{name}.tif").stat().st_size < 2**20
    environment = {name: value for name, value in os.environ.items() if name != "GDAL_CACHEMAX"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "IN2NECT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path), str(SIDE), sampling]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 3 < float(done.stdout) < LIMIT
