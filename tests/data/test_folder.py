"""The folder layout: pairs by stem, and errors that say which file, what was found and what to do."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from in2nect.data.classes import Classes
from in2nect.data.coding import CodeLabels
from in2nect.data.folder import split_images, split_pairs

SPLITS = ["train", "train", "val", "test"]
SIZES = [(40, 50), (33, 33), (20, 30), (25, 64)]


def test_pairs_by_stem(make_folder) -> None:
    root = make_folder(SIZES, SPLITS)
    pairs = split_pairs(root, "train")
    assert [(p.name, p.height, p.width) for p in pairs] == [("part0", 40, 50), ("part1", 33, 33)]
    assert pairs[0].image == root / "images" / "part0.tif"
    assert pairs[0].label == root / "labels" / "part0.png"


@pytest.mark.parametrize("entry", ["images/part0.tif", "part0.tif", "part0"])
def test_image_column_takes_a_path_a_name_or_a_stem(make_folder, entry: str) -> None:
    root = make_folder(SIZES, SPLITS)
    (root / "split.csv").write_text(f"image,split,remark\n{entry},val,sunny\n")
    assert [path.name for path in split_images(root, "val")] == ["part0.tif"]


def test_a_stem_with_dots(make_folder, write_raster) -> None:
    root = make_folder(SIZES[:1], SPLITS[:1])
    write_raster(root / "images" / "a.b.tif", np.zeros((3, 8, 8), np.uint8))
    write_raster(root / "labels" / "a.b.png", np.zeros((8, 8), np.uint8))
    (root / "split.csv").write_text("image,split\na.b,train\n")
    assert split_pairs(root, "train")[0].label.name == "a.b.png"


def test_images_need_no_labels_to_predict(make_folder) -> None:
    root = make_folder(SIZES, SPLITS)
    for label in (root / "labels").iterdir():
        label.unlink()
    assert [path.name for path in split_images(root, "test")] == ["part3.tif"]


def test_no_warning_without_georeference(make_folder) -> None:
    root = make_folder(SIZES, SPLITS, suffix=".png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(split_pairs(root, "train")) == 2


def test_missing_table(make_folder) -> None:
    root = make_folder(SIZES, SPLITS)
    (root / "split.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"split\.csv: missing; write one with the columns image,split"):
        split_images(root, "train")


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (
            "file,split\npart0,train\n",
            ValueError,
            r"split\.csv: no column image; its first line reads 'file,split', expected",
        ),
        (
            "image,split\npart0,training\n",
            ValueError,
            r"split\.csv, line 2: split 'training'; expected one of train, val",
        ),
        ("image,split\npart0,val\n", ValueError, r"split\.csv: no image in split 'train' among 1 lines"),
        ("image,split\n", ValueError, r"no image in split 'train' among 0 lines"),
        ("image,split\npart0,train\npart9,val\n", FileNotFoundError, r"line 3: part9: no such image in .*images"),
        ("image,split\npart0,train\npart0.tif,val\n", ValueError, r"lines 2 and 3: both list part0\.tif"),
        ("image,split\npart0.jpg,train\n", FileNotFoundError, r"line 2: part0\.jpg: no such image"),
    ],
)
def test_bad_tables(make_folder, table: str, error: type[Exception], message: str) -> None:
    root = make_folder(SIZES, SPLITS)
    (root / "split.csv").write_text(table)
    with pytest.raises(error, match=message):
        split_images(root, "train")


def test_unknown_split(make_folder) -> None:
    with pytest.raises(ValueError, match=r"split 'dev'; expected one of train, val, test"):
        split_images(make_folder(SIZES, SPLITS), "dev")


def test_missing_label(make_folder) -> None:
    root = make_folder(SIZES, SPLITS)
    (root / "labels" / "part1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"part1\.tif: no label; expected .*labels/part1 with one of \.tif"):
        split_pairs(root, "train")


def test_size_mismatch(make_folder, write_raster) -> None:
    root = make_folder(SIZES, SPLITS)
    write_raster(root / "labels" / "part1.png", np.zeros((33, 34), np.uint8))
    with pytest.raises(ValueError, match=r"part1\.png: 33 x 34 pixels .*part1\.tif has 33 x 33"):
        split_pairs(root, "train")


def test_colour_labels_wide_pixels_and_mixed_bands(make_folder, write_raster) -> None:
    root = make_folder(SIZES, SPLITS)
    label = root / "labels" / "part1.png"
    write_raster(label, np.zeros((3, 33, 33), np.uint8))
    with pytest.raises(ValueError, match=r"part1\.png: 3 bands; expected one band"):
        split_pairs(root, "train")
    write_raster(label, np.zeros((33, 33), np.uint8))
    write_raster(root / "images" / "part1.tif", np.zeros((4, 33, 33), np.uint8))
    with pytest.raises(ValueError, match=r"part1\.tif: 4 bands, where most images have 3; give all"):
        split_pairs(root, "train")
    write_raster(root / "images" / "part1.tif", np.zeros((3, 33, 33), np.uint16))
    with pytest.raises(ValueError, match=r"part1\.tif: uint16 values; expected uint8"):
        split_pairs(root, "train")


def test_two_images_of_one_stem(make_folder, write_raster) -> None:
    root = make_folder(SIZES, SPLITS)
    write_raster(root / "images" / "part0.png", np.zeros((3, 40, 50), np.uint8))
    with pytest.raises(ValueError, match=r"part0\.png and .*part0\.tif: one stem, two files"):
        split_images(root, "train")


def test_foreign_label_codes_are_named_counted_and_located(tmp_path: Path, write_raster, classes: Classes) -> None:
    label = np.zeros((300, 20), np.uint8)
    label[270:272, 4:9] = 3
    label[5, 6] = 77
    label[0] = classes.ignore_index
    path = write_raster(tmp_path / "label.tif", label)
    check = CodeLabels(classes)
    check(label[None, 10:200], path)
    message = (
        r"label\.tif: code 3 on 10 pixels, one at row 270, column 4; code 77 on 1 pixel, one at row 5, column 6\. "
        r"Expected 0\.\.2 \(land, water, wood\) or 255"
    )
    with pytest.raises(ValueError, match=message):
        check(label[None, 5:6], path)


def test_dubai_layout(make_folder, write_raster) -> None:
    """JPEG images, PNG labels, a label column, numbers 1 to 9 of a tile over three splits."""
    root = make_folder([], [])
    rng = np.random.default_rng(0)
    lines = ["image,label,split"]
    for part in range(1, 10):
        image, label = f"images/tile2_part{part}.jpg", f"labels/tile2_part{part}.png"
        write_raster(root / image, rng.integers(0, 255, (3, 51, 54), dtype=np.uint8))
        write_raster(root / label, rng.integers(0, 5, (51, 54), dtype=np.uint8))
        lines.append(f"{image},{label},{'train' if part < 7 else 'val' if part < 8 else 'test'}")
    (root / "split.csv").write_text("\n".join(lines) + "\n")
    assert [len(split_pairs(root, split)) for split in ("train", "val", "test")] == [6, 1, 2]


def test_dubai_itself(real_data: str) -> None:
    root = Path(real_data) / "dubai"
    if not root.is_dir():
        pytest.skip(f"IN2NECT_DATA ({real_data}) holds no dubai/")
    assert [len(split_pairs(root, split)) for split in ("train", "val", "test")] == [48, 8, 16]


@pytest.mark.parametrize(("encoding", "where"), [("utf-16", "byte 0xff at position 0"), ("latin-1", "byte 0xe9 at")])
def test_another_encoding_is_told_with_the_file(make_folder, encoding: str, where: str) -> None:
    root = make_folder(SIZES, SPLITS)
    table, classes = root / "split.csv", root / "classes.yaml"
    table.write_bytes((table.read_text() + "images/\u00e9t\u00e9.tif,val\n").encode(encoding))
    with pytest.raises(ValueError, match=rf"split\.csv: {where}.* is not UTF-8; save"):
        split_images(root, "train")
    classes.write_bytes((classes.read_text() + "# \u00e9t\u00e9\n").encode(encoding))
    with pytest.raises(ValueError, match=rf"classes\.yaml: {where}.* is not UTF-8; save"):
        Classes.from_yaml(classes)


def test_a_table_that_is_no_text(make_folder) -> None:
    root = make_folder(SIZES, SPLITS)
    (root / "split.csv").write_bytes(b"image,split\n\0\0,train\n")
    with pytest.raises(ValueError, match=r"split\.csv: byte 0x00 at position 12 is no text"):
        split_images(root, "train")


def test_windows_line_ends_and_a_byte_order_mark(make_folder) -> None:
    root = make_folder(SIZES, SPLITS)
    expected = {split: split_images(root, split) for split in set(SPLITS)}
    for name in ("split.csv", "classes.yaml"):
        text = (root / name).read_text().replace("\n", "\r\n")
        (root / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert {split: split_images(root, split) for split in set(SPLITS)} == expected
    assert Classes.from_yaml(root / "classes.yaml").names == ("land", "water", "wood")
