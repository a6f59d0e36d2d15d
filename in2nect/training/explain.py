"""`in2nect fit --explain`: what a training would be, before it starts: data, network, losses, schedule, precision and
devices, and an estimate of its memory (`memory.py`). Headers of the images are read, labels only where the training
itself needs their pixels counted; nothing is written. Seconds, whatever the sizes.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

import lightning
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from in2nect.data.sampling import LabelIndex
from in2nect.models import TrainingOutput
from in2nect.training.datamodule import FolderDataModule
from in2nect.training.memory import fake_tensors, step_memory, to_fake
from in2nect.training.module import SegmentationModule

_ASSUMED = ("an A6000 of 48 GB is assumed: there is no GPU here", 48 * 10**9)
_ROOM = 0.92  # share of a device's memory that tensors may fill: context, workspaces and fragmentation take the rest
_WIDTH = 108  # of a line, behind its head
_EPOCHS = 1000  # Lightning's, where neither epochs nor steps are limited
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


@dataclass(frozen=True)
class Schedule:
    """Steps of the optimiser, as Lightning counts them.

    Attributes:
        batches: a device has in an epoch.
        steps_per_epoch: of the optimiser; the last one of an epoch may be of fewer batches.
        steps: in all; infinite where the training has no end.
        global_batch: crops a step, over all devices and accumulated batches.
    """

    batches: int
    steps_per_epoch: int
    steps: float
    global_batch: int

    @classmethod
    def of(cls, trainer: lightning.Trainer, data: FolderDataModule) -> Schedule:
        """That of a training which was set up."""
        devices, accumulated = trainer.num_devices * trainer.num_nodes, trainer.accumulate_grad_batches
        batches = len(data.train) // devices // data.batch_size
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
        per_epoch = math.ceil(batches / accumulated)
        epochs: float = _EPOCHS if trainer.max_epochs is None else trainer.max_epochs
        if epochs == -1 or (trainer.max_epochs is None and trainer.max_steps != -1):
            epochs = math.inf
        steps = per_epoch * epochs
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
        return cls(batches, per_epoch, steps, data.batch_size * devices * accumulated)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device. `parts` add up to `total`."""

    parts: dict[str, int]
    per_crop: float
    """What a crop more in the batch takes."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def explain(
    trainer: lightning.Trainer, module: SegmentationModule, data: FolderDataModule, *, assume_gpu: bool = True
) -> str:
    """The text. Neither trainer, module nor data can be used for a training afterwards.

    Args:
        assume_gpu: where the trainer has none, estimate for one that is assumed, and not for this machine.

    Raises:
        FileNotFoundError, ValueError: what the training itself would stop at, before its first step.
    """
    trainer.strategy.connect(module)
    trainer.datamodule = data  # type: ignore[attr-defined]
    data.trainer = module.trainer = trainer
    data.read_through = False  # headers are enough here
    data.setup("fit")
    module.setup("fit")
    found = module.segmentation_loss.class_weights
    weights = [] if found is None else found.tolist()
    device, name, capacity = _device(trainer, assume_gpu)
    schedule = Schedule.of(trainer, data)
    macs, estimate = _measure(trainer, module, data, device)
    sections = {
        "data": _data(module, data, schedule),
        "network": _network(module, data, macs),
        "losses": _losses(module, data, weights, macs),
        "schedule": _schedule(trainer, module, data, schedule),
        "devices": _devices(trainer, module, name),
        "memory": _memory(estimate, capacity) + _mend(trainer, module, data, estimate, capacity),
    }
    return "\n".join(_titled(head, lines) for head, lines in sections.items())


def _titled(head: str, lines: list[str]) -> str:
    """Lines behind their head, broken where they are long."""
    broken = [part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="  ")]
    return "\n".join(f"{'' if number else head:<10}{part}" for number, part in enumerate(broken))


def _device(trainer: lightning.Trainer, assume_gpu: bool) -> tuple[torch.device, str, int]:
    """Where the step is counted for, what that is called, and its bytes."""
    root = trainer.strategy.root_device
    if root.type == "cuda":
        found = torch.cuda.get_device_properties(root)
        return root, found.name, found.total_memory
    if assume_gpu:
        return torch.device("cuda"), *_ASSUMED
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.device("cpu"), "this machine's CPU", memory // trainer.num_devices


def _measure(
    trainer: lightning.Trainer, module: SegmentationModule, data: FolderDataModule, device: torch.device
) -> tuple[int, MemoryEstimate]:
    """Multiply-adds of a crop's forward pass, and the memory of a step. The module is of fake tensors from here on."""
    bits, _, kind = trainer.precision.partition("-")
    dtype = _DTYPES.get(bits, torch.float32)
    if kind == "true":
        module.to(dtype)
    module.train()
    shape = (module.in_channels, data.crop_size, data.crop_size)
    with fake_tensors():
        to_fake(module, device)
        weights, gradients = list(module.parameters()), [weight.grad for weight in module.parameters()]
        images = torch.empty((data.batch_size, *shape), dtype=torch.uint8, device=device)
        labels = torch.empty((data.batch_size, *shape[1:]), dtype=torch.uint8, device=device)
        known = [*weights, *gradients, *module.buffers(), images, labels]
        step = step_memory(
            lambda: _forward(module, images, dtype if kind == "mixed" else None),
            lambda output: module.total_loss(output, labels),
            [tensor for tensor in known if tensor is not None],
        )
        with FlopCounterMode(display=False) as count, torch.no_grad():
            module.model.eval()(module.normalise(images[:1]))
        parameters, state = _bytes(weights), _bytes([*weights, *module.buffers()])
        parts = {
            "weights and buffers": state,
            "gradients": parameters,
            f"{module.optimizer.name}'s two moments": 2 * parameters,
            "averaged weights": state if module.optimizer.ema_decay else 0,
            "gradients in transit between devices": parameters if trainer.num_devices * trainer.num_nodes > 1 else 0,
            "batch": _bytes([images, labels]),
            "activations saved by the network": step.of_network,
            "saved by the losses": step.kept - step.of_network,
            "at the worst moment, beyond these": step.peak - step.kept,
            "workspace of In2NeCT's losses": _workspace(module, data),
        }
        return count.get_total_flops() // 2, MemoryEstimate(
            {name: size for name, size in parts.items() if size}, (step.peak + parts["batch"]) / data.batch_size
        )


def _forward(module: SegmentationModule, images: Tensor, dtype: torch.dtype | None) -> TrainingOutput:
    with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        return module.model.forward_training(module.normalise(images))


def _workspace(module: SegmentationModule, data: FolderDataModule) -> int:
    """Bytes that the operators of the losses hold inside themselves on CUDA; of `moments` and `sampled` they are some
    MiB at most (docs/performance.md)."""
    if module.criterion is None or module.tuning.estimator != "exact":
        return 0
    return 20 * _pixels(module, data)  # norm, weight, sum, log D and a coefficient for each: kernels/intra_exact.py


def _pixels(module: SegmentationModule, data: FolderDataModule) -> int:
    """N of the losses, a batch."""
    stride = module.model.representation.stride if module.tuning.resolution == "feature" else 1
    return data.batch_size * math.ceil(data.crop_size / stride) ** 2


def _data(module: SegmentationModule, data: FolderDataModule, schedule: Schedule) -> list[str]:
    pairs, classes = data.train.pairs, data.classes
    pixels = sum(pair.height * pair.width for pair in pairs)
    lines = [
        f"{data.dataset} in {data.root}: {len(pairs):,} training images, {pixels / 1e6:,.1f} M pixels",
        f"{len(data.train):,} crops of {data.crop_size} x {data.crop_size} an epoch ({data.sampling.method}), "
        f"{schedule.batches:,} batches of {data.batch_size} on each device",
        "validated on " + (f"{len(data.val):,} windows" if data.val is not None else "nothing"),
    ]
    counted = isinstance(module.loss.class_weights, str)
    index = data.label_index if counted else LabelIndex.cached(pairs, classes)
    if index is None:
        names = ", ".join(classes.names)
        return [*lines, f"{classes.num_classes} classes: {names}; their pixels have not been counted yet"]
    labelled = sum(index.pixels)
    shares = [f"{name} {100 * n / labelled:.2f} %" for name, n in zip(classes.names, index.pixels, strict=True)]
    return [*lines, f"{labelled / 1e6:,.1f} M pixels labelled: " + ", ".join(shares)]


def _network(module: SegmentationModule, data: FolderDataModule, macs: int) -> list[str]:
    tap = module.model.representation
    millions = sum(weight.numel() for weight in module.model.parameters()) / 1e6
    return [
        f"{module.network} ({module.encoder or 'its own encoder'}): {millions:.2f} M parameters, {module.in_channels} "
        f"bands, {macs / 1e9:.2f} GMAC a crop (convolutions and products, forward)",
        f"representation: input of {tap.module}, {tap.width} channels at stride {tap.stride}",
    ]


def _losses(module: SegmentationModule, data: FolderDataModule, weights: list[float], macs: int) -> list[str]:
    loss, tuning = module.loss, module.tuning
    terms = ["cross-entropy"]
    if loss.label_smoothing:
        terms.append(f"labels smoothed by {loss.label_smoothing:g}")
    if weights:
        shown = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(data.classes.names, weights, strict=True))
        terms.append(f"class weights ({shown})")
    if loss.ohem_threshold is not None:
        terms.append(
            f"of pixels below a probability of {loss.ohem_threshold:g}, at least {100 * loss.ohem_min_kept:g} %"
        )
    if loss.dice_weight:
        terms.append(f"Dice x {loss.dice_weight:g}")
    lines = [f"L_seg: {', '.join(terms)}; an auxiliary head's cross-entropy x {loss.auxiliary_weight:g}"]
    if module.criterion is None:
        return [*lines, "without In2NeCT's losses"]
    where = {"label": "the labels", "feature": f"stride {module.model.representation.stride}"}[tuning.resolution]
    cost = _multiply_adds(module, data)
    share = 100 * cost / (3 * macs * data.batch_size)
    covariance = f" ({tuning.covariance} covariance)" if tuning.estimator == "moments" else ""
    return [
        *lines,
        f"In2NeCT: {tuning.weight:g} x (inter + intra), {tuning.estimator}{covariance} at {where}: "
        f"{_pixels(module, data):,} pixels a batch",
        f"about {cost / 1e9:,.1f} GMAC a batch, {share:,.2g} % of the network's forward and backward",
    ]


def _multiply_adds(module: SegmentationModule, data: FolderDataModule) -> float:
    """Of In2NeCT's losses, forward and backward, a batch; docs/mathematics.md."""
    tuning, classes = module.tuning, data.classes.num_classes
    stride = module.model.representation.stride
    width = tuning.projection or module.model.representation.width
    cells, pixels = data.batch_size * math.ceil(data.crop_size / stride) ** 2, _pixels(module, data)
    sums = 2 * cells * width  # of the classes, and back
    if tuning.estimator == "exact":
        return sums + 2.5 * pixels**2 * width
    if tuning.estimator == "sampled":
        return sums + 3 * (classes * tuning.per_class) ** 2 * width
    products = classes if tuning.covariance == "class" else 1
    interpolated = 20 * classes * pixels if tuning.resolution == "label" else 0
    return sums + cells * width * (2 * products * width + 4 * classes) + interpolated


def _schedule(
    trainer: lightning.Trainer, module: SegmentationModule, data: FolderDataModule, schedule: Schedule
) -> list[str]:
    settings, devices = module.optimizer, trainer.num_devices * trainer.num_nodes
    ends = f"{schedule.steps:,} in all" if math.isfinite(schedule.steps) else "without an end"
    averaged = f"; weights averaged with a decay of {settings.ema_decay:g}" if settings.ema_decay else ""
    clip = trainer.gradient_clip_val
    lines = [
        f"{settings.name}, learning rate {settings.lr:g} (encoder x {settings.encoder_lr_factor:g}), weight decay "
        f"{settings.weight_decay:g}{f', gradients clipped at {clip:g}' if clip else ''}{averaged}",
        f"{schedule.steps_per_epoch:,} steps an epoch, {ends}: {settings.warmup_steps:,} of warm-up, then a cosine",
        f"{schedule.global_batch} crops a step: {data.batch_size} x {devices} devices x "
        f"{trainer.accumulate_grad_batches} accumulated batches",
    ]
    if trainer.accumulate_grad_batches > 1:
        lines.append("each loss is over one of the accumulated batches, not over all of them")
    return lines


def _devices(trainer: lightning.Trainer, module: SegmentationModule, name: str) -> list[str]:
    nodes = f" on each of {trainer.num_nodes} machines" if trainer.num_nodes > 1 else ""
    layout = "channels_last" if module.memory_format == torch.channels_last else "contiguous"
    how = ", compiled" if module.compiled else ""
    return [f"{trainer.num_devices}{nodes}, {trainer.precision}, {layout}{how}; {name}"]


def _memory(estimate: MemoryEstimate, capacity: int) -> list[str]:
    lines = [f"{size / 1e9:8.2f} GB  {name}" for name, size in estimate.parts.items()]
    fits = "fits" if estimate.total <= _ROOM * capacity else "does not fit"
    return [
        *lines,
        f"{estimate.total / 1e9:8.2f} GB  on each device, of {capacity / 1e9:.1f}: {fits} ({100 * _ROOM:.0f} % are "
        "for tensors; cuDNN's workspaces, fragmentation and the CUDA context need the rest)",
    ]


def _mend(
    trainer: lightning.Trainer,
    module: SegmentationModule,
    data: FolderDataModule,
    estimate: MemoryEstimate,
    capacity: int,
) -> list[str]:
    """What to do where it does not fit."""
    if estimate.total <= _ROOM * capacity:
        return []
    ways = []
    fixed, micro = estimate.total - estimate.per_crop * data.batch_size, data.batch_size
    while micro > 1 and fixed + estimate.per_crop * micro > _ROOM * capacity:
        micro = max(divisor for divisor in range(1, micro) if data.batch_size % divisor == 0)
    if micro < data.batch_size:
        accumulated = trainer.accumulate_grad_batches * data.batch_size // micro
        ways.append(
            f"data.batch_size={micro} with trainer.accumulate_grad_batches={accumulated} (the same crops a step; about "
            f"{(fixed + estimate.per_crop * micro) / 1e9:.1f} GB)"
        )
    if trainer.precision == "32-true":
        ways.append("trainer.precision=bf16-mixed")
    if module.hparams.get("gradient_checkpointing") is False:
        ways.append("model.gradient_checkpointing=true")
    if data.crop_size > 256:
        ways.append("a smaller data.crop_size")
    return [f"what would help: {'; '.join(ways)}"]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
