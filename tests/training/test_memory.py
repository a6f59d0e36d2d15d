"""The count of a step's memory: on fake tensors as on real ones, against torch's hooks, gradients and profiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from in2nect.data.classes import Classes
from in2nect.training import memory
from in2nect.training.memory import fake_tensors, step_memory, to_fake
from in2nect.training.module import SegmentationModule
from in2nect.training.settings import LossSettings, TuningSettings

CLASSES = Classes(("field", "road", "water"), ((0, 128, 0), (128, 128, 128), (0, 0, 255)))
SHAPE = (2, 128)  # images, side


class Step:
    """A training step of a small network."""

    device, dtype = "cpu", None

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.module = SegmentationModule(encoder="test_efficientnet", **options)
        self.module.build(CLASSES)
        self.module.train()
        for dropout in (part for part in self.module.modules() if isinstance(part, nn.Dropout2d)):
            dropout.p = 0.0
        for weight in self.module.parameters():
            weight.grad = torch.zeros_like(weight)
        count, side = SHAPE
        self.images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        self.labels = torch.randint(0, 3, (count, side, side), dtype=torch.uint8)

    def faked(self, device: str, dtype: torch.dtype | None = None) -> Step:
        """The same on fake tensors."""
        self.device, self.dtype = device, dtype  # type: ignore[assignment]
        to_fake(self.module, torch.device(device))
        self.images, self.labels = (
            torch.empty(batch.shape, dtype=torch.uint8, device=device) for batch in (self.images, self.labels)
        )
        return self

    def forward(self) -> Any:
        with torch.autocast(self.device, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return self.module.model.forward_training(self.module.normalise(self.images))

    def loss(self, output: Any) -> Tensor:
        return self.module.total_loss(output, self.labels)

    def known(self) -> list[Tensor]:
        weights = list(self.module.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        return [*weights, *gradients, *self.module.buffers(), self.images, self.labels]

    def count(self) -> memory.StepMemory:
        return step_memory(self.forward, self.loss, self.known())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tuning": TuningSettings(estimator="sampled", resolution="feature", per_class=20, projection=8)},
        {
            "tuning": TuningSettings(estimator="exact", resolution="feature"),
            "loss": LossSettings(ohem_threshold=0.7, class_weights={"road": 2.0}, label_smoothing=0.1, dice_weight=0.5),
        },
    ],
)
def test_fake_tensors_take_as_much_as_real_ones(options: dict[str, Any]) -> None:
    """In the forward pass, to the byte; inside operators there are no fakes, so the peak of real ones may be higher."""
    real, step = Step(**options).count(), Step(**options)
    with fake_tensors():
        fake = step.faked("cpu").count()
    assert (fake.of_network, fake.kept) == (real.of_network, real.kept)
    assert fake.peak == pytest.approx(real.peak, rel=0.1)


def test_what_is_kept_is_what_autograd_saves() -> None:
    step = Step()
    known = {tensor.untyped_storage()._cdata for tensor in step.known()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = step.loss(step.forward())
    assert Step().count().kept == sum(storage.nbytes() for storage in saved.values()) + total.nbytes


def test_the_backward_pass_is_torchs() -> None:
    counted, trained = Step(), Step()
    counted.count()
    trained.loss(trained.forward()).backward()
    ours, theirs = (
        torch.cat([weight.grad.flatten() for weight in step.module.parameters() if weight.grad is not None])
        for step in (counted, trained)
    )
    assert len(ours) == len(theirs) and theirs.any()
    assert torch.linalg.vector_norm(ours - theirs) < 1e-5 * torch.linalg.vector_norm(theirs)  # in another order


def test_the_peak_is_what_a_step_allocates() -> None:
    """The profiler sees every block that torch's allocator hands out on the CPU, inside operators too."""
    step = Step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step.loss(step.forward()).backward()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    with fake_tensors():
        estimate = step.faked("cpu").count().peak
    assert estimate == pytest.approx(peak, rel=0.05)


def test_a_gpu_that_is_not_there_has_its_own_autocast() -> None:
    """On CUDA a softmax is in float32 under autocast, in the CPU's it is not; and half the width is about half the
    memory."""
    full, mixed = Step(), Step()
    with fake_tensors():
        assert torch.zeros(2, device="cuda").device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16):
            product = torch.zeros(2, 2, device="cuda") @ torch.zeros(2, 2, device="cuda")
            assert (product.dtype, product.softmax(1).dtype) == (torch.bfloat16, torch.float32)
        whole, half = full.faked("cuda").count().of_network, mixed.faked("cuda", torch.bfloat16).count().of_network
    assert 0.45 * whole < half < 0.75 * whole
    assert torch.is_autocast_enabled("cuda") is False


def test_what_is_checkpointed_is_not_kept_but_made_again() -> None:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)])

    def plain(x: Tensor) -> Tensor:
        return layers(x)

    def checkpointed(x: Tensor) -> Tensor:
        for layer in layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x

    found = {}
    with fake_tensors():
        to_fake(layers, torch.device("cuda"))
        x = torch.zeros(1000, 64, device="cuda")
        known = [*layers.parameters(), *[weight.grad for weight in layers.parameters()], x]
        for name, forward in (("plain", plain), ("checkpointed", checkpointed)):
            found[name] = step_memory(lambda run=forward: run(x), Tensor.sum, known)  # type: ignore[misc, arg-type]
    one = x.numel() * 4  # bytes of a layer's output
    assert found["plain"].kept == 8 * one + 4  # each tanh's own output, and the total
    assert 6 * one < found["checkpointed"].kept < 9 * one
