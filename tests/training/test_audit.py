"""The audit of the intra-class loss's estimator: which pixels it compares, what it finds, and that training does not
notice it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from in2nect import reference, simplex_etf
from in2nect.data.classes import Classes
from in2nect.loss import In2NeCTLoss, IntraClassLoss
from in2nect.training import audit
from in2nect.training.audit import audit_intra, seen_by
from in2nect.training.module import SegmentationModule
from in2nect.training.settings import TuningSettings

CLASSES = Classes(("field", "road", "water"), ((0, 128, 0), (128, 128, 128), (0, 0, 255)))


def drawn(loss: IntraClassLoss, features: torch.Tensor, labels: torch.Tensor, pixels: int, seed: int = 0):
    return audit._draw(loss, features, labels, pixels, audit.np.random.default_rng(seed))


def bimodal(dim: int, pixels: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes of two modes each."""
    labels = torch.randint(0, 4, (pixels,))
    centres = torch.randn(8, dim)
    return centres[labels + 4 * torch.randint(0, 2, (pixels,))] + 0.1 * torch.randn(pixels, dim), labels


def test_small_where_classes_are_compact_and_far_apart() -> None:
    labels = torch.randint(0, 4, (3000,))
    for spread in (0.1, 0.5):
        features = simplex_etf(4, 64)[labels] + spread * torch.randn(3000, 64) / 8
        for covariance in ("pooled", "class"):
            found = audit_intra(IntraClassLoss(4, covariance=covariance), features, labels, seed=0)  # type: ignore[arg-type]
            assert found is not None
            assert 0 < found.gradient_error < 0.05 and abs(found.bias) < 1e-3
            assert found.pixels == 3000


def test_large_where_classes_have_two_modes_and_the_temperature_is_low() -> None:
    found = audit_intra(IntraClassLoss(4, temperature=0.5), *bimodal(dim=2), seed=0)
    assert found is not None and found.gradient_error > 0.2 and abs(found.bias) > 0.02


@pytest.mark.parametrize("estimator", ["moments", "sampled"])
def test_is_the_error_of_loss_and_gradient(estimator: Any) -> None:
    """Where every pixel is drawn, against the equations."""
    features, labels = bimodal(dim=6, pixels=300)
    loss = IntraClassLoss(4, estimator=estimator, per_class=20, temperature=0.7)
    found = audit_intra(loss, features, labels, seed=3)
    leaf = features.double().requires_grad_()
    exact = reference.intra_class_loss(leaf, labels, 4, estimator="exact", temperature=0.7)
    (exact_gradient,) = torch.autograd.grad(exact, leaf)
    assert found is not None
    if estimator == "sampled":  # its draw is the audit's own
        assert 0.05 < found.gradient_error < 2 and found.bias != 0
        return
    estimate = reference.intra_class_loss(leaf, labels, 4, temperature=0.7)
    (gradient,) = torch.autograd.grad(estimate, leaf)
    assert found.gradient_error == pytest.approx(float((gradient - exact_gradient).norm() / exact_gradient.norm()))
    assert found.bias == pytest.approx(float(((estimate - exact) / exact.abs()).detach()))


def test_exact_has_no_error() -> None:
    found = audit_intra(IntraClassLoss(4, estimator="exact"), *bimodal(dim=6), seed=0)
    assert found is not None and found.gradient_error == 0 and found.bias == 0


def test_every_class_gives_an_equal_share_or_all_it_has() -> None:
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate((5000, 1, 40, 0, 3000))] + [torch.full((9,), 255)])
    labels = labels[torch.randperm(len(labels))]
    rows, classes = drawn(IntraClassLoss(5), torch.randn(len(labels), 8), labels, 1000)
    assert classes.bincount(minlength=5).tolist() == [480, 1, 40, 0, 479]
    assert rows.shape == (1000, 8) and rows.dtype == torch.float64


def test_the_draw_is_without_replacement_and_the_seeds() -> None:
    features, labels = torch.arange(600.0)[:, None].expand(-1, 2), torch.arange(600) % 3
    first, again, other = (drawn(IntraClassLoss(3), features, labels, 90, seed)[0][:, 0] for seed in (0, 0, 1))
    assert len(first.unique()) == 90 and torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(28, 20), (7, 5), (9, 13)])
def test_rows_are_what_the_loss_compares(size: tuple[int, int], layout: torch.memory_format) -> None:
    """All labelled pixels, at both resolutions, beside the reference's rows."""
    features = torch.randn(2, 4, 7, 5).to(memory_format=layout)
    labels = torch.randint(0, 3, (2, *size), dtype=torch.uint8)
    labels[0, :2] = 255
    for resolution in ("label", "feature"):
        loss = IntraClassLoss(3, resolution=resolution)  # type: ignore[arg-type]
        rows, classes = drawn(loss, features, labels, 10_000)
        expected, found = reference.labelled_rows(
            features.double(),
            labels,
            3,
            ignore_index=255,
            resolution=resolution,  # type: ignore[arg-type]
        )
        order = torch.cat([(found == k).nonzero().squeeze(1) for k in found.bincount().argsort(stable=True).tolist()])
        torch.testing.assert_close(rows, expected[order])
        assert torch.equal(classes, found[order])


def test_nothing_to_compare() -> None:
    features = torch.randn(1, 4, 8, 8)
    labels = torch.full((1, 32, 32), 255, dtype=torch.uint8)
    assert audit_intra(IntraClassLoss(3), features, labels, seed=0) is None
    labels[0, 0, 0], labels[0, 31, 31] = 0, 2
    assert audit_intra(IntraClassLoss(3), features, labels, seed=0) is None
    labels[0, 0, 1] = 0
    found = audit_intra(IntraClassLoss(3), features, labels, seed=0)
    assert found is not None and found.pixels == 3


def test_features_without_a_direction() -> None:
    found = audit_intra(IntraClassLoss(3), torch.zeros(30, 4), torch.arange(30) % 3, seed=0)
    assert found is not None and found.gradient_error == 0


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_leaves_everything_alone(context: Any) -> None:
    """The caller's gradient mode and autocast, its graph and its random numbers."""
    features, labels = bimodal(dim=6, pixels=300)
    loss = IntraClassLoss(4, estimator="sampled", per_class=20)
    expected = audit_intra(loss, features, labels, seed=0)
    features.requires_grad_()
    state = torch.get_rng_state()
    with context():
        assert audit_intra(loss, features * 1, labels, seed=0) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert features.grad is None


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("projection", [None, 5])
@pytest.mark.parametrize("estimator", ["moments", "sampled"])
def test_sees_what_the_losses_compare(estimator: Any, projection: int | None, rows: bool) -> None:
    criterion = In2NeCTLoss(3, 8, projection=projection, estimator=estimator)
    shape, labels_shape = ((72, 8), (72,)) if rows else ((2, 8, 6, 6), (2, 6, 6))
    features, labels = torch.randn(shape, requires_grad=True), torch.randint(0, 3, labels_shape)
    with seen_by(criterion) as seen:
        terms = criterion(features, labels, generator=torch.Generator().manual_seed(1))
    criterion(features, labels)
    ((found, given),) = seen
    assert found.shape == (shape[0], projection or 8, *shape[2:]) and not found.requires_grad and given is labels
    intra = criterion.intra(found, labels, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(intra, terms.intra.detach())


class Kept(Logger):
    """A logger that keeps what it is given."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))

    def audits(self) -> list[tuple[int | None, dict[str, float]]]:
        return [(step, values) for step, values in self.logged if any("audit/" in name for name in values)]


class Samples(lightning.LightningDataModule):
    """Six images of 64 x 64, of which ``unlabelled`` ones carry no class."""

    classes = CLASSES

    def __init__(self, unlabelled: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (6, 3, 64, 64), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (6, 64, 64), generator=generator, dtype=torch.uint8)
        labels[:unlabelled] = 255
        self.samples = [{"image": image, "label": label} for image, label in zip(images, labels)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, batch_size=1)  # type: ignore[arg-type]


def train(tmp_path: Path, tuning: TuningSettings, *, unlabelled: int = 0, **options: Any):
    torch.manual_seed(0)
    module = SegmentationModule(encoder="test_efficientnet", tuning=tuning)
    logger = Kept()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Samples(unlabelled))
    return (
        module,
        logger,
        [str(one.message) for one in caught if "gradient of the intra-class loss" in str(one.message)],
    )


@pytest.mark.parametrize("changes", [{}, {"projection": 8}, {"estimator": "sampled", "per_class": 64}])
def test_training_is_the_same_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, quiet, _ = train(tmp_path, TuningSettings(**changes))
    audited, logger, _ = train(tmp_path, TuningSettings(**changes, intra_audit=2))
    expected, found = plain.state_dict(), audited.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert quiet.audits() == []
    assert [step for step, _ in logger.audits()] == [1, 3, 5]  # log_every_n_steps is 50
    for _, values in logger.audits():
        assert set(values) == {"audit/intra_gradient_error", "audit/intra_bias"}
        assert 0 < values["audit/intra_gradient_error"] < (1 if audited.tuning.estimator == "moments" else 1e4)
    last = logger.audits()[-1][1]["audit/intra_gradient_error"]
    assert float(audited.trainer.callback_metrics["audit/intra_gradient_error"]) == pytest.approx(last)


def test_once_a_step_where_batches_are_accumulated(tmp_path: Path) -> None:
    _, logger, _ = train(tmp_path, TuningSettings(intra_audit=1), accumulate_grad_batches=2)
    assert [step for step, _ in logger.audits()] == [0, 1, 2]


def test_a_batch_without_labels_is_not_logged(tmp_path: Path) -> None:
    _, logger, _ = train(tmp_path, TuningSettings(intra_audit=1), unlabelled=2)
    assert [step for step, _ in logger.audits()] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({}, "try model.tuning.covariance=class, a temperature above 1, or model.tuning.estimator=exact or sampled"),
        ({"covariance": "class", "temperature": 0.4}, "so, try a temperature above 0.4, or"),
        ({"estimator": "sampled", "per_class": 64}, None),  # whose error is its noise
    ],
)
def test_warns_once_with_the_number_and_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], mend: str | None
) -> None:
    monkeypatch.setattr(
        "in2nect.training.module.audit_intra",
        lambda _, features, labels, *, seed: audit.IntraAudit(0.05 * seed[1], 0.0, 77),
    )
    _, _, warned = train(tmp_path, TuningSettings(**changes, intra_audit=1))
    if mend is None:
        assert warned == []
        return
    assert len(warned) == 1
    assert warned[0].startswith("step 3: ") and "off by 0.15" in warned[0] and "77 pixels" in warned[0]
    assert mend in warned[0]


def test_settings_that_cannot_be_audited() -> None:
    with pytest.raises(ValueError, match=r"tuning.intra_audit is -1; expected the number of steps"):
        TuningSettings(intra_audit=-1)
    with pytest.raises(ValueError, match="nothing to compare the exact loss with"):
        TuningSettings(intra_audit=5, estimator="exact")
    TuningSettings(enabled=False, intra_audit=5, estimator="exact")  # the plain arm of a comparison
    module = SegmentationModule(
        encoder="test_efficientnet", tuning=TuningSettings(intra_audit=5, estimator="sampled", per_class=1365)
    )
    with pytest.raises(ValueError, match="compares 1365 pixels of each of 3 classes"):
        module.build(CLASSES)


def test_a_resumed_run_may_be_audited() -> None:
    module = SegmentationModule(tuning=TuningSettings(intra_audit=5))
    stored = {**module.hparams, "tuning": {**module.hparams["tuning"], "intra_audit": 0}}
    module._check_settings(stored)
    del stored["tuning"]["intra_audit"]  # written before there were audits
    module._check_settings(stored)
    stored["tuning"]["weight"] = 0.5
    with pytest.raises(ValueError, match="weight"):
        module._check_settings(stored)
