"""LoveDA, Vaihingen, Potsdam and folders: what is read of trees in their true layouts, up to the batches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from in2nect.data.datasets import LayoutSettings, open_dataset
from in2nect.data.scenes import as_bytes
from in2nect.data.windows import open_raster
from in2nect.training.datamodule import FolderDataModule
from tests.data import trees


@pytest.fixture(scope="module")
def loveda(tmp_path_factory: pytest.TempPathFactory) -> trees.Tree:
    return trees.loveda(tmp_path_factory.mktemp("loveda"))


@pytest.fixture(scope="module")
def vaihingen(tmp_path_factory: pytest.TempPathFactory) -> trees.Tree:
    return trees.vaihingen(tmp_path_factory.mktemp("vaihingen"))


@pytest.fixture(scope="module")
def potsdam(tmp_path_factory: pytest.TempPathFactory) -> trees.Tree:
    return trees.potsdam(tmp_path_factory.mktemp("potsdam"))


def module(root: Path, dataset: str, stage: str = "fit", **options: Any) -> FolderDataModule:
    layout = LayoutSettings(**options.pop("layout", {}))
    settings = {"batch_size": 2, "crop_size": 32, "samples_per_epoch": 4, "eval_window": 64, "eval_overlap": 0}
    data = FolderDataModule(root, dataset=dataset, layout=layout, **{**settings, **options})  # type: ignore[arg-type]
    data.setup(stage)
    return data


def evaluated(data: FolderDataModule, split: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(image, label) by the scene's name; windows are as large as the scenes."""
    data.setup({"val": "validate", "test": "test"}[split])
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    return {
        name: (image.numpy(), label.numpy())
        for batch in loader
        for name, image, label in zip(batch["name"], batch["image"], batch["label"], strict=True)
    }


def test_loveda(loveda: trees.Tree) -> None:
    data = module(loveda.root, "loveda")
    assert data.classes.names[0] == "background"
    assert {pair.name for pair in data.train.pairs} == {"1366", "1367", "1368", "0", "1"}
    batch = next(iter(data.train_dataloader()))
    assert set(batch["label"].unique().tolist()) <= {*range(7), 255}
    found = evaluated(data, "val")
    assert set(found) == {"3514", "2522", "2523"}
    for name, (_, label) in found.items():
        assert (label == loveda.codes["val"][name]).all()


def test_loveda_domains_train_and_val_and_the_test_server(loveda: trees.Tree) -> None:
    def names(split: str, **layout: Any) -> list[str]:
        return [
            scene.name for scene in open_dataset("loveda", loveda.root, layout=LayoutSettings(**layout)).scenes(split)
        ]

    assert names("train", domain="urban") == ["1366", "1367", "1368"]
    assert names("train", domain="rural") == ["0", "1"]
    assert names("train", train_on="train+val") == ["1366", "1367", "1368", "0", "1", "3514", "2522", "2523"]
    with pytest.warns(UserWarning, match=r"train_on is train\+val: the training is not validated"):
        assert module(loveda.root, "loveda", layout={"train_on": "train+val"}).val is None
    data = module(loveda.root, "loveda", "predict")
    assert [Path(item["path"]).stem for item in data.predict_dataloader()] == ["5167", "4191", "4192"]
    with pytest.raises(ValueError, match=r"labels of loveda's split 'test' are not public"):
        data.setup("test")


def test_vaihingen_trains_on_full_labels_and_is_scored_on_eroded_ones(vaihingen: trees.Tree) -> None:
    data = module(vaihingen.root, "vaihingen")
    assert len(data.train.pairs) == 15
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 32)
    assert data.train.pairs[0].label.parent.name == "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE"
    for split, count in (("val", 1), ("test", 17)):
        found = evaluated(data, split)
        assert len(found) == count
        for name, (_, label) in found.items():
            assert (label == vaihingen.eroded[split][name]).all()
            assert 0.2 < (label == 255).mean() < 0.9
    full = module(vaihingen.root, "vaihingen", layout={"eval_labels": "full"})
    for name, (_, label) in evaluated(full, "test").items():
        assert (label == vaihingen.codes["test"][name]).all()


def test_missing_eroded_labels_say_what_that_costs(vaihingen: trees.Tree, tmp_path: Path) -> None:
    shutil.copytree(vaihingen.root, tmp_path / "v")
    shutil.rmtree(tmp_path / "v" / "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE")
    message = (
        r"area2\.tif: no label; expected the eroded one, .* about 6 mIoU lower\. .* data\.layout\.eval_labels=full"
    )
    with pytest.raises(FileNotFoundError, match=message):
        module(tmp_path / "v", "vaihingen", "test")
    module(tmp_path / "v", "vaihingen", "test", layout={"eval_labels": "full"})


def test_elevation_is_a_last_band(vaihingen: trees.Tree) -> None:
    layout = {"elevation": True, "elevation_range": (250.0, 290.0)}
    data = module(vaihingen.root, "vaihingen", layout=layout)
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 4, 32, 32)
    image, _ = evaluated(data, "val")["top_mosaic_09cm_area30"]
    heights = 260 + 2.5 * vaihingen.codes["val"]["top_mosaic_09cm_area30"]
    assert (image[3] == np.round((heights - 250) * 255 / 40)).all()
    with pytest.raises(ValueError, match=r"whole scenes are predicted from one raster"):
        data.setup("predict")
    with pytest.raises(ValueError, match=r"elevation: True, with data\.dataset potsdam, which has no such choice"):
        open_dataset("potsdam", vaihingen.root, layout=LayoutSettings(elevation=True))
    with pytest.raises(ValueError, match=r"elevation_range: \[5, 5\]"):
        LayoutSettings(elevation_range=(5, 5))


def test_heights_outside_the_range_and_none() -> None:
    heights = np.array([[-9.0, 0.0, 5.0, 10.0, 99.0, np.nan]], np.float32)
    assert as_bytes(heights, (0.0, 10.0)).tolist() == [[0, 0, 128, 255, 255, 0]]
    assert as_bytes(np.array([7], np.uint8), (0.0, 10.0)).tolist() == [7]


def test_potsdam_image_types_and_bands(potsdam: trees.Tree) -> None:
    def read(**options: Any) -> np.ndarray:
        return evaluated(module(potsdam.root, "potsdam", "validate", **options), "val")["top_potsdam_2_10"][0]

    data = module(potsdam.root, "potsdam")
    assert [len(data.train.pairs), len(evaluated(data, "val")), len(evaluated(data, "test"))] == [23, 1, 14]
    for name, (_, label) in evaluated(data, "test").items():
        assert (label == potsdam.eroded["test"][name]).all()
    four = read(layout={"image_type": "rgbir"})
    assert (read() == four[:3]).all()
    assert (read(layout={"image_type": "irrg"}) == four[[3, 0, 1]]).all()
    assert (read(layout={"image_type": "rgbir"}, bands=(4, 1, 2)) == four[[3, 0, 1]]).all()


def test_splits_of_the_users_own(potsdam: trees.Tree, tmp_path: Path) -> None:
    for split, lines in {"train": "# three\n3_10\n3_11 # one\n3_12\n", "val": "2_11\n", "test": "2_13\n"}.items():
        (tmp_path / f"{split}.txt").write_text(lines)
    dataset = open_dataset("potsdam", potsdam.root, layout=LayoutSettings(splits=str(tmp_path)))
    assert [scene.name[-4:] for scene in dataset.scenes("train")] == ["3_10", "3_11", "3_12"]
    (tmp_path / "val.txt").write_text("3_11\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 1: 3_11 is listed before, in train\.txt, line 3"):
        dataset.scenes("train")
    (tmp_path / "val.txt").unlink()
    assert dataset.splits() == {"train", "test"}
    with pytest.raises(FileNotFoundError, match=r"val\.txt: no such list"):
        dataset.scenes("val")


def test_single_images_of_loveda(loveda: trees.Tree, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("Train/Urban/1367\nVal/Rural/images_png/2523.png\n")
    dataset = open_dataset("loveda", loveda.root, layout=LayoutSettings(splits=str(tmp_path)))
    assert [scene.label for scene in dataset.scenes("train")] == [
        loveda.root / "Train/Urban/masks_png/1367.png",
        loveda.root / "Val/Rural/masks_png/2523.png",
    ]
    (tmp_path / "train.txt").write_text("Training\n")
    with pytest.raises(FileNotFoundError, match=r"Training: no such folder of LoveDA; expected .*data download loveda"):
        dataset.scenes("train")


def test_a_folder_with_colours_and_four_bands(tmp_path: Path) -> None:
    codes = trees.land_cover(0, (40, 40), 6)
    codes[:5] = 255
    trees.write(tmp_path / "images" / "a.tif", trees.picture(0, codes, 4))
    trees.write(tmp_path / "labels" / "a.png", trees.colours(codes))
    trees.write(tmp_path / "images" / "b.tif", trees.picture(1, codes, 5))
    trees.write(tmp_path / "labels" / "b.png", trees.colours(codes))
    (tmp_path / "split.csv").write_text("image,split\na.tif,val\nb.tif,train\n")
    open_dataset("potsdam", tmp_path).classes.to_yaml(tmp_path / "classes.yaml")
    colors = {"label_values": "colors"}
    data = module(tmp_path, "folder", "validate", layout=colors)
    image, label = evaluated(data, "val")["a"]
    assert (label == codes).all() and image.shape == (4, 40, 40)
    with open_raster(tmp_path / "images" / "a.tif") as source:
        chosen = module(tmp_path, "folder", "validate", layout=colors, bands=(4, 2))
        assert (evaluated(chosen, "val")["a"][0] == source.read([4, 2])).all()
    with pytest.raises(ValueError, match=r"a\.tif: 4 bands, and data\.bands asks for band 5"):
        module(tmp_path, "folder", "validate", layout=colors, bands=(5, 1))
    with pytest.raises(ValueError, match=r"a\.png: 3 bands; expected one band .*label_values=colors"):
        module(tmp_path, "folder", "validate")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "val.txt").write_text("b\n")
    layout = {**colors, "splits": str(tmp_path / "splits")}
    assert set(evaluated(module(tmp_path, "folder", "validate", layout=layout), "val")) == {"b"}


def test_bad_files_are_listed_together_or_left_out(loveda: trees.Tree, tmp_path: Path) -> None:
    root = tmp_path / "l"
    shutil.copytree(loveda.root, root)
    (root / "Train/Urban/images_png/1366.png").write_bytes(b"")
    (root / "Train/Rural/masks_png/1.png").unlink()
    (root / "Val/Rural/images_png/2522.png").write_bytes(b"no picture")
    cut = root / "Val/Rural/masks_png/2523.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"4 files are not usable") as told:
        module(root, "loveda")
    text = str(told.value)
    for part in (
        "2523.png: cut short",
        "1366.png: 0 bytes",
        "1.png: no label; expected",
        "2522.png: cannot be opened as a raster",
        "=skip",
    ):
        assert part in text
    with pytest.warns(UserWarning, match=r"split 'train': 2 of 5 scenes left out .*1366\.png: 0 bytes"):
        data = module(root, "loveda", on_bad_file="skip")
    assert {pair.name for pair in data.train.pairs} == {"1367", "1368", "0"}
    assert data.val is not None and len(data.val.windows) == 1


@pytest.mark.parametrize("read_through", [True, False])
def test_a_damaged_file_is_named_before_the_first_step_or_when_it_is_read(
    potsdam: trees.Tree, tmp_path: Path, read_through: bool
) -> None:
    root = tmp_path / "p"
    shutil.copytree(potsdam.root, root)
    label = root / "5_Labels_all_noBoundary" / "top_potsdam_2_10_label_noBoundary.tif"
    with open_raster(label) as source:
        values = source.read()
    values[:, 9, 4] = 7
    trees.write(label, values)
    message = r"top_potsdam_2_10_label_noBoundary\.tif: \(7, 7, 7\) on 1 pixel, one at row 9"
    if read_through:
        with pytest.raises(ValueError, match=message):
            module(root, "potsdam", "validate")
        return
    data = module(root, "potsdam", "validate", read_through=False)
    with pytest.raises(ValueError, match=message):
        next(iter(data.val_dataloader()))


def test_settings_that_do_not_fit(loveda: trees.Tree) -> None:
    with pytest.raises(ValueError, match=r"data\.dataset: 'isprs'; expected one of folder, loveda"):
        open_dataset("isprs", loveda.root)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.bands: \[0, 1\]; expected band numbers, counted from 1"):
        open_dataset("loveda", loveda.root, bands=(0, 1))
    for layout in (LayoutSettings(images="x"), LayoutSettings(image_type="irrg"), LayoutSettings(eval_labels="full")):
        with pytest.raises(ValueError, match=r"with data\.dataset loveda, which has no such choice; it is one of "):
            open_dataset("loveda", loveda.root, layout=layout)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; data\.root"):
        open_dataset("loveda", "nowhere")
    with pytest.raises(ValueError, match=r"data\.mean: \(0\.5,\), data\.std: None; give both"):
        FolderDataModule(loveda.root, mean=(0.5,))
    assert torch.is_tensor(module(loveda.root, "loveda", mean=(0.5,) * 3, std=(0.2,) * 3).train[0]["image"])
