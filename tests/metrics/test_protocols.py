"""Protocols: what each mean is over, against torchmetrics and scikit-learn, on confusions that are random and on those
that have something missing; and the sum over processes.
"""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as oracle
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from in2nect.metrics import SegmentationMetrics, SegmentationScores
from in2nect.metrics.protocols import averaged_classes

ISPRS = ("impervious surface", "building", "low vegetation", "tree", "car", "clutter")
LOVEDA = ("background", "building", "road", "water", "barren", "forest", "agriculture")
CLUTTER = 5


def random_pixels(seed: int = 0, num_classes: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (2, 31, 17), generator=generator)
    predictions = torch.where(
        torch.rand(labels.shape, generator=generator) < 0.6,
        labels,
        torch.randint(0, num_classes, labels.shape, generator=generator),
    )
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return predictions, labels


def degenerate(case: str) -> tuple[Tensor, Tensor]:
    predictions, labels = random_pixels()
    if case == "one class only":
        return torch.full_like(labels, 2), torch.full_like(labels, 2)
    if case == "absent in labels":
        labels[labels == 3] = 255
    if case == "absent in predictions":
        predictions[predictions == 3] = 0
    if case == "absent in both":
        labels[labels == 3] = 255
        predictions[predictions == 3] = 0
    if case == "clutter absent in labels":
        labels[labels == CLUTTER] = 255
    if case == "only clutter labelled":
        labels[labels != CLUTTER] = 255
    if case == "never right":
        labels[labels == predictions] = 255
    return predictions, labels


CASES = [
    "random",
    "one class only",
    "absent in labels",
    "absent in predictions",
    "absent in both",
    "clutter absent in labels",
    "only clutter labelled",
    "never right",
]


def compute(predictions: Tensor, labels: Tensor, protocol: str) -> SegmentationScores:
    metric = SegmentationMetrics(6, ISPRS, protocol=protocol)  # type: ignore[arg-type]
    metric.update(predictions, labels)
    return metric.compute()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("protocol", ["all", "isprs"])
def test_agrees_with_scikit_learn(case: str, protocol: str) -> None:
    predictions, labels = degenerate(case)
    scores = compute(predictions, labels, protocol)
    scored = labels != 255
    truth, guess, codes = labels[scored].numpy(), predictions[scored].numpy(), list(range(6))
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        truth, guess, labels=codes, zero_division=np.nan
    )
    iou = sklearn_metrics.jaccard_score(truth, guess, labels=codes, average=None, zero_division=0)
    iou[(support == 0) & (np.bincount(guess, minlength=6) == 0)] = np.nan  # it has no word for 0 / 0
    assert np.array_equal(scores.confusion.numpy(), sklearn_metrics.confusion_matrix(truth, guess, labels=codes))
    for ours, theirs in ((scores.iou, iou), (scores.precision, precision), (scores.recall, recall), (scores.f1, f1)):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-14)
    means = codes[:CLUTTER] if protocol == "isprs" else codes
    np.testing.assert_allclose(scores.mean_iou, np.nanmean(iou[means]), rtol=1e-14)
    np.testing.assert_allclose(scores.mean_f1, np.nanmean(f1[means]), rtol=1e-14)
    np.testing.assert_allclose(scores.mean_iou_all, np.nanmean(iou), rtol=1e-14)
    np.testing.assert_allclose(scores.mean_f1_all, np.nanmean(f1), rtol=1e-14)
    np.testing.assert_allclose(scores.overall_accuracy, sklearn_metrics.accuracy_score(truth, guess), rtol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torchmetrics(case: str) -> None:
    """Which gives 0 where a ratio is 0 / 0, but leaves classes that are nowhere out of its means as we do."""
    predictions, labels = degenerate(case)
    scores = compute(predictions, labels, "all")
    options = {"num_classes": 6, "ignore_index": 255}
    assert torch.equal(scores.confusion, oracle.multiclass_confusion_matrix(predictions, labels, **options))
    for ours, theirs in [
        (scores.iou, oracle.multiclass_jaccard_index(predictions, labels, average="none", **options)),
        (scores.f1, oracle.multiclass_f1_score(predictions, labels, average="none", **options)),
        (scores.precision, oracle.multiclass_precision(predictions, labels, average="none", **options)),
        (scores.recall, oracle.multiclass_recall(predictions, labels, average="none", **options)),
    ]:
        torch.testing.assert_close(ours.float().nan_to_num(0.0), theirs)
    f1 = oracle.multiclass_f1_score(predictions, labels, average="macro", **options)
    accuracy = oracle.multiclass_accuracy(predictions, labels, average="micro", **options)
    torch.testing.assert_close(scores.mean_f1.float(), f1)
    torch.testing.assert_close(scores.overall_accuracy.float(), accuracy)


def test_clutter_is_out_of_the_means_and_still_a_false_positive_and_negative() -> None:
    labels = torch.tensor([[[0, 0, 5, 5]]])
    scores = compute(torch.tensor([[[0, 5, 0, 5]]]), labels, "isprs")
    assert scores.iou[0] == 1 / 3  # one right, one lost to clutter, one taken from it
    assert scores.mean_iou == 1 / 3 and scores.mean_f1 == 0.5
    assert scores.mean_iou_all == (1 / 3 + 1 / 3) / 2
    assert scores.overall_accuracy == 0.5  # over six classes: four pixels
    assert scores.averaged.tolist() == [True] * 5 + [False]
    plain = scores.to_dict(ISPRS)
    assert plain["averaged"] == list(ISPRS[:5]) and plain["mean_iou_all"] == pytest.approx(1 / 3)


def test_a_class_that_is_nowhere_is_in_no_mean_and_one_that_is_only_predicted_is() -> None:
    labels = torch.tensor([[[0, 0, 1, 1]]])
    nowhere = compute(torch.tensor([[[0, 0, 1, 1]]]), labels, "isprs")
    assert nowhere.mean_iou == 1 and nowhere.iou[2:].isnan().all()
    predicted = compute(torch.tensor([[[0, 0, 1, 2]]]), labels, "isprs")
    assert predicted.iou[:3].tolist() == [1, 0.5, 0] and predicted.mean_iou == 0.5
    assert predicted.recall[2].isnan() and predicted.precision[2] == 0


def test_only_clutter_gives_no_mean_at_all() -> None:
    labels = torch.full((1, 2, 2), CLUTTER)
    scores = compute(labels, labels, "isprs")
    assert scores.mean_iou.isnan() and scores.mean_f1.isnan()
    assert scores.mean_iou_all == 1 and scores.overall_accuracy == 1


def test_all_ignored_is_nan_everywhere() -> None:
    scores = compute(torch.zeros(1, 3, 3, dtype=torch.int64), torch.full((1, 3, 3), 255), "isprs")
    values = [scores.mean_iou, scores.mean_f1, scores.overall_accuracy, scores.mean_iou_all, scores.mean_f1_all]
    assert torch.stack(values).isnan().all() and scores.iou.isnan().all()


def test_loveda_is_over_all_seven() -> None:
    assert averaged_classes("loveda", LOVEDA) == (True,) * 7
    predictions, labels = random_pixels(1, 7)
    metric = SegmentationMetrics(7, LOVEDA, protocol="loveda")
    metric.update(predictions, labels)
    scores = metric.compute()
    assert scores.mean_iou == scores.iou.mean() == scores.mean_iou_all


def test_counts_beyond_what_floats_hold_are_exact() -> None:
    metric = SegmentationMetrics(2)
    metric.confusion += torch.tensor([[2**53, 0], [0, 2**24]])
    metric.update(torch.tensor([[[0]]]), torch.tensor([[[0]]]))
    metric.half()  # a module that is cast takes its metrics with it
    assert metric.compute().confusion.tolist() == [[2**53 + 1, 0], [0, 2**24]]


@pytest.mark.parametrize(
    ("protocol", "names", "message"),
    [
        ("cityscapes", LOVEDA, "protocol 'cityscapes'; expected one of all, loveda, isprs"),
        ("loveda", ISPRS, "scores 7 classes, and 6 were given"),
        ("isprs", LOVEDA, "scores 6 classes, and 7 were given"),
        ("isprs", LOVEDA[:6], "name one of them clutter"),
    ],
)
def test_a_protocol_for_other_classes_is_an_error(protocol: str, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationMetrics(len(names), names, protocol=protocol)  # type: ignore[arg-type]


def test_processes_sum_their_counts(tmp_path: Path) -> None:
    """Two processes over gloo: each sees an image of its own and computes the scores of both."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_score_one, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    together = compute(*random_pixels(), "isprs")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["confusion"], together.confusion) and found["mean_iou"] == together.mean_iou


def _score_one(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    predictions, labels = random_pixels()
    metric = SegmentationMetrics(6, ISPRS, protocol="isprs")
    metric.update(predictions[rank : rank + 1], labels[rank : rank + 1])
    scores = metric.compute()
    torch.save({"confusion": scores.confusion, "mean_iou": scores.mean_iou}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
