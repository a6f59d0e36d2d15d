"""`in2nect data check | prepare | download | check-submission`: the command lines over `check`, `prepare`, `download`
and `prediction.submission`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from in2nect.data.datasets import DatasetName, LayoutSettings

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from in2nect.data.check import Report, SplitReport

_SUBMISSION = "check-submission"
_SUMMARY = """usage: in2nect data COMMAND [OPTIONS]

  check     read every file of a data set and say what is in it and what is wrong
  prepare   rewrite rasters as tiled, compressed GeoTIFFs with overviews
  download  fetch LoveDA, prove it and unpack it
  check-submission  say whether LoveDA's test server would take a zip of predictions

in2nect data COMMAND --help explains the options of one; all of them follow. docs/data.md tells how the data sets
are laid out. None of them comes with in2nect: each has a licence of its own.
"""


@dataclass(frozen=True)
class CheckSettings:
    """Reads every file of a data set and says what is in it and what is wrong; exit code 2 where something is.

    Attributes:
        dataset: folder, loveda, vaihingen or potsdam.
        layout: which files of it are taken, as data.layout of `in2nect fit`.
        classes: class file in place of the data set's own; root/classes.yaml for a folder.
        bands: the bands of an image, counted from 1; null for all.
        workers: threads that read; null for as many as there are cores.
        json: also write everything to this file.
    """

    dataset: DatasetName = "folder"
    layout: LayoutSettings = LayoutSettings()  # noqa: RUF009 - frozen
    classes: str | None = None
    bands: tuple[int, ...] | None = None
    workers: int | None = None
    json: str | None = None


@dataclass(frozen=True)
class PrepareSettings:
    """Rewrites a raster, or all of a folder under the same names, as tiled, compressed GeoTIFFs with overviews.
    Nothing is lost, and what is there and current is left alone.

    Attributes:
        labels: patterns of paths that are labels, whose overviews show the most frequent value.
        compression: deflate, which everything reads, or zstd, which is faster.
        workers: processes; null for as many as there are cores.
    """

    labels: tuple[str, ...] = ("*label*", "*mask*", "*gts*", "*ground_truth*")
    compression: Literal["deflate", "zstd"] = "deflate"
    workers: int | None = None


@dataclass(frozen=True)
class DownloadSettings:
    """Fetches Train.zip, Val.zip and Test.zip of LoveDA (CC BY-NC-SA 4.0: for academic use), proves them by their md5
    and unpacks them. What broke off goes on; a folder that is there is left alone.

    Attributes:
        root: folder that Train, Val and Test come to lie in.
        base_url: where the archives lie.
        parts: those to fetch.
        keep_archives: leave the archives in root.
    """

    root: str
    base_url: str = "https://zenodo.org/records/5706578/files/"
    parts: tuple[Literal["Train", "Val", "Test"], ...] = ("Train", "Val", "Test")
    keep_archives: bool = False


def main(arguments: Sequence[str]) -> int:
    """Runs `in2nect data` with its arguments; returns 0, or 2 where something is wrong with the data."""
    commands = {"check": _check, "prepare": _prepare, "download": _download}
    command, *rest = list(arguments) or [""]
    if command == _SUBMISSION:
        from in2nect.prediction.submission import main as check_submission

        return check_submission(rest, f"in2nect data {_SUBMISSION}")
    if command in ("", "-h", "--help"):
        print(_SUMMARY)
        for name in commands:
            _parser(name).print_help()
            print()
        _submission_help()
        return 0 if command else 2
    if command not in commands:
        raise ValueError(
            f"in2nect data has no command {command!r}; expected one of {', '.join([*commands, _SUBMISSION])}"
        )
    return commands[command](rest)


def _submission_help() -> None:
    from in2nect.prediction.submission import command_parser

    command_parser(f"in2nect data {_SUBMISSION}").print_help()


def _parser(command: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    settings = {"check": CheckSettings, "prepare": PrepareSettings, "download": DownloadSettings}[command]
    text = " ".join((settings.__doc__ or "").split("Attributes:")[0].split())
    parser = ArgumentParser(prog=f"in2nect data {command}", description=text)
    if command == "check":
        parser.add_argument("root", type=str, help="Folder that holds the data set.")
        parser.add_argument("--config", type=str, help="Configuration of a training: what it does not say is default.")
    if command == "prepare":
        parser.add_argument("source", type=str, help="A raster, or a folder of them.")
        parser.add_argument("target", type=str, help="A GeoTIFF or a folder to write.")
    if command == "download":
        parser.add_argument("dataset", type=Literal["loveda"], help="Vaihingen and Potsdam are given out on request.")
    parser.add_class_arguments(settings)
    return parser


def _check(arguments: list[str]) -> int:
    from in2nect.data.check import check_dataset
    from in2nect.data.datasets import open_dataset
    from in2nect.files import write_json

    parser = _parser("check")
    config = parser.parse_args(_with_underscores(arguments)).config
    if config is not None:
        parser.set_defaults(_data_settings(config))
    given = parser.parse_args(_with_underscores(arguments))
    layout = LayoutSettings(**given.layout.as_dict())
    dataset = open_dataset(given.dataset, given.root, classes=given.classes, bands=given.bands, layout=layout)
    with _progress("files read") as progress:
        report = check_dataset(dataset, workers=given.workers, progress=lambda done, total: progress("", done, total))
    _print_report(report)
    if given.json is not None:
        write_json(given.json, report.as_json())
    return 2 if report.problems else 0


def _prepare(arguments: list[str]) -> int:
    from in2nect.data.prepare import prepare

    given = _parser("prepare").parse_args(_with_underscores(arguments))
    with _progress("rasters") as progress:
        written, current, failed = prepare(
            given.source,
            given.target,
            labels=given.labels,
            compression=given.compression,
            workers=given.workers,
            progress=lambda done, total, path: progress(path.name, done, total),
        )
    print(f"{given.target}: {written} rasters written, {current} current already")
    for line in failed:
        print(f"in2nect: {line}", file=sys.stderr)
    return 2 if failed else 0


def _download(arguments: list[str]) -> int:
    from in2nect.data.download import download_loveda

    given = _parser("download").parse_args(_with_underscores(arguments))
    with _progress("") as progress:
        done = download_loveda(
            given.root,
            base_url=given.base_url,
            parts=tuple(given.parts),
            keep_archives=given.keep_archives,
            progress=progress,
        )
    there = [part for part in given.parts if part not in {path.name for path in done}]
    print("\n".join([*map(str, done), *(f"{given.root}/{part} is there already" for part in there)]))
    return 0


def _with_underscores(arguments: list[str]) -> list[str]:
    """Options under the names of their settings: --base-url is --base_url, --root=DIR stays."""
    return [_with_underscore(argument) if argument.startswith("--") else argument for argument in arguments]


def _with_underscore(argument: str) -> str:
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _data_settings(path: str) -> dict[str, Any]:
    """What a training's configuration says about its data set."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    from in2nect.files import read_text

    try:
        content = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    data = content.get("data") or {} if isinstance(content, dict) else None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: no configuration of a training; expected a mapping with `data`, as in configs/")
    found = {name: data[name] for name in ("dataset", "classes", "bands") if data.get(name) is not None}
    return found | {f"layout.{name}": value for name, value in (data.get("layout") or {}).items()}


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar where somebody watches it, a line every few seconds in a log."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def line(what: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 5:
                last = time.monotonic()
                print(
                    " ".join(filter(None, [what, f"{done} of {total or 'an unknown number'}", unit])), file=sys.stderr
                )

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda what, done, total: bar.update(task, description=what or unit, completed=done, total=total or None)


def _print_report(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    classes = report.dataset.classes
    console.print(f"{report.dataset.name} in {report.dataset.root}")
    for name, split in report.splits.items():
        console.print(f"\n{name}: {split.scenes} scenes" + _unlabelled(split))
        console.print(f"  height x width: {_counts(split.sizes)}")
        console.print(f"  CRS: {_counts(split.crs)}")
        for band, (mean, std) in enumerate(zip(split.mean, split.std, strict=True), 1):
            console.print(f"  band {band}: mean {mean:.4f}, std {std:.4f} (of 0..1)")
        if split.long_tail_ratio is None:
            continue
        table = Table(box=None, pad_edge=False)
        for column in ("class", "pixels", "%"):
            table.add_column(column, justify="left" if column == "class" else "right")
        for class_name, pixels in zip([*classes.names, "(ignored)"], split.pixels.tolist(), strict=True):
            table.add_row(class_name, f"{pixels:,}", f"{100 * pixels / max(int(split.pixels.sum()), 1):.2f}")
        console.print(table)
        console.print(f"  most to least frequent class: {split.long_tail_ratio:.1f} to 1")
    for note in report.notes:
        console.print(f"\nnote: {note}", markup=False)
    if not report.problems:
        console.print("\nnothing is wrong")
        return
    console.print(f"\n{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}:")
    for split_name, problem in report.problems:
        console.print(f"  {split_name}: {problem.message}", markup=False)


def _unlabelled(split: SplitReport) -> str:
    return f", {split.unlabelled} without labels" if split.unlabelled else ""


def _counts(counts: dict[str, int]) -> str:
    most = sorted(counts, key=lambda key: -counts[key])
    shown = ", ".join(f"{key} ({counts[key]})" for key in most[:6])
    return (shown or "none read") + (f" and {len(most) - 6} others" if len(most) > 6 else "")
