"""A data set as a LightningDataModule: random crops to train on, grids to evaluate, whole rasters to predict.

Batches are a function of (seed, epoch) alone: neither the number of workers nor a resume, be it in the middle of an
epoch, changes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from in2nect.data.classes import Classes
from in2nect.data.coding import CodeLabels
from in2nect.data.crops import Augmentations, CropDataset, CropLoader, CropSampler, collate
from in2nect.data.datasets import DataSet, DatasetName, LayoutSettings, classes_of, open_dataset
from in2nect.data.folder import IMAGE_SUFFIXES
from in2nect.data.grid import GridDataset, ShapeBatchSampler
from in2nect.data.proof import File, prove
from in2nect.data.sampling import Sampling
from in2nect.data.scenes import Pair, Problem, Reading, Scene, band_count, examine, problem_error

_PROGRESS_SECONDS = 5.0  # between two lines about files that are read through


class FolderDataModule(lightning.LightningDataModule):
    """Images and labels in a folder.

    As `dataset: folder` it holds images/, labels/ and split.csv (columns image and split; the splits are train, val and
    test); docs/data.md says how the others are laid out.

    Training and evaluation batches are dict(image=uint8 (B, C, H, W), label=uint8 (B, H, W), name=list of B,
    window=(B, 4) as row, col, height, width); a prediction item is dict(path=str).

    Args:
        root: the folder; `predict` needs none where `predict_images` is given.
        classes: YAML with the class names, colours and ignored code; where it is not given, those of the data set, or
            root/classes.yaml of a folder.
        dataset: folder, loveda, vaihingen or potsdam.
        layout: which files of it are taken.
        bands: the bands of an image, counted from 1, in the order the network takes them; all where it is not given.
            Their number, and one for layout.elevation, is model.in_channels.
        mean: what is taken off each band, on the scale where an image is 0..1; where it is not given, what the encoder
            was trained with (`in2nect data check` prints that of a data set).
        std: what each band is then divided by.
        on_bad_file: what happens where a file is missing, damaged or does not fit, or a label holds what is no class:
            error stops before the first step and lists all of them, skip leaves their scenes out and says how many.
        read_through: read every file through before the first step, once: what is found is kept in the user's folder of
            caches, or in IN2NECT_CACHE. Without it, only headers are looked at, and what is wrong in the pixels stops a
            run when it is read.
        batch_size: crops or windows a batch, on each device.
        crop_size: side of a training crop, in pixels.
        samples_per_epoch: training crops an epoch, over all devices; where it is not given, as many as cover the
            training images once.
        eval_window: side of an evaluation window, in pixels; a smaller image is read as it is.
        eval_overlap: least number of pixels that neighbouring evaluation windows share.
        num_workers: processes that read ahead.
        seed: of the training crops, 0 or more.
        augmentations: how training crops may be changed.
        sampling: where training crops are taken. uniform: every pixel is about equally likely to be seen. balanced: a
            class is drawn first, each that occurs as likely as another, then one of its pixels, then a crop that shows
            it; the labels are read through once for this, and what is found is kept in the user's folder of caches, or
            in IN2NECT_CACHE. dominance: as uniform, but drawn again while one class has too large a share of the crop.
        dominance_limit: for dominance, the largest share of a crop's labelled pixels that one class may have.
        dominance_tries: for dominance, how many places are looked at in all; if none will do, the one with the
            smallest such share is taken.
        predict_images: a raster, a folder of rasters, or a list of them; where it is not given, the images of the
            test split.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        classes: str | Path | None = None,
        dataset: DatasetName = "folder",
        layout: LayoutSettings = LayoutSettings(),  # noqa: B008 - frozen
        bands: tuple[int, ...] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        on_bad_file: Literal["error", "skip"] = "error",
        read_through: bool = True,
        batch_size: int = 8,
        crop_size: int = 512,
        samples_per_epoch: int | None = None,
        eval_window: int = 512,
        eval_overlap: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        augmentations: Augmentations = Augmentations(),  # noqa: B008 - frozen
        sampling: Literal["uniform", "balanced", "dominance"] = "uniform",
        dominance_limit: float = 0.75,
        dominance_tries: int = 10,
        predict_images: list[str] | str | Path | None = None,
    ) -> None:
        super().__init__()
        self._root, self._classes_file = root, classes
        self.dataset, self.layout, self.bands = dataset, layout, bands
        self.on_bad_file, self.read_through = on_bad_file, read_through
        self.mean, self.std = _normalisation(mean, std)
        self.batch_size, self.crop_size, self.samples_per_epoch = batch_size, crop_size, samples_per_epoch
        self.eval_window, self.eval_overlap = eval_window, eval_overlap
        self.num_workers, self.seed, self.augmentations = num_workers, seed, augmentations
        self.sampling = Sampling(sampling, dominance_limit, dominance_tries)
        self.predict_images = predict_images
        self.val: GridDataset | None = None
        self._crop_loader: CropLoader | None = None
        self._resumed: dict[str, int] | None = None

    @property
    def root(self) -> Path:
        """The folder.

        Raises:
            ValueError: none was given.
        """
        if self._root is None:
            raise ValueError(
                "data.root is not given; set it to a folder of images/, labels/ and split.csv, or, with "
                "data.dataset, to that of a published data set"
            )
        return Path(self._root)

    @cached_property
    def source(self) -> DataSet:
        """The data set: its scenes by split.

        Raises:
            FileNotFoundError, ValueError: as `datasets.open_dataset`.
        """
        return open_dataset(self.dataset, self.root, classes=self._classes_file, bands=self.bands, layout=self.layout)

    @cached_property
    def classes(self) -> Classes:
        """The classes, read when they are first asked for: `predict` takes those of its checkpoint.

        Raises:
            FileNotFoundError, ValueError: no class file, or as `Classes.from_yaml`.
        """
        needs_root = self.dataset == "folder" and self._classes_file is None
        return classes_of(self.dataset, self.root if needs_root else None, self._classes_file)

    def setup(self, stage: str) -> None:
        """Read headers, and once every pixel, of the splits that a stage (fit, validate, test, predict) needs.

        Raises:
            FileNotFoundError, ValueError: files that are not usable, all of them listed; another number of bands than
                the network takes; no raster to predict.
        """
        if stage == "fit":
            splits = ["train", "val"] if self._validates() else ["train"]
            pairs = self._pairs(splits)
            self.train = self._crops(pairs["train"])
            if "val" in pairs:
                self.val = self._grid(pairs["val"])
        if stage == "validate":
            self.val = self._grid(self._pairs(["val"])["val"])
        if stage == "test":
            self.test = self._grid(self._pairs(["test"])["test"])
        if stage == "predict":
            self.predict = RasterPaths(self._sound(self._rasters_to_predict()))

    def train_dataloader(self) -> CropLoader:
        """Batches of random crops; the last, incomplete one is left out."""
        sampler = CropSampler(len(self.train), **self._process())
        trainer = self.trainer
        epoch = None if trainer is None else lambda: trainer.current_epoch
        loader = CropLoader(self.train, sampler=sampler, batch_size=self.batch_size, epoch=epoch, **self._reading())
        if self._resumed is not None:
            loader.load_state_dict(self._resumed)
        self._resumed, self._crop_loader = None, loader
        return loader

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch has come. (Lightning would keep the loader's state by itself, but makes the loader of a
        resumed run, to count its steps, before it has read the state.)
        """
        return {} if self._crop_loader is None else {"train": self._crop_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("train")

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Windows of the split val, each pixel scored once; nothing where a training has no such split."""
        return [] if self.val is None else self._grid_loader(self.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Windows of the split test, each pixel scored once."""
        return self._grid_loader(self.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        """dict(path=str), one raster an item."""
        return DataLoader(self.predict, batch_size=None)

    def _validates(self) -> bool:
        """Whether there is anything to validate on; a training goes on without."""
        if "val" in self.source.splits():
            return True
        if self.layout.train_on == "train+val":
            why = "data.layout.train_on is train+val"
        else:
            why = f"{self.layout.splits or self.root / 'split.csv'} has no image in split 'val'"
        rank_zero_warn(f"{why}: the training is not validated and there will be no best.ckpt; use last.ckpt")
        return False

    def _pairs(self, splits: list[str]) -> dict[str, list[Pair]]:
        """The labelled scenes of splits that nothing is wrong with."""
        scenes = {split: self.source.scenes(split) for split in splits}
        for split, found in scenes.items():
            if all(scene.label is None for scene in found):
                raise ValueError(
                    f"{self.root}: the labels of {self.dataset}'s split {split!r} are not public, so it cannot be "
                    "scored here; use `in2nect validate`, or `in2nect predict` for the images"
                )
        whole = [scene for found in scenes.values() for scene in found]
        sound, problems = examine(whole, self.source.reading)
        problems += self._proved([file for pair in sound for file in _files(pair, self.classes)])
        if problems and self.on_bad_file == "error":
            raise problem_error(
                problems,
                f"\n`in2nect data check {self.root} --dataset {self.dataset}` lists everything that is wrong; "
                "data.on_bad_file=skip leaves such scenes out",
            )
        wrong = {problem.path: problem for problem in problems}
        sound = [pair for pair in sound if not wrong.keys() & {pair.image, pair.label, pair.elevation}]
        pairs: dict[str, list[Pair]] = {}
        for split, found in scenes.items():
            images = {scene.image for scene in found}
            pairs[split] = [pair for pair in sound if pair.image in images]
            left = [scene for scene in found if wrong.keys() & {scene.image, scene.label, scene.elevation}]
            if left:
                first = next(wrong[path] for path in _paths(left[0]) if path in wrong)
                rank_zero_warn(
                    f"split {split!r}: {len(left)} of {len(found)} scenes left out (data.on_bad_file is skip), the "
                    f"first because of {first.message}"
                )
            if not pairs[split]:
                raise ValueError(f"split {split!r}: no scene is left; `in2nect data check` lists what is wrong")
        self._check_channels(sound)
        return pairs

    def _proved(self, files: list[File]) -> list[Problem]:
        """What is wrong in the pixels of files; one process reads them, and the others take what it found."""
        if not self.read_through:
            return []
        others = self.trainer is not None and self.trainer.world_size > 1
        first = self.trainer is None or self.trainer.is_global_zero
        if others and not first:
            self.trainer.strategy.barrier("proof")  # type: ignore[union-attr]
        problems = prove(files, progress=_progress() if first else None)
        if others and first:
            self.trainer.strategy.barrier("proof")  # type: ignore[union-attr]
        return problems

    def _check_channels(self, pairs: list[Pair]) -> None:
        """Refuses images of another number of bands than the network takes, before the first step meets them."""
        if self.trainer is None:
            return
        expected = getattr(self.trainer.lightning_module, "in_channels", None)
        extra = int(self.layout.elevation)
        found = (len(self.bands) if self.bands is not None else band_count(pairs[0].image)) + extra
        if expected is not None and found != expected:
            how = f"data.bands {list(self.bands)}" if self.bands is not None else str(pairs[0].image)
            raise ValueError(
                f"{how} gives {found} bands{' (the elevation is one of them)' if extra else ''}, and "
                f"model.in_channels is {expected}; set model.in_channels to {found}, or choose {expected - extra} "
                "bands with data.bands"
            )
        if self.mean is not None and len(self.mean) != found:
            raise ValueError(f"data.mean has {len(self.mean)} values for {found} bands; give one a band")

    def _crops(self, pairs: list[Pair]) -> CropDataset:
        pixels = sum(pair.height * pair.width for pair in pairs)
        length = self.samples_per_epoch
        if length is None:
            length = max(self.batch_size, round(pixels / self.crop_size**2))
        smallest = self.batch_size * self._process()["world_size"]
        if length < smallest:
            raise ValueError(f"samples_per_epoch: {length}; expected at least one batch on every device, {smallest}")
        return CropDataset(
            pairs,
            self.classes,
            crop_size=self.crop_size,
            length=length,
            seed=self.seed,
            augmentations=self.augmentations,
            sampling=self.sampling,
        )

    def _grid(self, pairs: list[Pair]) -> GridDataset:
        return GridDataset(pairs, self.classes, window=self.eval_window, overlap=self.eval_overlap)

    def _grid_loader(self, dataset: GridDataset) -> DataLoader[Any]:
        sampler = ShapeBatchSampler(dataset.windows, self.batch_size, **self._process())
        return DataLoader(dataset, sampler=sampler, batch_size=None, **self._reading())

    def _reading(self) -> dict[str, Any]:
        return {
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _process(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _rasters_to_predict(self) -> list[Path]:
        if self.layout.elevation:
            raise ValueError(
                "data.layout.elevation: whole scenes are predicted from one raster, which holds no elevation; write it "
                "into the images as a band of theirs, and train with `dataset: folder`"
            )
        given = self.predict_images
        if given is None:
            return self.source.images("test")
        paths = [Path(path) for path in given] if isinstance(given, list) else [Path(given)]
        if len(paths) == 1 and paths[0].is_dir():
            folder = paths[0]
            paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            if not paths:
                raise ValueError(f"predict_images: {folder} holds no raster ({', '.join(IMAGE_SUFFIXES)})")
        missing = [str(path) for path in paths if not path.is_file()]
        if missing or not paths:
            raise FileNotFoundError(
                f"predict_images: {', '.join(missing) or 'an empty list'}: no such file; "
                "give a raster, a folder of rasters or a list of rasters"
            )
        return paths

    def _sound(self, images: list[Path]) -> list[Path]:
        """The rasters to predict whose headers and pixels can be read."""
        _, problems = examine([Scene(path.stem, path, None) for path in images], Reading())
        wrong = {problem.path for problem in problems}
        problems += self._proved([(path, None) for path in images if path not in wrong])
        if not problems:
            return images
        if self.on_bad_file == "error":
            raise problem_error(problems, "\ndata.on_bad_file=skip leaves such images out")
        wrong = {problem.path for problem in problems}
        left = [path for path in images if path not in wrong]
        rank_zero_warn(
            f"{len(images) - len(left)} of {len(images)} images left out (data.on_bad_file is skip), the first because "
            f"of {problems[0].message}"
        )
        if not left:
            raise problem_error(problems, "\nno image is left to predict")
        return left


class RasterPaths(Dataset[dict[str, str]]):
    """Rasters to predict, dict(path=str) an item."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> dict[str, str]:
        return {"path": str(self.paths[number])}


def _paths(scene: Scene) -> list[Path]:
    return [path for path in (scene.image, scene.label, scene.elevation) if path is not None]


def _files(pair: Pair, classes: Classes) -> list[File]:
    """What is to be read through of a pair."""
    files: list[File] = [(pair.image, None), (pair.label, pair.coding or CodeLabels(classes))]
    return files if pair.elevation is None else [*files, (pair.elevation, None)]


def _progress() -> Callable[[int, int], None]:
    """A line every few seconds."""
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _PROGRESS_SECONDS:
            last = time.monotonic()
            print(f"{done} of {total} files read through, once (data.read_through=false leaves that out)", flush=True)

    return line


def _normalisation(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if (mean is None) != (std is None) or (mean is not None and std is not None and len(mean) != len(std)):
        raise ValueError(f"data.mean: {mean}, data.std: {std}; give both, one value a band, or neither")
    if std is not None and min(std) <= 0:
        raise ValueError(f"data.std: {list(std)}; expected values above 0")
    return mean, std
