"""Synthetic scenes: the same bytes for a seed, LoveDA's frequencies, a georeference, a folder that is written once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

from in2nect.data.classes import LOVEDA, Classes
from in2nect.data.folder import split_pairs
from in2nect.data.synthetic import dataset, synthetic_scene, write_synthetic_dataset

TARGETS = {
    "background": 0.39,
    "building": 0.08,
    "road": 0.045,
    "water": 0.065,
    "barren": 0.026,
    "forest": 0.12,
    "agriculture": 0.27,
}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_seed_fixes_every_byte() -> None:
    first, again, other = synthetic_scene(5, 256), synthetic_scene(5, 256), synthetic_scene(6, 256)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.label.tobytes() == again.label.tobytes()
    assert (first.label != other.label).mean() > 0.2


def test_form() -> None:
    scene = synthetic_scene((3, 1), 260)
    assert (scene.image.shape, scene.image.dtype) == ((260, 260, 3), np.uint8)
    assert (scene.label.shape, scene.label.dtype) == ((260, 260), np.uint8)
    assert set(np.unique(scene.label)) <= {*range(7), LOVEDA.ignore_index}


def test_class_frequencies() -> None:
    counts = np.zeros(7)
    for seed in range(4):
        label = synthetic_scene(seed, 512).label
        counts += np.bincount(label[label != LOVEDA.ignore_index], minlength=7)
    for name, share in zip(LOVEDA.names, counts / counts.sum(), strict=True):
        assert share == pytest.approx(TARGETS[name], rel=0.25), name
    assert np.argsort(counts)[0] == LOVEDA.names.index("barren")


def test_missing_corners_are_black_and_ignored() -> None:
    scenes = [synthetic_scene(seed, 192) for seed in range(12)]
    missing = [scene.label == LOVEDA.ignore_index for scene in scenes]
    assert 2 <= sum(mask.any() for mask in missing) <= 10
    for scene, mask in zip(scenes, missing, strict=True):
        assert mask.mean() < 0.02
        assert (scene.image[mask] == 0).all()
        assert (scene.image[~mask] > 0).any(axis=-1).all()


@pytest.mark.parametrize("size", [128, 333])
def test_unusual_sizes(size: int) -> None:
    for seed in range(6):
        assert synthetic_scene(seed, size).label.shape == (size, size)


def test_too_small() -> None:
    with pytest.raises(ValueError, match="size: 100 pixels; a scene needs at least 128"):
        synthetic_scene(0, 100)


def test_folder(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "scenes", seed=2, train=2, val=1, test=1, size=160)
    assert Classes.from_yaml(root / "classes.yaml") == LOVEDA
    assert [len(split_pairs(root, split)) for split in ("train", "val", "test")] == [2, 1, 1]
    right = None
    for pair in [pair for split in ("train", "val", "test") for pair in split_pairs(root, split)]:
        with rasterio.open(pair.image) as image, rasterio.open(pair.label) as label:
            assert image.crs == label.crs == rasterio.crs.CRS.from_epsg(32650)
            assert image.res == label.res == (0.3, 0.3)
            assert image.bounds == label.bounds
            assert right is None or image.bounds.left == pytest.approx(right)
            right = image.bounds.right
            assert image.profile["tiled"]
            assert image.compression.name == "deflate"
            assert label.colormap(1)[1] == (255, 0, 0, 255)
    with rasterio.open(root / "images" / "scene_003.tif") as image:
        np.testing.assert_array_equal(np.moveaxis(image.read(), 0, -1), synthetic_scene((2, 3), 160).image)


def test_a_second_call_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train": 1, "val": 1, "test": 1, "size": 128}
    root = write_synthetic_dataset(tmp_path / "a", seed=2, **sizes)
    before = contents(root)
    assert contents(write_synthetic_dataset(tmp_path / "b", seed=2, **sizes)) == before
    monkeypatch.setattr(dataset, "synthetic_scene", None)
    write_synthetic_dataset(root, seed=2, **sizes)
    assert contents(root) == before


def test_an_interrupted_call_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train": 2, "val": 1, "test": 1, "size": 128}
    whole = contents(write_synthetic_dataset(tmp_path / "whole", seed=2, **sizes))
    drawn: list[tuple[int, int]] = []

    def stop_at_the_third(seed: tuple[int, int], size: int):
        if seed[1] == 2 and (2, 2) not in drawn:
            drawn.append(seed)
            raise KeyboardInterrupt
        drawn.append(seed)
        return synthetic_scene(seed, size)

    monkeypatch.setattr(dataset, "synthetic_scene", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_dataset(tmp_path / "cut", seed=2, **sizes)
    assert not (tmp_path / "cut" / "split.csv").exists()
    assert contents(write_synthetic_dataset(tmp_path / "cut", seed=2, **sizes)) == whole
    assert drawn == [(2, 0), (2, 1), (2, 2), (2, 2), (2, 3)]


def test_other_parameters_replace_the_scenes(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, seed=2, train=2, val=1, test=1, size=128)
    before = contents(tmp_path)
    write_synthetic_dataset(tmp_path, seed=3, train=1, val=1, test=1, size=128)
    after = contents(tmp_path)
    assert "images/scene_003.tif" not in after
    assert after["images/scene_000.tif"] != before["images/scene_000.tif"]
    assert json.loads(after["synthetic.json"])["seed"] == 3


def test_never_mixes_with_other_images(make_folder) -> None:
    root = make_folder([(20, 20)], ["train"])
    with pytest.raises(ValueError, match="holds images that were not drawn here; give another folder"):
        write_synthetic_dataset(root, train=1, val=1, test=1, size=128)


def test_no_scene_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ask for at least one scene"):
        write_synthetic_dataset(tmp_path, train=0, val=0, test=0)
