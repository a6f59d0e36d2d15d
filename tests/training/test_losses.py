"""SegmentationLoss against torch's and smp's own, and on batches without labels."""

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn.functional import cross_entropy

from in2nect.training.losses import SegmentationLoss
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_deterministic_algorithms_on_cuda(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits = batch[0].cuda().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        SegmentationLoss(LossSettings(label_smoothing=0.1))(logits, batch[1].cuda()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert logits.grad is not None and logits.grad.any()
