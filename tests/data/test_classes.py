"""Classes from YAML: what a good file means, and that a bad one is named together with its field."""

from __future__ import annotations

from pathlib import Path

import pytest

from in2nect.data.classes import LOVEDA, Classes

GOOD = "classes:\n  - {name: land, color: [1, 2, 3]}\n  - {name: sea, color: [4, 5, 6]}\n"


def test_reads_names_colors_and_default_ignore_index(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(GOOD)
    assert Classes.from_yaml(path) == Classes(("land", "sea"), ((1, 2, 3), (4, 5, 6)), 255)
    assert Classes.from_yaml(path).num_classes == 2


def test_round_trip_keeps_awkward_names(tmp_path: Path) -> None:
    classes = Classes(("no", "a: b", "été", "0"), ((0, 0, 0), (255, 255, 255), (1, 2, 3), (9, 9, 9)), ignore_index=7)
    classes.to_yaml(tmp_path / "classes.yaml")
    assert Classes.from_yaml(tmp_path / "classes.yaml") == classes
    assert [path.name for path in tmp_path.iterdir()] == ["classes.yaml"]


def test_loveda_palette() -> None:
    assert LOVEDA.num_classes == 7
    assert LOVEDA.colors[LOVEDA.names.index("barren")] == (159, 129, 183)


def test_shipped_dubai_classes() -> None:
    classes = Classes.from_yaml(Path(__file__).parents[2] / "configs" / "classes" / "dubai.yaml")
    assert classes.names == ("building", "land", "road", "vegetation", "water")
    assert classes.colors[0] == (0x3C, 0x10, 0x98)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", r"classes: missing"),
        ("classes: 3\n", r"classes: missing"),
        (GOOD + "colour: red\n", r"colour: unknown"),
        ("classes: [land, sea]\n", r"classes\[0\]: 'land'; expected \{name"),
        ("classes:\n  - {name: land, color: [1, 2]}\n", r"classes\[0\]\.color: \[1, 2\]"),
        ("classes:\n  - {name: land, color: [1, 2, 256]}\n", r"classes\[0\]\.color: \[1, 2, 256\]"),
        ("classes:\n  - {name: no, color: [1, 2, 3]}\n", r"classes\[0\]\.name: False"),
        ("classes:\n  - {name: land, color: [1, 2, 3]}\n", r"names: 1 classes; expected 2"),
        (GOOD.replace("sea", "land"), r"names: land given more than once"),
        (GOOD + "ignore_index: 1\n", r"ignore_index: 1; expected a code between 2"),
        (GOOD + "ignore_index: 256\n", r"ignore_index: 256"),
        (GOOD + "ignore_index: none\n", r"ignore_index: 'none'"),
        ("classes: [\n", r"not valid YAML"),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"my\.yaml: " + message):
        Classes.from_yaml(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such class file"):
        Classes.from_yaml(tmp_path / "none.yaml")
