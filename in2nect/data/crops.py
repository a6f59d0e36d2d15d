"""Random training crops, each a pure function of (seed, epoch, index): the same for any number of workers and after a
resume.

The augmentations are those of the In2NeCT paper: random scale, flips and rotation; photometric jitter is an option.
Scale is applied while reading (the window under the crop is resampled by the raster library), so a crop costs the
blocks under its window: milliseconds, and memory for the window alone. `sampling.Sampling` says where crops are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from in2nect.data.classes import Classes
from in2nect.data.coding import CodeLabels
from in2nect.data.sampling import Cell, LabelIndex, Sampling, dominant_share
from in2nect.data.scenes import Pair, read_image, read_label
from in2nect.data.windows import RasterCache, Window

Sample = dict[str, Any]


@dataclass(frozen=True)
class Augmentations:
    """How a training crop may be changed.

    Args:
        scales: magnifications, one drawn a crop; 0.5 shows twice the ground in each direction.
        horizontal_flip: mirror left and right, one crop in two.
        vertical_flip: mirror up and down, one crop in two.
        quarter_turns: turn by 0, 90, 180 or 270 degrees, equally likely.
        rotation: turn further by up to this many degrees either way, 0..180. A wider window is read so that no corner
            is empty.
        brightness: multiply the image by a factor of up to this much below or above 1, 0 to 1; 0 leaves it alone, as
            for the next three.
        contrast: the same for the distance of every value from the image's mean.
        saturation: the same for the distance of colours from grey; for images of three bands.
        hue: turn colours by up to this share of the colour circle either way, 0 to 0.5; for images of three bands.
    """

    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    horizontal_flip: bool = True
    vertical_flip: bool = True
    quarter_turns: bool = True
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(
                f"scales: {self.scales}; expected at least one, all above 0 ((1.0,) leaves the scale alone)"
            )
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation: {self.rotation}; expected degrees in 0..180")
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 0 (none) to {most}")

    @property
    def jitters(self) -> bool:
        """Whether there is any photometric jitter."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))


class _View(NamedTuple):
    """A square of `side` pixels over one of `ground` pixels of the image, to be turned by `angle` degrees and cut to
    the crop's size.
    """

    side: int
    ground: int
    angle: float


class _Span(NamedTuple):
    """A view along one axis: [start, start + extent) of the image comes to `size` pixels, with padding around."""

    start: int
    extent: int
    before: int
    after: int
    size: int


class _Place(NamedTuple):
    """A view of an image."""

    pair: Pair
    rows: _Span
    cols: _Span

    @property
    def window(self) -> Window:
        return self.rows.start, self.cols.start, self.rows.extent, self.cols.extent

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.size, self.cols.size


class CropDataset(Dataset[Sample]):
    """Random crops of the images of a split.

    Item `epoch * length + index` is crop `index` of that epoch; `CropSampler` yields these numbers. Drawn uniformly,
    an image has a probability proportional to its area, and a window any place inside it; `sampling.Sampling` knows
    two other ways. Where an image is smaller than the window, it is read whole and its surroundings are its
    reflection, labelled `ignore_index`.

    Args:
        pairs: images with labels, `folder.split_pairs`.
        crop_size: side of the crops, in pixels.
        length: crops an epoch.
        seed: 0 or more.
        sampling: where crops are taken; for `balanced` the labels are read through once, see `sampling.LabelIndex`.

    Items are dict(image=uint8 (C, H, W), label=uint8 (H, W), name=str, window=(row, col, height, width) in the
    image's pixels).
    """

    def __init__(
        self,
        pairs: list[Pair],
        classes: Classes,
        *,
        crop_size: int,
        length: int,
        seed: int = 0,
        augmentations: Augmentations | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        for name, value, least in (("crop_size", crop_size, 1), ("length", length, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: {value}; expected at least {least}")
        self.pairs, self.classes = pairs, classes
        self.crop_size, self.length, self.seed = crop_size, length, seed
        self.augmentations = augmentations or Augmentations()
        self.sampling = sampling or Sampling()
        self._area_below = np.cumsum([pair.height * pair.width for pair in pairs])
        self._index = LabelIndex.of(pairs, classes) if self.sampling.method == "balanced" else None
        self._rasters = RasterCache()
        self._codes = CodeLabels(classes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> Sample:
        epoch, index = divmod(item, self.length)
        return self._crop(np.random.default_rng((self.seed, epoch, index)))

    def _crop(self, rng: np.random.Generator) -> Sample:
        options = self.augmentations
        cell = self._index.draw(rng) if self._index is not None else None
        pair = self.pairs[cell.image] if cell is not None else self._draw_image(rng)
        scale = float(rng.choice(options.scales))
        flip_columns, flip_rows = rng.random(2) < 0.5
        turns = int(rng.integers(4))
        angle = float(rng.uniform(-options.rotation, options.rotation))
        # A square turned by `angle` fits into one larger by |cos| + |sin|.
        extent = abs(math.cos(math.radians(angle))) + abs(math.sin(math.radians(angle)))
        side = math.ceil(round(self.crop_size * extent, 6))
        view = _View(side, max(1, round(side / scale)), angle)
        if cell is not None:
            place = self._around(rng, cell, view)
        elif self.sampling.method == "dominance":
            place = self._mixed(rng, pair, view)
        else:
            place = _anywhere(rng, pair, view)
        image, label = self._read(place, view)
        if angle:
            image, label = self._rotate(image, label, angle)
        if options.horizontal_flip and flip_columns:
            image, label = v2.functional.horizontal_flip(image), v2.functional.horizontal_flip(label)
        if options.vertical_flip and flip_rows:
            image, label = v2.functional.vertical_flip(image), v2.functional.vertical_flip(label)
        if options.quarter_turns:
            image, label = torch.rot90(image, turns, (-2, -1)), torch.rot90(label, turns, (-2, -1))
        if options.jitters:
            image = _jitter(rng, image.as_subclass(Tensor), options, place.pair)
        return {
            "image": image.as_subclass(Tensor).contiguous(),
            "label": label.as_subclass(Tensor)[0].contiguous(),
            "name": place.pair.name,
            "window": torch.tensor(place.window),
        }

    def _draw_image(self, rng: np.random.Generator) -> Pair:
        return self.pairs[int(np.searchsorted(self._area_below, rng.integers(self._area_below[-1]), side="right"))]

    def _around(self, rng: np.random.Generator, cell: Cell, view: _View) -> _Place:
        """A view whose crop shows a pixel of the cell's class, drawn among those of the cell, anywhere in the crop."""
        pair = self.pairs[cell.image]
        label = self._label(pair, cell.window)
        candidates = np.flatnonzero(label == cell.code)
        row, col = divmod(int(candidates[rng.integers(candidates.size)]), cell.window[3])
        # Where in the crop, from its middle; then where under the view, which is turned the other way.
        down, right = rng.uniform(-0.5, 0.5, 2) * self.crop_size * view.ground / view.side
        cos, sin = math.cos(math.radians(view.angle)), math.sin(math.radians(view.angle))
        down, right = sin * right + cos * down, cos * right - sin * down
        middle = view.ground / 2
        return _Place(
            pair,
            _span(rng, pair.height, view, at=math.floor(cell.window[0] + row + 0.5 - middle - down)),
            _span(rng, pair.width, view, at=math.floor(cell.window[1] + col + 0.5 - middle - right)),
        )

    def _mixed(self, rng: np.random.Generator, pair: Pair, view: _View) -> _Place:
        """The first of `tries` views in which no class has more than `limit`, or the one that comes nearest to it.
        Only their labels are read.
        """
        best, least = _anywhere(rng, pair, view), math.inf
        place = best
        for left in reversed(range(self.sampling.tries)):
            label = self._label(place.pair, place.window, place.shape)
            share = dominant_share(label, self.classes.ignore_index)
            if share < least:
                best, least = place, share
            if share <= self.sampling.limit or not left:
                break
            place = _anywhere(rng, self._draw_image(rng), view)
        return best

    def _label(self, pair: Pair, window: Window, shape: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        return read_label(self._rasters, pair, window, shape, default=self._codes)

    def _read(self, place: _Place, view: _View) -> tuple[Tensor, Tensor]:
        """What is under a view, resampled: image (C, side, side) and label (1, side, side)."""
        pair, rows, cols = place
        image = read_image(self._rasters, pair, place.window, place.shape)
        label = self._label(pair, place.window, place.shape)[None]
        if place.shape != (view.side, view.side):
            border = ((0, 0), (rows.before, rows.after), (cols.before, cols.after))
            image = np.pad(image, border, mode="reflect" if min(place.shape) > 1 else "edge")
            label = np.pad(label, border, constant_values=self.classes.ignore_index)
        return tv_tensors.Image(torch.from_numpy(image)), tv_tensors.Mask(torch.from_numpy(label))

    def _rotate(self, image: Tensor, label: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        size = [self.crop_size, self.crop_size]
        image = v2.functional.rotate(image, angle, interpolation=v2.InterpolationMode.BILINEAR)
        label = v2.functional.rotate(label, angle, fill=[float(self.classes.ignore_index)])
        return v2.functional.center_crop(image, size), v2.functional.center_crop(label, size)


class CropLoader(DataLoader[Sample]):
    """Batches of a `CropSampler`'s crops, that can go on in the middle of an epoch.

    Its state is how many batches of which epoch it has handed out; crops that
    workers have read ahead are not among them, and are read again.

    Args:
        epoch: tells the epoch whenever one begins; where it is not given, the sampler's is taken. (A run of so many
            steps that is resumed at an epoch's end skips an epoch in what Lightning sets the sampler to.)
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        *,
        sampler: CropSampler,
        batch_size: int,
        epoch: Callable[[], int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, sampler=sampler, batch_size=batch_size, drop_last=True, **options)
        self._crops = sampler
        self._batch = batch_size
        self._epoch = epoch
        self._handed = 0
        self._resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        """The batches of an epoch, or those of the epoch that was broken off which are still to come.

        Raises:
            ValueError: the epoch that was broken off was made of other batches.
        """
        # A generator begins when the first batch is asked for: after Lightning has counted the epoch.
        if self._epoch is not None:
            self._crops.set_epoch(self._epoch())
        state, self._resumed, self._handed = self._resumed, None, 0
        if state is not None and state["epoch"] == self._crops.epoch:
            self._check(state)
            self._handed = state["batches"]
        self._crops.skip = self._handed * self._batch
        for batch in super().__iter__():
            self._handed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Plain numbers."""
        if self._resumed is not None:  # and not begun with: a validation came first
            return dict(self._resumed)
        return {"epoch": self._crops.epoch, "batches": self._handed, **self._settings()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the last batch that was handed out, should the next epoch be the one of `state`."""
        self._resumed = state

    def _check(self, state: dict[str, int]) -> None:
        settings = self._settings().items()
        differences = [f"{name} was {state[name]} and is {value}" for name, value in settings if state[name] != value]
        if differences:
            raise ValueError(
                f"the checkpoint is from within an epoch of other batches: {'; '.join(differences)}. Give the same to "
                "resume it, or resume from a checkpoint of an epoch's end"
            )

    def _settings(self) -> dict[str, int]:
        return {
            "batch_size": self._batch,
            "samples_per_epoch": self._crops.length,
            "processes": self._crops.num_replicas,
        }


class CropSampler(DistributedSampler[Any]):
    """Yields epoch * length + i for this rank's i = rank, rank + world_size, ...; every rank gets length //
    world_size of them.

    It is a DistributedSampler so that Lightning keeps it as it is under DDP and calls its `set_epoch`.
    """

    def __init__(self, length: int, *, rank: int = 0, world_size: int = 1) -> None:
        if length < world_size:
            raise ValueError(f"length {length} for {world_size} processes; expected at least one crop a process")
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.length = length
        self.skip = 0
        """Of this rank's crops, how many the next iterations leave out at their beginning."""

    def __iter__(self) -> Iterator[int]:
        start, step = self.epoch * self.length, self.num_replicas
        numbers = range(start + self.rank, start + len(self) * step, step)
        return iter(numbers[self.skip :])

    def __len__(self) -> int:
        return self.length // self.num_replicas


def collate(samples: list[Sample]) -> Sample:
    """Stack samples of one shape: image (B, C, H, W), label (B, H, W), window (B, 4), name a list of B."""
    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "label", "window")}
    return {**stacked, "name": [sample["name"] for sample in samples]}


def _anywhere(rng: np.random.Generator, pair: Pair, view: _View) -> _Place:
    return _Place(pair, _span(rng, pair.height, view), _span(rng, pair.width, view))


def _span(rng: np.random.Generator, length: int, view: _View, at: int | None = None) -> _Span:
    """A view along an axis of `length` pixels: it starts at `at`, moved into the image, or anywhere."""
    side, ground = view.side, view.ground
    if ground <= length:
        start = int(rng.integers(length - ground + 1)) if at is None else min(max(at, 0), length - ground)
        return _Span(start, ground, 0, 0, side)
    inside = max(1, round(length * side / ground))
    before = int(rng.integers(side - inside + 1))
    return _Span(0, length, before, side - inside - before, inside)


def _jitter(rng: np.random.Generator, image: Tensor, options: Augmentations, pair: Pair) -> Tensor:
    """Brightness, contrast, saturation and hue of a uint8 image (C, H, W), in this order.

    The mean that contrast is about is exact (a sum of whole numbers in float64), so that it does not depend on the
    number of threads, and with it on whether a worker computes it.
    """
    if (options.saturation or options.hue) and image.shape[0] != 3:
        raise ValueError(
            f"{pair.image}: {image.shape[0]} bands; saturation and hue are of colours, which takes three: set "
            "augmentations.saturation and augmentations.hue to 0"
        )
    brightness, contrast, saturation = rng.uniform(-1, 1, 3) * (
        options.brightness,
        options.contrast,
        options.saturation,
    )
    turn = float(rng.uniform(-1, 1)) * options.hue
    if options.brightness:
        image = _stretch(image, 1 + brightness, about=0.0)
    if options.contrast:
        image = _stretch(image, 1 + contrast, about=image.mean(dtype=torch.float64).item())
    if options.saturation:
        image = v2.functional.adjust_saturation(image, 1 + saturation)
    if options.hue:
        image = v2.functional.adjust_hue(image, turn)
    return image


def _stretch(image: Tensor, factor: float, about: float) -> Tensor:
    return (about + factor * (image.float() - about)).round_().clamp_(0, 255).to(torch.uint8)
