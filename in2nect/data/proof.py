"""Proves, before a run begins, that files can be read to their end and that labels hold nothing but classes.

Decodes every file once, in threads and by bands of rows. What was found is kept on the disk under a name made of the
files' paths, sizes and times of change, so that the next run on them begins at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import rasterio

from in2nect.data.coding import LabelCoding
from in2nect.data.scenes import Problem, telling
from in2nect.data.windows import bands_of_rows, open_raster, quiet_without_georeference
from in2nect.files import cache_folder, write_json

File = tuple[Path, LabelCoding | None]
"""A raster and, if it is a label, what it holds."""

_FORMAT = 1  # of what is kept, part of its name


def prove(
    files: Sequence[File], *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """What is wrong in the pixels of files, in their order; at most one problem a file.

    Args:
        files: rasters that can be opened, as `scenes.examine` says.
        workers: threads; the number of cores where it is not given.
        progress: called with (files read, files in all); not where it is known from before.
    """
    kept = kept_at(files)
    found = _load(kept)
    if found is None:
        found = _read(files, workers, progress)
        try:
            write_json(kept, {str(number): [problem.kind, problem.message] for number, problem in found.items()})
        except OSError as error:
            warnings.warn(
                f"{kept}: cannot be written ({error}); the files will be read through at every start. Set "
                "IN2NECT_CACHE to a folder that can be written",
                stacklevel=2,
            )
        return [found[number] for number in sorted(found)]
    return [Problem(files[number][0], problem.kind, problem.message) for number, problem in sorted(found.items())]


def kept_at(files: Sequence[File]) -> Path:
    """The file that what was found in these is kept in."""
    parts: list[object] = [_FORMAT]
    for path, coding in files:
        found = path.stat()
        parts.append([str(path.resolve()), found.st_size, found.st_mtime_ns, repr(coding)])
    return cache_folder() / "proved" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"


def _read(
    files: Sequence[File], workers: int | None, progress: Callable[[int, int], None] | None
) -> dict[int, Problem]:
    found: dict[int, Problem] = {}
    with quiet_without_georeference(), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = {pool.submit(_read_through, *file): number for number, file in enumerate(files)}
        for done, future in enumerate(as_completed(futures), 1):
            problem = future.result()
            if problem is not None:
                found[futures[future]] = problem
            if progress is not None:
                progress(done, len(files))
    return found


def _read_through(path: Path, coding: LabelCoding | None) -> Problem | None:
    problems: list[Problem] = []
    # GDAL decodes a PNG in one go otherwise, and then proves no checksums.
    with rasterio.Env(GDAL_PNG_WHOLE_IMAGE_OPTIM="NO"), telling(path, problems), open_raster(path) as source:
        for window in bands_of_rows(source):
            values = source.read(window=window)
            if coding is not None:
                coding(values, path)
    return problems[0] if problems else None


def _load(kept: Path) -> dict[int, Problem] | None:
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
        return {int(number): Problem(kept, kind, message) for number, (kind, message) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
