"""What a test server takes: written from predictions, and checked before it is sent.

LoveDA: a zip of one PNG for each image of the Test split, `<id>.png`, flat, one channel of uint8, values 0..6. A folder
in the zip scores 0, and a value of 7 ends the grader. The check decodes every picture: a few milliseconds each.
"""

import argparse
import struct
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
from rasterio.io import MemoryFile

from in2nect.data.windows import open_raster
from in2nect.files import replacing

SubmissionName = Literal["loveda"]


@dataclass(frozen=True)
class Rules:
    """What a server expects.

    Attributes:
        images: how many there are in the test split.
        side: of an image, in pixels.
        classes: values are 0..classes - 1.
        pattern: where the test images lie below the root of the data set.
    """

    images: int
    side: int
    classes: int
    pattern: str


LOVEDA = Rules(images=1796, side=1024, classes=7, pattern="Test/*/images_png/*")
RULES: dict[str, Rules] = {"loveda": LOVEDA}

_SUFFIXES = (".png", ".tif", ".tiff")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY = 0
_COLOR_TYPES = {0: "grey", 2: "three channels (RGB)", 3: "a palette", 4: "two channels (grey, alpha)", 6: "RGBA"}
_SHOWN = 20  # of the problems on the console


def check_submission(
    path: str | Path, ids: Collection[str] | None = None, name: SubmissionName = "loveda"
) -> list[str]:
    """What is wrong with a zip, in words; an empty list if it can be sent.

    Args:
        path: the zip.
        ids: of the images it must hold, `image_ids`; None checks how many there are, but not which.
        name: whose rules hold.
    """
    rules, path = RULES[name], Path(path)
    if not path.is_file():
        return [f"{path}: no such file"]
    try:
        with zipfile.ZipFile(path) as archive:
            return [*_wrong_names(archive.namelist(), rules, ids), *_wrong_pictures(archive, rules)]
    except zipfile.BadZipFile as error:
        return [f"{path}: not a zip that can be read ({error}); write it anew"]


def write_submission(name: SubmissionName, predictions: Iterable[Path], target: str | Path) -> Path:
    """Writes the zip from rasters of class codes `<id>.tif`. The same predictions give the same bytes.

    Raises:
        ValueError: a prediction that the server would not take; nothing is written then.
        OSError: a prediction that cannot be read.
    """
    rules, target, ids = RULES[name], Path(target), []
    with replacing(target) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
            for path in predictions:
                with open_raster(path) as raster:
                    codes = raster.read(1)
                _check_codes(codes, path, rules)
                entry = zipfile.ZipInfo(f"{path.stem}.png")  # dated 1980
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, _png(codes))
                ids.append(path.stem)
        problems = check_submission(partial, ids, name)
        if problems:
            raise ValueError(f"{target} is not written: {_listed(problems)}")
    return target


def image_ids(root: str | Path, name: SubmissionName = "loveda") -> list[str]:
    """The ids of the test images below the root of a data set, sorted.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one is there twice, or there are not as many as the split has.
    """
    rules = RULES[name]
    found = sorted(path.stem for path in Path(root).glob(rules.pattern) if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{Path(root) / rules.pattern}: no test image; give the root of the data set")
    check_ids(name, found)
    return found


def check_ids(name: SubmissionName, ids: Sequence[str]) -> None:
    """Refuses images, by their ids, that cannot be the whole test split.

    Raises:
        ValueError: an id that is there twice, or another number of images than the split has.
    """
    twice = [image for image, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{_some(twice)}: more than one image of this id; a submission holds each once")
    if len(ids) != RULES[name].images:
        raise ValueError(
            f"{len(ids)} images, and the Test split of {name} has {RULES[name].images}; a submission holds all of "
            "them: give data.predict_images (or data.root) the whole split, Urban and Rural"
        )


def check_classes(name: SubmissionName, num_classes: int) -> None:
    """Refuses a network of other classes than the server's.

    Raises:
        ValueError: another number of classes.
    """
    if num_classes != RULES[name].classes:
        raise ValueError(
            f"the network tells {num_classes} classes apart and a submission to {name} holds {RULES[name].classes}; "
            "predict with a network that was trained on that data set"
        )


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Checks a zip from the command line; returns 0 if it can be sent, 2 if not.

    Args:
        arguments: ZIP [--root DIR]; None for those of the process.
        prog: the command's name in its help.

    Raises:
        FileNotFoundError, ValueError: a root without the whole Test split, as `image_ids`.
    """
    given = command_parser(prog).parse_args(arguments)
    ids = None if given.root is None else image_ids(given.root)
    problems = check_submission(given.zip, ids)
    if problems:
        print(f"{given.zip}: not to be sent: {_listed(problems)}")
        return 2
    known = "" if ids is not None else " (which images they are was not looked at; --root does that)"
    print(f"{given.zip}: {LOVEDA.images} pictures{known}; the server will take it")
    return 0


def command_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options of `main`."""
    parser = argparse.ArgumentParser(prog=prog, description="Says whether LoveDA's test server would take a zip.")
    parser.add_argument("zip", type=Path, help="the submission")
    parser.add_argument("--root", type=Path, help="root of LoveDA: whether every Test image is in, and no other")
    return parser


def _wrong_names(names: Sequence[str], rules: Rules, ids: Collection[str] | None) -> Iterator[str]:
    nested = [name for name in names if "/" in name or "\\" in name]
    if nested:
        yield f"{_some(nested)}: a folder inside the zip, which scores 0; put the pictures at its top level"
    flat = [name for name in names if name not in nested]
    foreign = [name for name in flat if not name.endswith(".png")]
    if foreign:
        yield f"{_some(foreign)}: not named <id>.png; leave other files out"
    pictures = [name.removesuffix(".png") for name in flat if name.endswith(".png")]
    twice = [image for image, count in Counter(pictures).items() if count > 1]
    if twice:
        yield f"{_some(twice)}: more than once in the zip; each image has one picture"
    found = set(pictures)
    if ids is None:
        if len(found) != rules.images:
            yield f"{len(found)} pictures; the Test split has {rules.images} images, and each needs one"
        return
    missing, extra = sorted(set(ids) - found), sorted(found - set(ids))
    if missing:
        yield f"{len(missing)} of {len(set(ids))} images have no picture: {_some(missing)}; predict the whole split"
    if extra:
        yield f"{_some(extra)}: no image of the Test split; take {'it' if len(extra) == 1 else 'them'} out"


def _wrong_pictures(archive: zipfile.ZipFile, rules: Rules) -> Iterator[str]:
    for entry in archive.infolist():
        if entry.filename.endswith(".png") and "__MACOSX" not in entry.filename:
            try:
                problem = _wrong_picture(archive.read(entry), rules)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
                # damaged, encrypted, exotic
                problem = f"cannot be read from the zip ({error}); write it anew"
            if problem:
                yield f"{entry.filename}: {problem}"


def _wrong_picture(content: bytes, rules: Rules) -> str | None:
    if content[:8] != _SIGNATURE or len(content) < 26:
        return "not a PNG; write it as one (renaming another format is not enough)"
    width, height, depth, color = struct.unpack(">IIBB", content[16:26])
    if color != _GREY:
        return f"{_COLOR_TYPES.get(color, f'colour type {color}')}; expected one channel of class codes"
    if depth != 8:
        return f"{depth} bits a pixel; expected 8 (uint8)"
    if (width, height) != (rules.side, rules.side):
        return f"{width} x {height} pixels (width x height); expected {rules.side} x {rules.side}, as the images"
    try:
        _check_whole(content)
        with _quiet(), MemoryFile(content) as memory, memory.open() as picture:
            codes = picture.read(1)
    except (ValueError, struct.error, zlib.error, RasterioIOError) as error:
        return f"a damaged PNG ({error}); write it anew"
    return _wrong_codes(codes, rules)


def _check_whole(content: bytes) -> None:
    """Walks over the chunks of a PNG, because GDAL reads one that is cut short without a word.

    Raises:
        ValueError, struct.error, zlib.error: it is damaged.
    """
    position, pixels, name = len(_SIGNATURE), zlib.decompressobj(), b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", content, position)
        data = content[position + 8 : position + 8 + length]
        (stored,) = struct.unpack_from(">I", content, position + 8 + length)
        if stored != zlib.crc32(name + data):
            raise ValueError(f"checksum of {name.decode('ascii', 'replace')}")
        if name == b"IDAT":
            pixels.decompress(data)
        position += length + 12
    if not pixels.eof:
        raise ValueError("its pixels end early")


def _wrong_codes(codes: NDArray[np.uint8], rules: Rules) -> str | None:
    foreign = codes >= rules.classes
    if not foreign.any():
        return None
    row, column = np.argwhere(foreign)[0]
    return (
        f"the value {codes[row, column]} at row {row}, column {column}, and {int(foreign.sum())} pixels in all of "
        f"{rules.classes} or more; expected 0..{rules.classes - 1} (the label files' values less 1)"
    )


def _check_codes(codes: NDArray[np.uint8], path: Path, rules: Rules) -> None:
    problem = _wrong_codes(codes, rules)
    if problem:
        raise ValueError(f"{path}: {problem}. Pixels that are nodata in the image have no class: predict it without")


def _png(codes: NDArray[np.uint8]) -> bytes:
    height, width = codes.shape
    with _quiet(), MemoryFile(ext=".png") as memory:
        with memory.open(driver="PNG", width=width, height=height, count=1, dtype="uint8") as picture:
            picture.write(codes, 1)
        return bytes(memory.read())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _listed(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n  ".join([f"{len(problems)} problems", *problems[:_SHOWN], *more])


def _quiet() -> warnings.catch_warnings:
    """A picture without a georeference is what is wanted here."""
    return warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
