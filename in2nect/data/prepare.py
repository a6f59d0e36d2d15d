"""Rasters rewritten as tiled, compressed GeoTIFFs with overviews, so that a window costs the tiles under it and not
the whole file: `in2nect data prepare`.

Nothing is lost: compression is lossless; CRS, transform, bands, types, nodata and colour tables stay. A target says in
its metadata which source it was made of, so a second call does only what is new or has changed.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import rasterio
import rasterio.shutil
from rasterio._err import CPLE_BaseError
from rasterio.enums import Resampling
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.io import DatasetReader

from in2nect.data.folder import IMAGE_SUFFIXES
from in2nect.data.windows import open_raster, quiet_without_georeference
from in2nect.files import replacing

LABEL_PATTERNS = ("*label*", "*mask*", "*gts*", "*ground_truth*")
_TILE = 512
_SMALLEST = 256  # side in pixels at which overviews end: they then fit a screen
_NAMESPACE, _VERSION = "IN2NECT", "1"
_BESIDES = (".csv", ".yaml", ".yml", ".txt", ".json", ".md")  # small files that go with a data set

Compression = Literal["deflate", "zstd"]


@dataclass(frozen=True)
class Job:
    """A raster to rewrite."""

    source: Path
    target: Path
    is_label: bool


def plan(
    source: Path, target: Path, labels: Sequence[str] = LABEL_PATTERNS
) -> tuple[list[Job], list[tuple[Path, Path]]]:
    """(rasters to rewrite, other files to copy) of a file or a folder with all that is in it.

    Args:
        labels: patterns of paths, below `source` and in lower case, that are labels.

    Raises:
        FileNotFoundError: no such source, or no raster in it.
        ValueError: the target is the source or lies in it, two sources have one target, or what is to be written is not
            a GeoTIFF or a folder of them.
    """
    if source.resolve() == target.resolve() or source.resolve() in target.resolve().parents:
        raise ValueError(f"{target}: is {source} or lies in it; give a folder elsewhere")
    if source.is_file():
        place = target if target.suffix and not target.is_dir() else target / f"{source.stem}.tif"
        if place.suffix.lower() not in (".tif", ".tiff"):
            raise ValueError(f"{place}: GeoTIFFs are written; give a name that ends in .tif, or a folder")
        return [Job(source, place, _is_label(source.name, labels))], []
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file, and {source} a folder; give a folder")
    jobs: dict[Path, Job] = {}
    others: list[tuple[Path, Path]] = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_dir() or any(part.startswith(".") for part in relative.parts):
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            place = target / relative.with_suffix(".tif")
            if place in jobs:
                raise ValueError(f"{jobs[place].source} and {path}: both would become {place}; rename one of them")
            jobs[place] = Job(path, place, _is_label(str(relative), labels))
        elif path.suffix.lower() in _BESIDES:
            others.append((path, target / relative))
    if not jobs:
        raise FileNotFoundError(f"{source}: no raster in it ({', '.join(IMAGE_SUFFIXES)})")
    return list(jobs.values()), others


def prepare(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    labels: Sequence[str] = LABEL_PATTERNS,
    compression: Compression = "deflate",
    workers: int | None = None,
    progress: Callable[[int, int, Path], None] | None = None,
) -> tuple[int, int, list[str]]:
    """Rewrites a raster, or a folder with all that is in it under the same names (with the suffix .tif); lists and
    class files are copied.

    Args:
        labels: as in `plan`; they get overviews of the most frequent value, images of the mean.
        workers: processes; the number of cores where it is not given.
        progress: called with (finished, total, the target) of rasters.

    Returns:
        (rasters written, rasters that were current already, what went wrong, a line a file).

    Raises:
        FileNotFoundError, ValueError: as `plan`; in a target's place there is a file that this did not write.
    """
    jobs, others = plan(Path(source), Path(target), labels)
    written, failed = 0, []
    due = [job for job in jobs if not is_current(job, compression)]
    _check_replaceable(due)
    done = len(jobs) - len(due)
    convert = partial(rewrite, compression=compression)
    for number, (job, error) in enumerate(_run(convert, due, workers or os.cpu_count() or 1), done + 1):
        written += error is None
        if error is not None:
            failed.append(error)
        if progress is not None:
            progress(number, len(jobs), job.target)
    for path, place in others:
        if not place.exists() or place.stat().st_mtime_ns < path.stat().st_mtime_ns:  # one changed since then stays
            with replacing(place) as partial_copy:
                shutil.copyfile(path, partial_copy)
    return written, done, failed


def rewrite(job: Job, compression: Compression = "deflate") -> None:
    """Rewrites one raster; the target is replaced once it is complete.

    Raises:
        OSError: the source cannot be read to its end, naming it.
    """
    with quiet_without_georeference(), replacing(job.target) as partial_file:
        try:
            with open_raster(job.source) as raster:
                options = _creation(raster, job, compression)
                factors = _factors(raster.width, raster.height)
            with rasterio.Env(GDAL_PNG_WHOLE_IMAGE_OPTIM="NO"):  # which passes over a PNG that is cut short
                rasterio.shutil.copy(job.source, partial_file, driver="GTiff", **options)
            with rasterio.Env(GDAL_TIFF_OVR_BLOCKSIZE=str(_TILE)), rasterio.open(partial_file, "r+") as output:
                if factors:
                    output.build_overviews(factors, Resampling.mode if job.is_label else Resampling.average)
                output.update_tags(ns=_NAMESPACE, **_tags(job, compression))
        except (RasterioError, CPLE_BaseError) as error:
            raise OSError(
                f"{job.source}: cannot be rewritten as {job.target} ({error.__cause__ or error}); if it is damaged, "
                "fetch it anew, or take it out"
            ) from error
        finally:
            partial_file.with_name(f"{partial_file.name}.aux.xml").unlink(missing_ok=True)


def is_current(job: Job, compression: Compression = "deflate") -> bool:
    """Whether the target is there and was made, in this way, of the source as it is now."""
    return job.source.exists() and _made_of(job.target) == _tags(job, compression)


def _made_of(target: Path) -> dict[str, str]:
    """What a raster says it was made of; nothing where there is none, or another one."""
    if not target.is_file():
        return {}
    try:
        with open_raster(target) as raster:
            return dict(raster.tags(ns=_NAMESPACE))
    except RasterioIOError:
        return {}


def _check_replaceable(jobs: Sequence[Job]) -> None:
    foreign = [job.target for job in jobs if job.target.exists() and not _made_of(job.target)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"{foreign[0]}{more}: there already, and not written by `in2nect data prepare`; nothing was written. Give "
            "another target, or move it away"
        )


def _run(convert: Callable[[Job], None], jobs: list[Job], workers: int) -> Iterator[tuple[Job, str | None]]:
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, _attempt(convert, job)
        return
    # Spawned, not forked: the progress bar and GDAL have threads of their own.
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_attempt, convert, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise OSError(
                    "a process that rewrites rasters was killed, perhaps for want of memory; try fewer --workers: what "
                    "is written stays"
                ) from error


def _attempt(convert: Callable[[Job], None], job: Job) -> str | None:
    try:
        convert(job)
    except OSError as error:
        return str(error)
    return None


def _creation(raster: DatasetReader, job: Job, compression: Compression) -> dict[str, str]:
    floating = any(dtype.startswith("float") for dtype in raster.dtypes)
    # Differences of neighbours compress pictures; labels are runs of one value, which they would only blur.
    plain = job.is_label or _is_palette(raster) or not _takes_differences(raster)
    predictor = "1" if plain else "3" if floating else "2"
    return {
        "TILED": "YES",
        "BLOCKXSIZE": str(_TILE),
        "BLOCKYSIZE": str(_TILE),
        "COMPRESS": compression.upper(),
        "PREDICTOR": predictor,
        "BIGTIFF": "IF_SAFER",
    }


def _takes_differences(raster: DatasetReader) -> bool:
    """Whether libtiff can: not of complex numbers, nor of pixels of 1, 4 or 12 bits."""
    bits = {raster.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8") for band in raster.indexes}
    return bits <= {"8", "16", "32", "64"} and not any(dtype.startswith("complex") for dtype in raster.dtypes)


def _is_palette(raster: DatasetReader) -> bool:
    return raster.colorinterp[0].name == "palette"


def _factors(width: int, height: int) -> list[int]:
    factors, factor = [], 2
    while max(width, height) / factor >= _SMALLEST:
        factors.append(factor)
        factor *= 2
    return factors


def _tags(job: Job, compression: Compression) -> dict[str, str]:
    stat = job.source.stat()
    kind = "label" if job.is_label else "image"
    made_of = f"{job.source.name} {stat.st_size} {stat.st_mtime_ns}"
    return {"SOURCE": made_of, "AS": f"{_VERSION} {kind} {compression}"}


def _is_label(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(path.lower(), pattern) for pattern in patterns)
