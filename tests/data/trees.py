"""Small copies of LoveDA, Vaihingen and Potsdam as they are published: names, folders, colours, eroded boundaries and
CRS are true, sizes and pixels are made up.

    tree = loveda(folder)      tree.codes["train"]["1366"] is the (height, width) array of class codes, 255 ignored
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

from in2nect.data.classes import ISPRS

LOVEDA_IDS = {
    "Train": {"Urban": (1366, 1367, 1368), "Rural": (0, 1)},
    "Val": {"Urban": (3514,), "Rural": (2522, 2523)},
    "Test": {"Urban": (5167,), "Rural": (4191, 4192)},
}
VAIHINGEN_AREAS = {
    "train": (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 32, 34, 37),
    "val": (30,),
    "test": (2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38),
}
POTSDAM_TILES = {
    "train": tuple(
        f"{row}_{col}"
        for row, cols in ((2, (11, 12)), *((r, (10, 11, 12)) for r in (3, 4, 5)), *((r, range(7, 13)) for r in (6, 7)))
        for col in cols
    ),
    "val": ("2_10",),
    "test": (
        *("2_13", "2_14", "3_13", "3_14"),
        *("4_13", "4_14", "4_15", "5_13", "5_14", "5_15"),
        *("6_13", "6_14", "6_15", "7_13"),
    ),
}
UTM32 = "EPSG:25832"
IGNORED = 255


@dataclass
class Tree:
    """A data set on disk, and the class codes that its labels stand for, by split and scene; `eroded` are those of
    the eroded labels.
    """

    root: Path
    codes: dict[str, dict[str, NDArray[np.uint8]]] = field(default_factory=dict)
    eroded: dict[str, dict[str, NDArray[np.uint8]]] = field(default_factory=dict)


def loveda(root: Path, size: int = 48, ids: dict[str, dict[str, tuple[int, ...]]] | None = None) -> Tree:
    """{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/ID.png: RGB without a CRS; labels 0 (no data) and 1..7;
    Test has none.
    """
    tree = Tree(root)
    for part, domains in (ids or LOVEDA_IDS).items():
        codes = tree.codes.setdefault(part.lower(), {})
        for domain, numbers in domains.items():
            folder = root / part / domain
            for number in numbers:
                label = land_cover(number, (size, size), 7)
                label[:3, :5] = IGNORED
                write(folder / "images_png" / f"{number}.png", picture(number, label, 3))
                if part != "Test":
                    codes[str(number)] = label
                    stored = np.where(label == IGNORED, 0, label + 1).astype(np.uint8)
                    write(folder / "masks_png" / f"{number}.png", stored[None])
    return tree


def vaihingen(root: Path, size: tuple[int, int] = (52, 44), areas: dict[str, tuple[int, ...]] | None = None) -> Tree:
    """top/ (NIR, R, G), dsm/ (metres, float32), the full and the eroded ground truth; areas differ in size."""
    tree = Tree(root)
    labels = root / "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE"
    eroded = root / "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE"
    for split, numbers in (areas or VAIHINGEN_AREAS).items():
        for area in numbers:
            name, shape = f"top_mosaic_09cm_area{area}", (size[0] + area % 5, size[1] + area % 3)
            where = {"crs": UTM32, "transform": from_origin(496000 + 300 * area, 5420000, 0.09, 0.09)}
            label = land_cover(area, shape, 6)
            write(root / "top" / f"{name}.tif", picture(area, label, 3), **where)
            heights = 260 + 2.5 * label.astype(np.float32)
            write(root / "dsm" / f"dsm_09cm_matching_area{area}.tif", heights[None], **where)
            _write_isprs(tree, split, name, label, labels / f"{name}.tif", eroded / f"{name}_noBoundary.tif")
    return tree


def potsdam(root: Path, size: int = 60, tiles: dict[str, tuple[str, ...]] | None = None) -> Tree:
    """2_Ortho_RGB, 3_Ortho_IRRG, 4_Ortho_RGBIR, 5_Labels_all and 5_Labels_all_noBoundary."""
    tree = Tree(root)
    for split, names in (tiles or POTSDAM_TILES).items():
        for tile in names:
            name, seed = f"top_potsdam_{tile}", int(tile.replace("_", ""))
            where = {"crs": UTM32, "transform": from_origin(366000 + seed, 5808000, 0.05, 0.05)}
            label = land_cover(seed, (size, size), 6)
            red, green, blue, infrared = picture(seed, label, 4)
            write(root / "2_Ortho_RGB" / f"{name}_RGB.tif", np.stack([red, green, blue]), **where)
            write(root / "3_Ortho_IRRG" / f"{name}_IRRG.tif", np.stack([infrared, red, green]), **where)
            write(root / "4_Ortho_RGBIR" / f"{name}_RGBIR.tif", np.stack([red, green, blue, infrared]), **where)
            full = root / "5_Labels_all" / f"{name}_label.tif"
            eroded = root / "5_Labels_all_noBoundary" / f"{name}_label_noBoundary.tif"
            _write_isprs(tree, split, name, label, full, eroded)
    return tree


def land_cover(seed: int, shape: tuple[int, int], classes: int) -> NDArray[np.uint8]:
    """Blocks of 8 pixels, the first classes more often than the last, every one of them there."""
    random = np.random.default_rng(seed)
    share = 0.6 ** np.arange(classes)
    blocks = random.choice(classes, (-(-shape[0] // 8), -(-shape[1] // 8)), p=share / share.sum())
    blocks.flat[-classes:] = np.arange(classes)
    return blocks.repeat(8, 0).repeat(8, 1)[: shape[0], : shape[1]].astype(np.uint8)


def picture(seed: int, label: NDArray[np.uint8], bands: int) -> NDArray[np.uint8]:
    """(bands, height, width): each class has a colour of its own, and noise."""
    tones = np.random.default_rng(7).integers(30, 226, (256, bands))
    noise = np.random.default_rng(seed).normal(0, 8, (*label.shape, bands))
    return np.clip(tones[label] + noise, 0, 255).astype(np.uint8).transpose(2, 0, 1)


def colours(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(3, height, width): the colours of ISPRS, black where ignored."""
    table = np.zeros((256, 3), np.uint8)
    table[:6] = ISPRS.colors
    return table[codes].transpose(2, 0, 1)


def eroded_boundaries(label: NDArray[np.uint8], radius: int = 2) -> NDArray[np.uint8]:
    """The label with every pixel ignored that has another class within `radius` pixels in its row or its column."""
    near = np.zeros(label.shape, bool)
    for step in range(1, radius + 1):
        for axis in (0, 1):
            first, last = [slice(None)] * 2, [slice(None)] * 2
            first[axis], last[axis] = slice(None, -step), slice(step, None)
            differ = label[tuple(first)] != label[tuple(last)]
            near[tuple(first)] |= differ
            near[tuple(last)] |= differ
    return np.where(near, IGNORED, label).astype(np.uint8)


def write(path: Path, values: NDArray[np.generic], **options: object) -> Path:
    """A raster (bands, height, width) in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    driver = {".tif": "GTiff", ".png": "PNG", ".jpg": "JPEG"}[path.suffix]
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver=driver, **shape, **options) as raster:
            raster.write(values)
    return path


def _write_isprs(tree: Tree, split: str, name: str, label: NDArray[np.uint8], full: Path, eroded: Path) -> None:
    without = eroded_boundaries(label)
    tree.codes.setdefault(split, {})[name] = label
    tree.eroded.setdefault(split, {})[name] = without
    write(full, colours(label))  # the published labels hold no CRS
    write(eroded, colours(without))
