"""`in2nect data check`: figures of a sound data set, and each kind of broken file named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from in2nect.data.check import check_dataset
from in2nect.data.datasets import LayoutSettings, open_dataset
from in2nect.data.windows import open_raster
from in2nect.training.cli import main
from tests.data import trees

TILES = {"train": ("3_10", "3_11", "3_12"), "val": ("2_10",), "test": ("2_13", "2_14")}


@pytest.fixture
def potsdam(tmp_path: Path) -> trees.Tree:
    """Potsdam with few tiles, and lists that name them."""
    (tmp_path / "lists").mkdir()
    for split, tiles in TILES.items():
        (tmp_path / "lists" / f"{split}.txt").write_text("\n".join(tiles))
    return trees.potsdam(tmp_path / "potsdam", tiles=TILES)


def check(tree: trees.Tree, *more: str) -> int:
    lists = f"--layout.splits={tree.root.parent / 'lists'}"
    return main(["data", "check", str(tree.root), "--dataset=potsdam", lists, *more])


def test_figures_of_a_sound_data_set(potsdam: trees.Tree, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert check(potsdam, f"--json={tmp_path / 'check.json'}") == 0
    printed = capsys.readouterr().out
    for part in ("train: 3 scenes", "60 x 60 (3)", "EPSG:25832 (3)", "impervious surface", "to 1", "nothing is wrong"):
        assert part in printed
    found = json.loads((tmp_path / "check.json").read_text())
    for split, codes in (("train", potsdam.codes["train"]), ("test", potsdam.eroded["test"])):
        labels = np.stack(list(codes.values()))
        expected = [int((labels == code).sum()) for code in [*range(6), 255]]
        assert list(found["splits"][split]["pixels"].values()) == expected
        assert found["splits"][split]["long_tail_ratio"] == max(expected[:6]) / min(expected[:6])
    images = np.stack([_read(path) for path in sorted((potsdam.root / "2_Ortho_RGB").glob("*_3_1*"))]) / 255
    assert found["splits"]["train"]["mean"] == pytest.approx(images.mean((0, 2, 3)))
    assert found["splits"]["train"]["std"] == pytest.approx(images.std((0, 2, 3)))
    assert found["problems"] == []


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-900])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(b"no raster at all")


def _smaller(path: Path) -> None:
    trees.write(path, _read(path)[:, :-1])


def _wide(path: Path) -> None:
    trees.write(path, _read(path).astype(np.uint16))


def _one_band(path: Path) -> None:
    trees.write(path, _read(path)[:1])


def _strange_colour(path: Path) -> None:
    values = _read(path)
    values[:, 31, 47] = (254, 1, 0)
    trees.write(path, values)


IMAGE, LABEL = "2_Ortho_RGB/top_potsdam_3_11_RGB.tif", "5_Labels_all/top_potsdam_3_11_label.tif"


@pytest.mark.parametrize(
    ("file", "damage", "kind", "words"),
    [
        (IMAGE, Path.unlink, "missing", "no such image"),
        (LABEL, Path.unlink, "missing", "no label; expected"),
        (IMAGE, _empty, "empty", "0 bytes"),
        (LABEL, _empty, "empty", "0 bytes"),
        (IMAGE, _garbage, "unreadable", "cannot be opened as a raster"),
        (IMAGE, _truncate, "unreadable", "damaged or cut short"),
        (LABEL, _truncate, "unreadable", "damaged or cut short"),
        (LABEL, _smaller, "size", "59 x 60 pixels (height x width), but its image"),
        (IMAGE, _wide, "type", "uint16 values; expected uint8"),
        (LABEL, _one_band, "bands", "1 band; expected three bands of colours"),
        (IMAGE, _one_band, "bands", "1 bands, where most images have 3"),
        (LABEL, _strange_colour, "label", "(254, 1, 0) on 1 pixel, one at row 31, column 47"),
        ("5_Labels_all_noBoundary/top_potsdam_2_14_label_noBoundary.tif", Path.unlink, "missing", "about 6 mIoU lower"),
    ],
)
def test_each_kind_of_broken_file_is_named(
    potsdam: trees.Tree,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: str,
    damage: Callable[[Path], None],
    kind: str,
    words: str,
) -> None:
    damage(potsdam.root / file)
    assert check(potsdam, f"--json={tmp_path / 'check.json'}") == 2
    problem, *others = json.loads((tmp_path / "check.json").read_text())["problems"]
    assert (problem["kind"], problem["file"], others) == (kind, str(potsdam.root / file), [])
    assert words in problem["message"]
    printed = capsys.readouterr().out
    assert "1 problem:" in printed and words in printed and Path(file).name in printed


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _one_byte_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_truncate, _one_byte_short, _flip_a_byte, _empty, _garbage])
def test_pngs_of_loveda(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    tree = trees.loveda(tmp_path)
    damage(tmp_path / "Val" / "Rural" / "images_png" / "2523.png")
    (tmp_path / "Train" / "Urban" / "images_png" / "1368.png").unlink()
    report = check_dataset(open_dataset("loveda", tree.root))
    assert [problem.path.name for _, problem in report.problems] == ["1368.png", "2523.png"]
    assert report.problems[0][1].kind == "missing"  # a mask without an image
    assert "loveda as published has 2522" in report.notes[0]


def test_a_list_or_a_folder_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    tree = trees.loveda(tmp_path, ids={"Train": trees.LOVEDA_IDS["Train"]})
    report = check_dataset(open_dataset("loveda", tree.root))
    assert [split for split, _ in report.problems] == ["val", "test"]
    assert "Val/Urban: no such folder of LoveDA" in report.problems[0][1].message


def test_check_takes_the_data_settings_of_a_configuration(
    potsdam: trees.Tree, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    lists = potsdam.root.parent / "lists"
    config.write_text(f"data:\n  dataset: potsdam\n  bands: [4, 1]\n  layout: {{image_type: rgbir, splits: {lists}}}\n")
    assert main(["data", "check", str(potsdam.root), f"--config={config}"]) == 0
    printed = capsys.readouterr().out
    assert "band 2: mean" in printed and "band 3" not in printed


def test_elevations_are_read_too(tmp_path: Path) -> None:
    tree = trees.vaihingen(tmp_path, areas={"train": (1,), "val": (30,), "test": (2,)})
    for split, area in {"train": 1, "val": 30, "test": 2}.items():
        (tmp_path / f"{split}.txt").write_text(str(area))
    layout = LayoutSettings(elevation=True, splits=str(tmp_path))
    _truncate(tree.root / "dsm" / "dsm_09cm_matching_area2.tif")
    report = check_dataset(open_dataset("vaihingen", tree.root, layout=layout), workers=1)
    assert [problem.path.name for _, problem in report.problems] == ["dsm_09cm_matching_area2.tif"]
    assert len(report.splits["train"].mean) == 4


def test_help_explains_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    printed = capsys.readouterr().out
    for part in ("check", "prepare", "download", "--layout.eval_labels", "--json", "--compression", "--base_url"):
        assert part in printed
    assert main(["data", "chekc"]) == 2


def _read(path: Path) -> np.ndarray:
    with open_raster(path) as source:
        return source.read()


def test_a_folder_without_splits_is_a_problem_and_a_missing_one_is_told(
    tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    root = make_folder([(33, 33), (33, 33)], ["train", "val"])
    report = check_dataset(open_dataset("folder", root))
    assert (report.problems, report.notes[0]) == ([], "no split 'test'")
    (root / "split.csv").write_text("image,split\n")
    (_, problem), *others = check_dataset(open_dataset("folder", root)).problems
    assert "no image in split 'train' among 0 lines" in problem.message and not others


def test_what_is_wrong_with_the_list_of_all_splits_is_one_problem(make_folder: Callable[..., Path]) -> None:
    root = make_folder([(33, 33), (33, 33)], ["train", "val"])
    with (root / "split.csv").open("a") as table:
        table.write("images/part0.tif,test\n")
    (_, problem), *others = check_dataset(open_dataset("folder", root)).problems
    assert "lines 2 and 4: both list part0.tif" in problem.message and not others


def test_labels_of_another_type_are_not_told_to_be_rescaled(make_folder: Callable[..., Path]) -> None:
    root = make_folder([(33, 33)], ["train"])
    trees.write(root / "labels" / "part0.tif", _read(root / "labels" / "part0.png").astype(np.float32))
    (root / "labels" / "part0.png").unlink()
    [(_, problem)] = check_dataset(open_dataset("folder", root)).problems
    assert "float32 values; expected uint8: write the label's codes or colours as bytes" in problem.message


@pytest.mark.parametrize("text", ["- a\n", "data: [1]\n", "data: [\n"])
def test_a_file_that_is_no_configuration(
    make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    root = make_folder([(33, 33)], ["train"])
    (root / "run.yaml").write_text(text)
    assert main(["data", "check", str(root), f"--config={root / 'run.yaml'}"]) == 2
    assert "run.yaml: " in capsys.readouterr().err
    (root / "run.yaml").write_text("data:\n")
    assert main(["data", "check", str(root), f"--config={root / 'run.yaml'}"]) == 0
