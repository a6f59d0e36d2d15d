"""Class names, display colours and the ignored code of a data set, read from and written to YAML.

The YAML holds `ignore_index` and a list `classes` of `{name, color: [red, green, blue]}`; a label code is a position
in that list.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from in2nect.files import read_text, write_text

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """What the label codes 0..K-1 mean.

    Args:
        names: one distinct name a class, at least two.
        colors: one (red, green, blue) a class, each 0..255, for display.
        ignore_index: the code of unlabelled pixels, 0..255 (labels are uint8) and none of 0..K-1.

    Raises:
        ValueError: with the field, what it held and what was expected.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore_index: int = 255

    def __post_init__(self) -> None:
        if not 2 <= len(self.names) <= 255:
            raise ValueError(f"names: {len(self.names)} classes; expected 2 to 255")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"names: {', '.join(repeated)} given more than once; every class needs a name of its own")
        if len(self.colors) != len(self.names):
            raise ValueError(f"colors: {len(self.colors)} for {len(self.names)} classes; give one a class")
        for name, color in zip(self.names, self.colors, strict=True):
            if not _is_color(color):
                raise ValueError(f"colors: {color!r} for class {name}; expected [red, green, blue], each 0..255")
        if not len(self.names) <= self.ignore_index <= 255:
            raise ValueError(
                f"ignore_index: {self.ignore_index}; expected a code between {len(self.names)} (the number of classes) "
                "and 255, so that it is none of the classes and fits a uint8 label"
            )

    @property
    def num_classes(self) -> int:
        """K, the number of classes; `ignore_index` is not one of them."""
        return len(self.names)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Classes:
        """Read a class file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: naming the file, the field, what it held and what was expected.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such class file; give a YAML with `ignore_index` and `classes`")
        try:
            content = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from error
        entries = _entries(path, content)
        ignore_index = content.get("ignore_index", 255)
        if type(ignore_index) is not int:
            raise ValueError(f"{path}: ignore_index: {ignore_index!r}; expected a whole number, 255 for example")
        try:
            return cls(tuple(name for name, _ in entries), tuple(color for _, color in entries), ignore_index)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the class file that `from_yaml` reads back, atomically."""
        lines = [f"ignore_index: {self.ignore_index}", "classes:"]
        for name, color in zip(self.names, self.colors, strict=True):
            entry = {"name": name, "color": list(color)}
            lines.append("  - " + yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=1000).strip())
        write_text(path, "\n".join(lines) + "\n")


def _entries(path: Path, content: Any) -> list[tuple[str, Color]]:
    """The (name, color) pairs of a parsed class file, each checked for its form."""
    if not isinstance(content, Mapping) or not isinstance(content.get("classes"), list):
        raise ValueError(f"{path}: classes: missing; expected a list of {{name: ..., color: [red, green, blue]}}")
    unknown = sorted(str(key) for key in content if key not in ("classes", "ignore_index"))
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown)}: unknown; the fields are `classes` and `ignore_index`")
    entries: list[tuple[str, Color]] = []
    for position, entry in enumerate(content["classes"]):
        field = f"{path}: classes[{position}]"
        if not isinstance(entry, Mapping) or set(entry) != {"name", "color"}:
            raise ValueError(f"{field}: {entry!r}; expected {{name: ..., color: [red, green, blue]}}")
        if not isinstance(entry["name"], str) or not entry["name"]:
            raise ValueError(f"{field}.name: {entry['name']!r}; expected text (quote it if YAML reads it otherwise)")
        if not _is_color(entry["color"]):
            raise ValueError(f"{field}.color: {entry['color']!r}; expected [red, green, blue], each 0..255")
        red, green, blue = entry["color"]
        entries.append((entry["name"], (red, green, blue)))
    return entries


def _is_color(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)


LOVEDA = Classes(
    names=("background", "building", "road", "water", "barren", "forest", "agriculture"),
    colors=((255, 255, 255), (255, 0, 0), (255, 255, 0), (0, 0, 255), (159, 129, 183), (0, 255, 0), (255, 195, 128)),
)
"""The classes and palette of LoveDA, codes as trained on (the file's value - 1)."""

ISPRS = Classes(
    names=("impervious surface", "building", "low vegetation", "tree", "car", "clutter"),
    colors=((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)),
)
"""The classes of Vaihingen and Potsdam; their label files hold these colours, and black along eroded boundaries."""
