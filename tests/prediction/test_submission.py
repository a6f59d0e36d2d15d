"""Submissions: what is written passes the check, and the check refuses, in words, whatever scores 0 or ends the
grader.
"""

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from in2nect.prediction import submission
from in2nect.prediction.submission import check_classes, check_ids, check_submission, image_ids, main, write_submission

IDS = ("4191", "4192", "5986")
SIDE = 1024


@pytest.fixture(autouse=True)
def three_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Test split of three images, not 1796; all else is LoveDA's."""
    rules = replace(submission.LOVEDA, images=len(IDS))
    monkeypatch.setattr(submission, "LOVEDA", rules)
    monkeypatch.setitem(submission.RULES, "loveda", rules)


def png(codes: np.ndarray | None = None, mode: str = "L", kind: str = "PNG") -> bytes:
    """Written by Pillow, not by us."""
    codes = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 7 if codes is None else codes
    stream = io.BytesIO()
    Image.fromarray(codes).convert(mode).save(stream, kind)
    return stream.getvalue()


def pack(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def good() -> dict[str, bytes]:
    return {f"{name}.png": png() for name in IDS}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for place, name in zip(("Urban", "Urban", "Rural"), IDS, strict=True):
        folder = tmp_path / "loveda" / "Test" / place / "images_png"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").touch()
    return tmp_path / "loveda"


def test_a_good_one_is_taken(good: dict[str, bytes], root: Path, tmp_path: Path) -> None:
    path = pack(tmp_path / "good.zip", good)
    assert check_submission(path) == [] and check_submission(path, image_ids(root)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"4191.png": None, "results/4191.png": "good"}, "results/4191.png: a folder inside the zip, which scores 0"),
        ({"results/": b""}, "results/: a folder inside the zip"),
        ({"__MACOSX/._4191.png": b"x"}, "a folder inside the zip"),
        ({"readme.txt": b"x"}, "readme.txt: not named <id>.png"),
        ({"4191.png": None, "4191.tif": "good"}, "4191.tif: not named <id>.png"),
        ({"4191.png": "seven"}, "4191.png: the value 7 at row 2, column 3, and 1 pixels in all of 7 or more"),
        ({"4191.png": "ignored"}, "4191.png: the value 255"),
        ({"4191.png": "small"}, "4191.png: 512 x 1024 pixels (width x height); expected 1024 x 1024"),
        ({"4191.png": "rgb"}, "4191.png: three channels (RGB); expected one channel"),
        ({"4191.png": "palette"}, "4191.png: a palette; expected one channel"),
        ({"4191.png": "alpha"}, "4191.png: two channels (grey, alpha)"),
        ({"4191.png": "bits"}, "4191.png: 1 bits a pixel; expected 8"),
        ({"4191.png": "deep"}, "4191.png: 16 bits a pixel; expected 8"),
        ({"4191.png": "jpeg"}, "4191.png: not a PNG"),
        ({"4191.png": b""}, "4191.png: not a PNG"),
        ({"4191.png": "cut"}, "4191.png: a damaged PNG"),
        ({"4191.png": "flipped"}, "4191.png: a damaged PNG (checksum of IDAT)"),
        ({"4191.png": None}, "1 of 3 images have no picture: 4191"),
        ({"4190.png": "good"}, "4190: no image of the Test split; take it out"),
    ],
)
def test_refusals_say_what_is_wrong(
    change: dict[str, bytes | str | None], message: str, good: dict[str, bytes], tmp_path: Path
) -> None:
    codes = np.zeros((SIDE, SIDE), dtype=np.uint8)
    seven, ignored = codes.copy(), codes.copy()
    seven[2, 3], ignored[5:] = 7, 255
    made = {
        "good": lambda: good["4192.png"],
        "seven": lambda: png(seven),
        "ignored": lambda: png(ignored),
        "small": lambda: png(codes[:, :512]),
        "rgb": lambda: png(codes, "RGB"),
        "palette": lambda: png(codes, "P"),
        "alpha": lambda: png(codes, "LA"),
        "bits": lambda: png(codes, "1"),
        "deep": lambda: png(codes.astype(np.uint16), "I;16"),
        "jpeg": lambda: png(codes, kind="JPEG"),
        "flipped": lambda: good["4192.png"][:3000] + b"\0\1\2" + good["4192.png"][3003:],
        "cut": lambda: good["4192.png"][:3000],
    }
    entries = dict(good)
    for name, content in change.items():
        entries.pop(name, None)
        if content is not None:
            entries[name] = made[content]() if isinstance(content, str) else content
    problems = check_submission(pack(tmp_path / "bad.zip", entries), IDS)
    assert any(message in problem for problem in problems), problems


def test_a_picture_twice(good: dict[str, bytes], tmp_path: Path) -> None:
    path = pack(tmp_path / "twice.zip", good)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("4191.png", good["4191.png"])
    assert check_submission(path) == ["4191: more than once in the zip; each image has one picture"]


def test_without_ids_the_number_is_checked(good: dict[str, bytes], tmp_path: Path) -> None:
    path = pack(tmp_path / "few.zip", {"4191.png": good["4191.png"]})
    assert check_submission(path) == ["1 pictures; the Test split has 3 images, and each needs one"]


def test_what_is_no_zip(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"PNG")
    assert "not a zip that can be read" in check_submission(tmp_path / "no.zip")[0]
    assert "no such file" in check_submission(tmp_path / "missing.zip")[0]


def predictions(folder: Path, values: dict[str, int]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for name, value in values.items():
        path = folder / f"{name}.tif"
        with rasterio.open(path, "w", driver="GTiff", width=SIDE, height=SIDE, count=1, dtype="uint8") as raster:
            raster.write_colormap(1, {0: (255, 0, 0)})
            raster.write(np.full((SIDE, SIDE), value, dtype=np.uint8), 1)
        paths.append(path)
    return paths


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_what_is_written_is_what_was_predicted(tmp_path: Path) -> None:
    made = predictions(tmp_path / "codes", dict(zip(IDS, (0, 6, 3), strict=True)))
    first, second = (write_submission("loveda", made, tmp_path / name) for name in ("a.zip", "b.zip"))
    assert check_submission(first, IDS) == []
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == [f"{name}.png" for name in IDS]
        for name, value in zip(IDS, (0, 6, 3), strict=True):
            with Image.open(io.BytesIO(archive.read(f"{name}.png"))) as picture:
                assert (picture.mode, picture.size) == ("L", (SIDE, SIDE))
                assert torch.from_numpy(np.array(picture)).unique().tolist() == [value]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning", "ignore:Duplicate name")
def test_nothing_is_written_that_would_be_refused(tmp_path: Path) -> None:
    made = predictions(tmp_path / "codes", {"4191": 0, "4192": 255})
    with pytest.raises(ValueError, match=r"4192.tif: the value 255 .* nodata"):
        write_submission("loveda", made, tmp_path / "out" / "a.zip")
    with pytest.raises(ValueError, match=r"a\.zip is not written: 4191: more than once"):
        write_submission("loveda", [made[0], made[0]], tmp_path / "out" / "a.zip")
    assert list((tmp_path / "out").iterdir()) == []


def test_images_that_are_not_the_split_are_refused(root: Path) -> None:
    assert image_ids(root) == sorted(IDS)
    (root / "Test" / "Rural" / "images_png" / "5986.png").unlink()
    with pytest.raises(ValueError, match="2 images, and the Test split of loveda has 3"):
        image_ids(root)
    (root / "Test" / "Rural" / "images_png" / "4191.png").touch()
    with pytest.raises(ValueError, match="4191: more than one image of this id"):
        image_ids(root)
    with pytest.raises(FileNotFoundError, match="no test image; give the root"):
        image_ids(root / "Test")
    with pytest.raises(ValueError, match="1 images, and the Test split"):
        check_ids("loveda", ["4191"])
    with pytest.raises(ValueError, match="tells 6 classes apart"):
        check_classes("loveda", 6)


def test_command(good: dict[str, bytes], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pack(tmp_path / "good.zip", good)
    assert main([str(path)]) == 0
    assert "3 pictures (which images they are was not looked at; --root does that)" in capsys.readouterr().out
    assert main([str(path), "--root", str(root)]) == 0
    assert "3 pictures; the server will take it" in capsys.readouterr().out
    bad = pack(tmp_path / "bad.zip", {**good, "4191.png": b"GIF", "x/": b""})
    assert main([str(bad), f"--root={root}"]) == 2
    told = capsys.readouterr().out
    assert "not to be sent: 2 problems" in told and "4191.png: not a PNG" in told and "x/: a folder" in told


def test_a_zip_with_a_damaged_stream_is_told(good: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in good.items():
            archive.writestr(name, content)
    content = bytearray(path.read_bytes())
    for position in range(60, 90):
        content[position] ^= 0x5A
    path.write_bytes(content)
    (problem,) = check_submission(path)
    assert problem.startswith("4191.png: cannot be read from the zip (Error -3 while decompressing")
