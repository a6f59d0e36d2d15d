"""Fetches the archives of LoveDA, proves them by their md5 and unpacks them: `in2nect data download`.

A download that breaks off goes on where it stopped; a folder appears under its own name when all of it is there.
Standard library alone.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOVEDA_URL = "https://zenodo.org/records/5706578/files/"
LOVEDA_MD5 = {
    "Train": "de2b196043ed9b4af1690b3f9a7d558f",
    "Val": "84cae2577468ff0b5386758bb386d31d",
    "Test": "a489be0090465e01fb067795d24e6b47",
}
_CHUNK = 1 << 20
_ATTEMPTS = 5  # at a connection that breaks off; each goes on behind the last
_TIMEOUT = 60.0  # seconds without a byte

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, bytes done, bytes in all or 0)."""


@dataclass(frozen=True)
class Archive:
    """A zip at an address, which holds the folder `name`."""

    name: str
    url: str
    md5: str


def download_loveda(
    root: str | os.PathLike[str],
    *,
    base_url: str = LOVEDA_URL,
    parts: tuple[str, ...] = ("Train", "Val", "Test"),
    keep_archives: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Fetches and unpacks parts of LoveDA into `root`; those whose folder is there are left alone.

    Args:
        base_url: where Train.zip, Val.zip and Test.zip lie.
        keep_archives: leave the zips in `root`.

    Returns:
        The folders that were unpacked.

    Raises:
        ValueError: another part, or an archive that is not what it should be.
        OSError: the network or the disk; a second call goes on where this one stopped.
    """
    unknown = sorted(set(parts) - set(LOVEDA_MD5))
    if unknown:
        raise ValueError(f"parts: {', '.join(unknown)}; expected some of {', '.join(LOVEDA_MD5)}")
    root, done = Path(root), []
    root.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if (root / part).exists():
            continue
        archive = Archive(part, f"{base_url.rstrip('/')}/{part}.zip", LOVEDA_MD5[part])
        path = fetch(archive, root / f"{part}.zip", progress)
        done.append(unpack(archive, path, root, progress))
        if not keep_archives:
            path.unlink()
    return done


def fetch(archive: Archive, target: Path, progress: Progress | None = None) -> Path:
    """Fetches an archive to `target`, by way of `target`.part, which a later call goes on with.

    Raises:
        ValueError: what came has another md5, also when fetched anew from the beginning.
        OSError: the server or the connection failed.
    """
    report = progress or (lambda what, done, total: None)
    partial = target.with_name(f"{target.name}.part")
    if target.is_file() and _md5(target, report) == archive.md5:
        return target
    resumed = partial.is_file()
    _fetch(archive.url, partial, report)
    found = _md5(partial, report)
    if found != archive.md5 and resumed:  # the part may be of another file
        partial.unlink()
        _fetch(archive.url, partial, report)
        found = _md5(partial, report)
    if found != archive.md5:
        partial.unlink()
        raise ValueError(
            f"{archive.url}: md5 {found}; expected {archive.md5}. What came is not the archive (a page of an error, or "
            "a changed file) and was removed; try again, or give another --base_url"
        )
    os.replace(partial, target)
    return target


def unpack(archive: Archive, path: Path, root: Path, progress: Progress | None = None) -> Path:
    """Unpacks a zip to `root`/NAME by way of a hidden folder beside it.

    Raises:
        ValueError: a member that would lie elsewhere, a link, or no folder of that name.
        OSError: the disk has not enough room, or a member is damaged.
    """
    report = progress or (lambda what, done, total: None)
    target, hidden = root / archive.name, root / f".{archive.name}.partial"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as content:
            members = content.infolist()
            for member in members:
                _refuse_outside(path, member)
            size, free = sum(member.file_size for member in members), shutil.disk_usage(root).free
            if size > free:
                raise OSError(
                    f"{root}: {free / 1e9:.1f} GB free, and {path.name} unpacks to {size / 1e9:.1f} GB; make room"
                )
            done = 0
            for member in members:
                content.extract(member, hidden)
                done += member.file_size
                report(f"unpacking {path.name}", done, size)
        inside = hidden / archive.name
        if not inside.is_dir():
            inside = hidden if any((hidden / place).is_dir() for place in ("Urban", "Rural")) else inside
        if not inside.is_dir():
            raise ValueError(f"{path}: holds no folder {archive.name}, Urban or Rural; it is not LoveDA's")
        os.replace(inside, target)
    except zipfile.BadZipFile as error:
        raise OSError(f"{path}: damaged ({error}); delete it and fetch it anew") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return target


def _fetch(url: str, partial: Path, report: Progress) -> None:
    """Brings `partial` to the size of the file at `url`, going on where it ends."""
    for attempt in range(1, _ATTEMPTS + 1):
        before = partial.stat().st_size if partial.is_file() else 0
        try:
            if _fetch_rest(url, partial, report):
                return
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            raise OSError(f"{url}: the server answers {error.code} {error.reason}; see --base_url") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error))
        have = partial.stat().st_size if partial.is_file() else 0
        if attempt == _ATTEMPTS or have == before == 0:
            break
        time.sleep(min(attempt, 3) * 0.5)
    raise OSError(f"{url}: {reason}; {have} bytes are kept, and the same command goes on from there")


def _fetch_rest(url: str, partial: Path, report: Progress) -> bool:
    """One request; whether the file is then complete."""
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            if whole == str(have):
                return True
            partial.unlink()
            return False
        raise
    with answer:
        goes_on = answer.status == http.client.PARTIAL_CONTENT and _starts_at(answer, have)
        if not goes_on:
            have = 0  # a server that knows no ranges sends everything
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else 0
        with partial.open("ab" if goes_on else "wb") as stream:
            while chunk := answer.read(_CHUNK):
                stream.write(chunk)
                have += len(chunk)
                report(f"fetching {partial.name.removesuffix('.part')}", have, total)
            stream.flush()
            os.fsync(stream.fileno())
    return not total or have == total


def _starts_at(answer: http.client.HTTPResponse, position: int) -> bool:
    return (answer.headers.get("Content-Range") or "").startswith(f"bytes {position}-")


def _md5(path: Path, report: Progress) -> str:
    digest, done, size = hashlib.md5(usedforsecurity=False), 0, path.stat().st_size
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report(f"checking {path.name.removesuffix('.part')}", done, size)
    return digest.hexdigest()


def _refuse_outside(path: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename.replace("\\", "/")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or ":" in parts[0] or stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError(
            f"{path}: holds {member.filename!r}, which would lie outside the folder it is unpacked to, or is a link; "
            "nothing was unpacked"
        )
