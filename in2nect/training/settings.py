"""What a run can be told about its losses, its optimiser and its predictions: plain values, which YAML files and
checkpoints hold as they are. Standard library alone.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TuningSettings:
    """Neural-collapse tuning: the two losses on the last-layer representation, weight * (inter + intra).

    Attributes:
        enabled: False trains with the segmentation loss alone: the plain arm of a comparison.
        weight: w of Eq. 7, on both losses.
        estimator: how the intra-class loss is computed: moments (no pairs, no sampling), exact (every pair), sampled.
        covariance: for `moments`, one covariance for all classes (pooled), or one a class, at some times the cost: it
            is allowed at lower temperatures, and better where classes are Gaussian (docs/estimators.md).
        resolution: on which grid pixels are counted: label (the paper's: features are interpolated) or feature
            (labels are picked).
        temperature: divides the cosines of the intra-class loss.
        per_class: for `sampled`, the most pixels taken of a class.
        projection: width of a training-only 1x1 convolution + BatchNorm between representation and losses; null taps
            the representation itself.
        denominator: of the inter-class loss: vertices (Eq. 10, every class mean against all vertices) or means (Eq. 5
            as printed).
        intra_audit: every so many steps, compare the estimator with the exact intra-class loss on up to 4,096 pixels
            of the batch, and log audit/intra_gradient_error and audit/intra_bias. `moments` is warned of once above a
            gradient error of 0.1; that of `sampled` is its noise. The training stays the same, bit for bit. 0: never.

    Raises:
        ValueError: an `intra_audit` that is negative, or that would compare the exact loss with itself.
    """

    enabled: bool = True
    weight: float = 0.2
    estimator: Literal["moments", "exact", "sampled"] = "moments"
    covariance: Literal["pooled", "class"] = "pooled"
    resolution: Literal["label", "feature"] = "label"
    temperature: float = 1.0
    per_class: int = 256
    projection: int | None = None
    denominator: Literal["vertices", "means"] = "vertices"
    intra_audit: int = 0

    def __post_init__(self) -> None:
        if self.intra_audit < 0:
            raise ValueError(
                f"tuning.intra_audit is {self.intra_audit}; expected the number of steps between two audits, or 0 for "
                "none"
            )
        if self.enabled and self.intra_audit and self.estimator == "exact":
            raise ValueError(
                f"tuning.intra_audit is {self.intra_audit} and tuning.estimator is exact: there is nothing to compare "
                "the exact loss with. Leave intra_audit at 0, or train with the estimator moments or sampled"
            )


@dataclass(frozen=True)
class LossSettings:
    """The segmentation loss: cross-entropy over the labelled pixels, and what is added to it.

    Attributes:
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
        class_weights: of the cross-entropy, whose mean is then a weighted one: a weight for each class by its name (1
            for those not named), or, from the pixels of the training labels, which are read through once for it:
            balanced (in inverse proportion to a class's pixels) or median_frequency (the same, of the images that show
            the class; Eigen & Fergus 2015). null: every pixel alike.
        ohem_threshold: online hard example mining (Shrivastava et al. 2016): only pixels whose true class has a
            probability below it enter the cross-entropy; 0.7 is common. null: all pixels do.
        ohem_min_kept: least share of a batch's labelled pixels that enter it all the same, the hardest ones.
        dice_weight: weight of a Dice loss over the classes of the batch; 0 leaves it out.
        auxiliary_weight: weight of the auxiliary head's cross-entropy, for networks that have such a head.

    Raises:
        ValueError: a value out of its range.
    """

    label_smoothing: float = 0.0
    class_weights: Literal["balanced", "median_frequency"] | dict[str, float] | None = None
    ohem_threshold: float | None = None
    ohem_min_kept: float = 0.1
    dice_weight: float = 0.0
    auxiliary_weight: float = 0.4

    def __post_init__(self) -> None:
        _check_range("loss.label_smoothing", self.label_smoothing, 0, 1)
        _check_range("loss.ohem_min_kept", self.ohem_min_kept, 0, 1)
        _check_range("loss.dice_weight", self.dice_weight, 0, math.inf)
        _check_range("loss.auxiliary_weight", self.auxiliary_weight, 0, math.inf)
        if self.ohem_threshold is not None and not 0 < self.ohem_threshold <= 1:
            raise ValueError(
                f"loss.ohem_threshold is {self.ohem_threshold}; expected a probability above 0, up to 1 (0.7 is "
                "common), or null for all pixels"
            )
        if isinstance(self.class_weights, dict):
            for name, weight in self.class_weights.items():
                _check_range(f"loss.class_weights of {name}", weight, 0, math.inf)


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam or AdamW under a cosine from `lr` to 0 over all steps, set at every step. Weight decay acts on every
    parameter. A step is one of the optimiser, whatever number of batches `trainer.accumulate_grad_batches` makes it of.

    Attributes:
        name: adamw (decoupled weight decay) or adam (the decay is part of the gradient).
        lr: highest learning rate.
        weight_decay: strength of the weight decay.
        encoder_lr_factor: the encoder's learning rate as a multiple of `lr`.
        warmup_steps: steps over which the learning rate rises linearly to its highest; 0 for none.
        ema_decay: share of the old value that an exponential moving average of the weights keeps at every step; 0.999
            looks back over about 1,000 steps. Validation, checkpoints and all that is done with them then take the
            averaged weights, and BatchNorm's statistics averaged in the same way; the training goes on with its own. 0
            for none.

    Raises:
        ValueError: an `ema_decay` out of its range.
    """

    name: Literal["adam", "adamw"] = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.01
    encoder_lr_factor: float = 1.0
    warmup_steps: int = 0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"optimizer.ema_decay is {self.ema_decay}; expected 0 for no average, or a share below 1, such as 0.999"
            )


@dataclass(frozen=True)
class PredictionSettings:
    """How `predict` walks over a whole raster.

    Attributes:
        window: side of a window in pixels.
        overlap: pixels over which neighbouring windows are blended.
        batch_size: windows a forward pass.
        bands: the bands of a raster, counted from 1, in the order of the training images; null for
            data.bands, or all.
        colour_png: beside each GeoTIFF of class codes, write a PNG in the classes' colours.
    """

    window: int = 512
    overlap: int = 128
    batch_size: int = 4
    bands: tuple[int, ...] | None = None
    colour_png: bool = False


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        expected = f"a number from {least:g} to {most:g}" if math.isfinite(most) else f"a number of at least {least:g}"
        raise ValueError(f"{name} is {value}; expected {expected}")
