"""What a run can be told about its losses, its optimiser and its predictions: plain values, which YAML files and
checkpoints hold as they are. Standard library alone.
"""

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
        dice_weight: weight of a Dice loss over the classes of the batch; 0 leaves it out.
        auxiliary_weight: weight of the auxiliary head's cross-entropy, for networks that have such a head.
    """

    label_smoothing: float = 0.0
    dice_weight: float = 0.0
    auxiliary_weight: float = 0.4


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam or AdamW under a cosine from `lr` to 0 over all steps, set at every step. Weight decay acts on every
    parameter.

    Attributes:
        name: adamw (decoupled weight decay) or adam (the decay is part of the gradient).
        lr: highest learning rate.
        weight_decay: strength of the weight decay.
        encoder_lr_factor: the encoder's learning rate as a multiple of `lr`.
        warmup_steps: steps over which the learning rate rises linearly to its highest; 0 for none.
    """

    name: Literal["adam", "adamw"] = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.01
    encoder_lr_factor: float = 1.0
    warmup_steps: int = 0


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
