"""SegmentationLoss against torch's and smp's own and values worked out by hand, and on batches without labels."""

import math
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn.functional import cross_entropy

from in2nect.training.losses import SegmentationLoss, balancing_weights
from in2nect.training.settings import LossSettings


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 13, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 13, 11), generator=generator, dtype=torch.uint8)
    labels[:, :3] = 255
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_mean_over_labelled_pixels(
    batch: tuple[torch.Tensor, torch.Tensor], smoothing: float
) -> None:
    logits, labels = batch
    loss = SegmentationLoss(LossSettings(label_smoothing=smoothing))(logits, labels)
    expected = cross_entropy(logits, labels.long(), ignore_index=255, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_dice_is_added_with_its_weight(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    both = SegmentationLoss(LossSettings(dice_weight=0.5))
    dice = smp.losses.DiceLoss("multiclass", ignore_index=255)(logits, labels.long())
    torch.testing.assert_close(both(logits, labels), both.cross_entropy(logits, labels) + 0.5 * dice)
    torch.testing.assert_close(
        both.cross_entropy(logits, labels), cross_entropy(logits, labels.long(), ignore_index=255)
    )


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_a_batch_without_labels_is_finite_and_has_no_gradient(dice_weight: float) -> None:
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    loss = SegmentationLoss(LossSettings(dice_weight=dice_weight, label_smoothing=0.1))(
        logits, torch.full((1, 8, 8), 255)
    )
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_the_loss_has_a_deterministic_form_on_cuda(
    batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over (B, K, H, W), torch's negative log-likelihood is an error under use_deterministic_algorithms."""
    seen: list[torch.Size] = []
    exact = torch.nn.functional.nll_loss

    def noted(rows: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        seen.append(rows.shape)
        return exact(rows, *more, **options)

    monkeypatch.setattr(torch.nn.functional, "nll_loss", noted)
    SegmentationLoss(LossSettings())(*batch)
    assert seen == [(2 * 13 * 11, 4)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_torchs(batch: tuple[torch.Tensor, torch.Tensor], smoothing: float) -> None:
    """Of four classes, of which one does not occur."""
    logits, labels = batch
    labels = torch.where(labels == 3, 1, labels)
    weights = torch.tensor([0.5, 2.0, 0.0, 7.0], dtype=torch.float64)
    loss = SegmentationLoss(LossSettings(label_smoothing=smoothing), class_weights=weights)(logits, labels)
    expected = cross_entropy(logits, labels.long(), weight=weights, ignore_index=255, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(loss, cross_entropy(logits, labels.long(), ignore_index=255))


def test_a_weighted_mean_by_hand() -> None:
    """Two pixels of probabilities 1/2 and 1/4 of their classes, of weights 1 and 3."""
    logits = torch.tensor([[[0.0, math.log(3.0)]], [[0.0, 0.0]]])[None]  # (1, 2, 1, 2)
    loss = SegmentationLoss(LossSettings(), class_weights=torch.tensor([1.0, 3.0]))(logits, torch.tensor([[[0, 1]]]))
    assert loss.item() == pytest.approx((math.log(2) + 3 * math.log(4)) / 4)


def pixels(*probabilities: float) -> torch.Tensor:
    """Logits (1, 2, 1, N) that give class 0 these probabilities."""
    first = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([first.log(), (1 - first).log()])[None, :, None]


@pytest.mark.parametrize(
    ("threshold", "least", "kept"),
    [
        (0.7, 0.0, [0.1, 0.6]),
        (0.7, 0.75, [0.1, 0.6, 0.8]),  # the threshold alone would keep two of four
        (0.05, 0.0, []),
        (0.05, 0.25, [0.1]),
        (1.0, 0.0, [0.1, 0.6, 0.8, 0.9]),
        (0.05, 1.0, [0.1, 0.6, 0.8, 0.9]),
    ],
)
def test_hard_examples_by_hand(threshold: float, least: float, kept: list[float]) -> None:
    logits = pixels(0.9, 0.1, 0.6, 0.8, 0.01).requires_grad_()
    labels = torch.tensor([[[0, 0, 0, 0, 255]]])  # the hardest is ignored
    loss = SegmentationLoss(LossSettings(ohem_threshold=threshold, ohem_min_kept=least))(logits, labels)
    assert loss.item() == pytest.approx(-sum(map(math.log, kept)) / max(len(kept), 1))
    loss.backward()
    assert logits.grad is not None
    assert int(logits.grad.abs().sum(1).gt(0).sum()) == len(kept)


def test_pixels_as_hard_as_the_last_that_is_kept_are_kept_too() -> None:
    settings = LossSettings(ohem_threshold=0.01, ohem_min_kept=0.25)
    loss = SegmentationLoss(settings)(pixels(0.5, 0.2, 0.2, 0.9), torch.zeros(1, 1, 4, dtype=torch.uint8))
    assert loss.item() == pytest.approx(-math.log(0.2))


def test_hard_examples_with_weights_and_smoothing() -> None:
    """Which pixels are hard is told by the probabilities alone; their loss is weighted and smoothed as in torch."""
    logits, labels = pixels(0.9, 0.3, 0.6, 0.2), torch.tensor([[[0, 0, 1, 1]]])  # true classes: 0.9, 0.3, 0.4, 0.8
    weights = torch.tensor([1.0, 5.0], dtype=torch.float64)
    settings = LossSettings(ohem_threshold=0.5, ohem_min_kept=0.0, label_smoothing=0.2)
    loss = SegmentationLoss(settings, class_weights=weights)(logits, labels)
    hard = torch.tensor([[[255, 0, 1, 255]]])
    expected = cross_entropy(logits, hard, weight=weights, ignore_index=255, label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("labels", [255, 1])
def test_no_pixel_and_no_weight_are_a_zero_without_a_gradient(labels: int) -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    settings = LossSettings(ohem_threshold=0.7, ohem_min_kept=0.5, label_smoothing=0.1)
    weights = torch.tensor([1.0, 0.0, 1.0])
    loss = SegmentationLoss(settings, class_weights=weights)(logits, torch.full((1, 4, 4), labels))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_a_loss_that_is_no_number_is_not_mined_away() -> None:
    logits = pixels(0.9, 0.1)
    logits[..., 0] = float("nan")
    settings = LossSettings(ohem_threshold=0.7, ohem_min_kept=0.0)
    assert SegmentationLoss(settings)(logits, torch.tensor([[[0, 0]]])).isnan()


def test_weights_from_the_pixels_of_the_classes() -> None:
    """Two images; class 2 does not occur."""
    counts = np.array([[60, 20, 0, 20], [100, 0, 0, 0]])
    assert balancing_weights("balanced", counts).tolist() == pytest.approx(
        [200 / 3 / 160, 200 / 3 / 20, 1, 200 / 3 / 20]
    )
    # shares of the images that show a class: 160 / 200, 20 / 100, -, 20 / 100
    assert balancing_weights("median_frequency", counts).tolist() == pytest.approx([0.2 / 0.8, 1, 1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "loss.label_smoothing is 1.5; expected a number from 0 to 1"),
        ({"ohem_threshold": 0.0}, "loss.ohem_threshold is 0.0; expected a probability above 0"),
        ({"ohem_min_kept": -0.1}, "loss.ohem_min_kept is -0.1"),
        ({"class_weights": {"road": -1.0}}, "loss.class_weights of road is -1.0; expected a number of at least 0"),
    ],
)
def test_values_out_of_their_range_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_deterministic_algorithms_on_cuda(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits = batch[0].cuda().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        SegmentationLoss(LossSettings(label_smoothing=0.1))(logits, batch[1].cuda()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert logits.grad is not None and logits.grad.any()
