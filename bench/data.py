"""How many training crops a second come out of a big raster: striped, tiled, and tiled and compressed, by one worker
and by several, beside reading the whole file for every crop, and beside torchgeo's sampler where it is installed.

The rasters, an image of three bands and its label, are made in a temporary folder. They are small enough to stay in the
system's cache of files: what is timed is decoding, resampling and handing over, not the disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
if importlib.util.find_spec("in2nect") is None:
    sys.path.insert(0, str(ROOT))
try:
    import rasterio
except ImportError:
    sys.exit("data.py reads rasters; pip install 'in2nect[train]'")

import numpy as np  # noqa: E402
import output  # noqa: E402
import torch  # noqa: E402
from arguments import positive  # noqa: E402
from output import say  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402
from rasterio.windows import Window  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from in2nect.data.classes import LOVEDA  # noqa: E402
from in2nect.data.crops import Augmentations, CropDataset, CropLoader, CropSampler, collate  # noqa: E402
from in2nect.data.folder import Pair  # noqa: E402
from in2nect.data.sampling import Sampling  # noqa: E402
from in2nect.data.windows import open_raster  # noqa: E402
from in2nect.files import write_json  # noqa: E402

TILE = 512
LAYOUTS: dict[str, dict[str, Any]] = {
    "striped": {},
    "tiled": {"tiled": True, "blockxsize": TILE, "blockysize": TILE},
    "tiled, deflate": {
        "tiled": True,
        "blockxsize": TILE,
        "blockysize": TILE,
        "compress": "deflate",
        "predictor": 2,
        "zlevel": 1,
    },
}
PLAIN = Augmentations((1.0,), horizontal_flip=False, vertical_flip=False, quarter_turns=False)
PATCH = 64  # pixels a side of the label's patches
SLICES = 3  # of a row's time; their median is its rate
AHEAD = 2  # batches a worker reads ahead
ENDLESS = 10**7  # crops an epoch
COORDINATES = "EPSG:32650"
NO_NAME = ""  # of --json


@dataclass
class Row:
    """A way to read crops out of one raster, with so many workers."""

    layout: str
    method: str
    workers: int
    status: str = "failed"  # or "timed", "absent"
    why: str | None = None
    rates: list[float] = field(default_factory=list)  # crops a second of each slice

    @property
    def rate(self) -> float | None:
        return median(self.rates) if self.rates else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"crops_per_second": self.rate}


class WholeFiles(Dataset[dict[str, torch.Tensor]]):
    """The plain way: each crop reads its image and its label from end to end, and cuts a window out."""

    def __init__(self, pair: Pair, crop: int) -> None:
        self.pair, self.crop = pair, crop

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        rng, crop, pair = np.random.default_rng(item), self.crop, self.pair
        row, col = (int(rng.integers(length - crop + 1)) for length in (pair.height, pair.width))
        read = {}
        for name, path in (("image", pair.image), ("label", pair.label)):
            with open_raster(path) as source:
                read[name] = torch.from_numpy(source.read()[:, row : row + crop, col : col + crop].copy())
        return read


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; 1 where nothing could be timed."""
    begun = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.crop > options.size:
        parser.error(f"--crop {options.crop}: larger than the raster, --size {options.size}")
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g}: expected more than 0")
    device = torch.device("cpu")
    versions = output.versions()
    say(f"{output.device_name(device)}: torch {versions['torch']}, in2nect {versions['in2nect']}")
    say(f"GDAL {rasterio.__gdal_version__}, crops of {options.crop}^2 out of {options.size}^2\n")
    rows: list[Row] = []
    say(_HEAD)
    for layout in options.layout:
        folder = Path(tempfile.mkdtemp(prefix="in2nect-bench-", dir=options.folder))
        try:
            pair = make_raster(folder, layout, options.size, options.seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as asked
                rows += measure_layout(pair, layout, options)
        finally:
            shutil.rmtree(folder)
    say(f"\n{LEGEND}")
    if options.json is not None:
        target = output.result_path(device, "data") if options.json == NO_NAME else Path(options.json)
        given = {name: value for name, value in vars(options).items() if name not in ("json", "folder")}
        document = output.heading("data", device, given, time.monotonic() - begun)
        document["versions"] |= {"rasterio": rasterio.__version__, "gdal": rasterio.__gdal_version__}
        write_json(target, output.finite(document | {"rows": [row.to_json() for row in rows]}))
        say(f"json: {target}")
    say(f"{time.monotonic() - begun:.0f} s in all")
    return int(not any(row.status == "timed" for row in rows))


def measure_layout(pair: Pair, layout: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one raster, each shown as it comes."""
    rows = []
    for method, make in METHODS.items():
        for workers in options.workers:
            row = Row(layout, method, workers)
            if method == "torchgeo" and importlib.util.find_spec("torchgeo") is None:
                row.status, row.why = "absent", "it is not installed; pip install torchgeo"
            else:
                try:
                    row.rates = crop_rates(make(pair, workers, options), options.batch, options.seconds)
                    row.status = "timed"
                except Exception as error:
                    row.why = f"{type(error).__name__}: {error}"
            rows.append(row)
            say(table_row(row, next((r for r in rows if r.method == "crops, plain" and r.workers == workers), None)))
            if row.status == "absent":
                break
    return rows


def crop_rates(loader: DataLoader[Any], batch: int, seconds: float) -> list[float]:
    """Crops a second in each of SLICES slices of time, after every worker has handed over its first batches."""
    batches = iter(loader)
    for _ in range(max(1, loader.num_workers)):
        next(batches)
    rates = []
    for _ in range(SLICES):
        start, crops = time.perf_counter(), 0
        while not crops or time.perf_counter() - start < seconds / SLICES:
            next(batches)
            crops += batch
        rates.append(crops / (time.perf_counter() - start))
    return rates


def make_raster(folder: Path, layout: str, size: int, seed: int) -> Pair:
    """A georeferenced image that deflate shortens by about a third, and a label of patches, in rows of tiles."""
    rng = np.random.default_rng(seed)
    cells = -(-size // PATCH)
    codes = rng.integers(0, LOVEDA.num_classes, (cells, cells), dtype=np.uint8)
    colors = np.array(LOVEDA.colors, np.uint8) // 2 + 32
    for name in ("images", "labels"):
        (folder / name).mkdir()
    pair = Pair("scene", folder / "images" / "scene.tif", folder / "labels" / "scene.tif", size, size)
    options = {"driver": "GTiff", "height": size, "width": size, "dtype": "uint8", "crs": COORDINATES}
    options |= {"transform": from_origin(500_000, 3_400_000, 1, 1), **LAYOUTS[layout]}
    with (
        rasterio.open(pair.image, "w", count=3, **options) as image,
        rasterio.open(pair.label, "w", count=1, **options) as label,
    ):
        for row in range(0, size, TILE):
            rows = np.arange(row, min(row + TILE, size)) // PATCH
            part = codes[rows].repeat(PATCH, axis=1)[:, :size]
            window = Window(0, row, size, len(rows))
            label.write(part[None], window=window)
            noise = rng.integers(0, 16, (3, *part.shape), dtype=np.uint8)
            image.write(colors[part].transpose(2, 0, 1) + noise, window=window)
    return pair


def _crops(augmentations: Augmentations, sampling: Sampling) -> Callable[..., DataLoader[Any]]:
    def make(pair: Pair, workers: int, options: argparse.Namespace) -> DataLoader[Any]:
        dataset = CropDataset(
            [pair],
            LOVEDA,
            crop_size=options.crop,
            length=ENDLESS,
            seed=options.seed,
            augmentations=augmentations,
            sampling=sampling,
        )
        return CropLoader(
            dataset,
            sampler=CropSampler(ENDLESS),
            batch_size=options.batch,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=AHEAD,
        )

    return make


def _balanced(pair: Pair, workers: int, options: argparse.Namespace) -> DataLoader[Any]:
    """With its index in the folder of the raster, and not among those of the user."""
    before = os.environ.get("IN2NECT_CACHE")
    os.environ["IN2NECT_CACHE"] = str(pair.image.parent.parent / "cache")
    try:
        return _crops(Augmentations(), Sampling("balanced"))(pair, workers, options)
    finally:
        if before is None:
            del os.environ["IN2NECT_CACHE"]
        else:
            os.environ["IN2NECT_CACHE"] = before


def _whole_files(pair: Pair, workers: int, options: argparse.Namespace) -> DataLoader[Any]:
    dataset = WholeFiles(pair, options.crop)
    return DataLoader(dataset, batch_size=options.batch, num_workers=workers, prefetch_factor=AHEAD)


def _torchgeo(pair: Pair, workers: int, options: argparse.Namespace) -> DataLoader[Any]:
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import RandomGeoSampler

    class Images(RasterDataset):
        filename_glob = "*.tif"

    class Labels(Images):
        is_image = False

    dataset = Images(str(pair.image.parent)) & Labels(str(pair.label.parent))
    sampler = RandomGeoSampler(dataset, size=options.crop, length=ENDLESS // 1000)
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=options.batch,
        collate_fn=stack_samples,
        num_workers=workers,
        prefetch_factor=AHEAD,
    )


METHODS: dict[str, Callable[[Pair, int, argparse.Namespace], DataLoader[Any]]] = {
    "crops, plain": _crops(PLAIN, Sampling()),
    "crops": _crops(Augmentations(), Sampling()),
    "crops, balanced": _balanced,
    "whole files": _whole_files,
    "torchgeo": _torchgeo,
}

_COLUMNS = (
    ("layout", 18),
    ("read by", 18),
    ("workers", 9),
    ("crops/s", 10),
    ("slowest to fastest", 22),
    ("x plain", 10),
)
_HEAD = "".join(name.ljust(width) if i < 2 else name.rjust(width) for i, (name, width) in enumerate(_COLUMNS))
LEGEND = (
    "crops, plain: windows of their own size, as the two peers cut them. crops: with the paper's random scale, flips\n"
    "and turns. balanced: and a class drawn first. whole files: image and label read from end to end for each crop.\n"
    f"crops/s: median of {SLICES} slices of time, and their range. x plain: over `crops, plain` with as many workers."
)


def table_row(row: Row, plain: Row | None) -> str:
    """One line, or more where a reason is long."""
    start = row.layout.ljust(_COLUMNS[0][1]) + row.method.ljust(_COLUMNS[1][1])
    if row.rate is None:
        return output.wrapped(start, f"  {row.status}: {row.why}")
    cells = [
        str(row.workers),
        output.digits(row.rate),
        f"{output.digits(min(row.rates))} to {output.digits(max(row.rates))}",
        "-" if plain is None or plain.rate is None else f"{output.digits(row.rate / plain.rate)}x",
    ]
    return start + "".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS[2:]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data.py",
        description=__doc__,
        epilog=f"the columns:\n{LEGEND}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is read")
    what.add_argument(
        "--size", type=positive, default=4096, metavar="S", help="side of the raster in pixels (default: %(default)s)"
    )
    what.add_argument("--crop", type=positive, default=512, metavar="S", help="side of a crop (default: %(default)s)")
    what.add_argument(
        "--layout",
        nargs="+",
        choices=tuple(LAYOUTS),
        default=list(LAYOUTS),
        help=f"how the raster is stored: in strips, or in tiles of {TILE}^2 (default: all)",
    )
    what.add_argument("--seed", type=int, default=0, help="of the raster and the crops (default: %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--workers",
        type=positive,
        nargs="+",
        default=[1, 2, 4],
        metavar="N",
        help="processes that read; a row for each (default: 1 2 4)",
    )
    how.add_argument("--batch", type=positive, default=4, metavar="B", help="crops a batch (default: %(default)s)")
    how.add_argument(
        "--seconds", type=float, default=0.9, metavar="S", help="that a row is timed for (default: %(default)s)"
    )
    how.add_argument(
        "--folder", metavar="DIR", help="where the rasters are made, and removed again (default: the system's for that)"
    )
    kept = parser.add_argument_group("what is kept")
    kept.add_argument(
        "--json",
        nargs="?",
        const=NO_NAME,
        metavar="FILE",
        help="every rate, with machine, versions and arguments; without a name "
        "bench/results/YYYY-MM-DD-DEVICE-data.json (default: nothing is kept)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
