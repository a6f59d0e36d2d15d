"""Atomic files: everything is written under a temporary name in the same folder and renamed when complete, so that
whoever finds a file under its own name finds all of it, also after a crash. Standard library alone.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `target`, with its suffix; brought to the disk and renamed to `target` on
    success, removed on an exception. An error of the operating system that names no file comes to name `target`.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        yield partial
        _to_disk(partial, os.O_RDWR)
        os.replace(partial, target)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _to_disk(target.parent, os.O_RDONLY)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as on a full disk; not an error of ours, in words
            error.filename = str(target)
        raise
    finally:
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The folder of what is kept between runs and may be lost: IN2NECT_CACHE, or in2nect in the user's caches."""
    folder = os.environ.get("IN2NECT_CACHE")
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "in2nect")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, without the byte order mark that some programs put in front.

    Raises:
        ValueError: the file is in another encoding, or no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise ValueError(f"{path}: {found} is not UTF-8; save the file as UTF-8 text") from error
    if "\0" in text:
        raise ValueError(f"{path}: byte 0x00 at position {text.index(chr(0))} is no text; save the file as UTF-8 text")
    return text


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: str | os.PathLike[str], content: Any) -> None:
    """Writes plain values as indented JSON, atomically.

    Raises:
        ValueError: `content` holds NaN or an infinity, which JSON has no word for; give None instead.
    """
    write_text(target, json.dumps(content, indent=2, allow_nan=False) + "\n")


def disk_error(error: BaseException) -> OSError | None:
    """The error of the operating system that an exception comes from; None where it comes from none."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno is not None):
        cause = cause.__cause__ or cause.__context__
    return cause


def _to_disk(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
