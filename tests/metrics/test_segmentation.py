"""SegmentationMetrics against a hand-written confusion matrix and against torchmetrics."""

import json

import pytest
import torch
import torchmetrics.functional.classification as oracle

from in2nect.metrics import SegmentationMetrics


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (3, 17, 23), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return torch.randint(0, 5, labels.shape, generator=generator), labels  # class 4 is predicted, never labelled


def test_confusion_is_the_one_counted_by_hand() -> None:
    metric = SegmentationMetrics(3, ["a", "b", "c"])
    metric.update(torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 1, 1, 255]]]))
    scores = metric.compute()
    assert scores.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert scores.confusion.dtype == torch.int64
    assert scores.iou[:2].tolist() == [0.5, 0.5]
    assert scores.precision[:2].tolist() == [0.5, 1.0]
    assert scores.recall[:2].tolist() == [1.0, 0.5]
    assert scores.overall_accuracy.item() == 2 / 3


def test_absent_class_is_nan_and_outside_the_means() -> None:
    metric = SegmentationMetrics(3)
    metric.update(torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 1, 1, 255]]]))
    scores = metric.compute()
    assert torch.isnan(torch.stack([scores.iou[2], scores.f1[2], scores.precision[2], scores.recall[2]])).all()
    assert scores.mean_iou.item() == pytest.approx(0.5)
    assert scores.mean_f1.item() == pytest.approx(2 / 3)


def test_agrees_with_torchmetrics(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    predictions, labels = batch
    metric = SegmentationMetrics(5)
    for part in range(3):  # streamed: as three updates
        metric.update(predictions[part : part + 1], labels[part : part + 1])
    scores = metric.compute()
    arguments = {"num_classes": 5, "ignore_index": 255}
    target = labels.long()
    assert torch.equal(scores.confusion, oracle.multiclass_confusion_matrix(predictions, target, **arguments))
    for ours, theirs in [
        (scores.iou, oracle.multiclass_jaccard_index(predictions, target, average="none", **arguments)),
        (scores.f1, oracle.multiclass_f1_score(predictions, target, average="none", **arguments)),
        (scores.precision, oracle.multiclass_precision(predictions, target, average="none", **arguments)),
    ]:
        torch.testing.assert_close(ours.float(), theirs)
    accuracy = oracle.multiclass_accuracy(predictions, target, average="micro", **arguments)
    torch.testing.assert_close(scores.overall_accuracy.float(), accuracy)


def test_nothing_scored_gives_nan_and_plain_json() -> None:
    metric = SegmentationMetrics(2)
    metric.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 255))
    scores = metric.compute()
    assert scores.mean_iou.isnan() and scores.overall_accuracy.isnan()
    plain = json.loads(json.dumps(scores.to_dict(["x", "y"]), allow_nan=False))
    assert plain["mean_iou"] is None and plain["classes"]["y"] == {
        "iou": None,
        "f1": None,
        "precision": None,
        "recall": None,
        "pixels": 0,
    }


def test_reset_forgets(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    metric = SegmentationMetrics(5)
    metric.update(*batch)
    metric.reset()
    assert metric.confusion.sum() == 0


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8), "argmax"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8), "integer"),
        (torch.full((1, 4, 4), 3), torch.zeros(1, 4, 4, dtype=torch.uint8), "16 pixels carry the prediction 3"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), torch.full((1, 4, 4), 7), "16 pixels carry the label 7"),
    ],
)
def test_wrong_input_is_an_error_that_says_what(predictions: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationMetrics(3).update(predictions, labels)


def test_wrong_construction() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        SegmentationMetrics(1)
    with pytest.raises(ValueError, match="2 class names"):
        SegmentationMetrics(3, ["a", "b"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_as_the_cpu_does(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    cpu, cuda = SegmentationMetrics(5), SegmentationMetrics(5).cuda()
    cpu.update(*batch)
    cuda.update(*(tensor.cuda() for tensor in batch))
    assert torch.equal(cpu.compute().confusion, cuda.compute().confusion.cpu())
