"""Gradient checkpointing: the same outputs, gradients, statistics and random numbers, from fewer bytes kept."""

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from in2nect import RepresentationTap
from in2nect.models import Representation, SegmentationModel, TrainingOutput
from tests.models.hosts import HOSTS, make


class Step(NamedTuple):
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    kept: int  # bytes


@pytest.mark.parametrize(("name", "encoder"), HOSTS)
def test_the_same_step_from_fewer_bytes(name: str, encoder: str) -> None:
    model = make(name, encoder).double().train()  # dropout is on
    plain = training_step(deepcopy(model))
    model.set_gradient_checkpointing()
    checkpointed = training_step(deepcopy(model))
    assert_same(checkpointed, plain)
    assert checkpointed.kept < 0.65 * plain.kept  # MANet's last maps are large: 32 channels at the image's size
    model.set_gradient_checkpointing(False)
    assert training_step(model).kept == plain.kept


@pytest.mark.parametrize(("name", "encoder"), [("unetformer", "lsknet"), ("manet", "test_efficientnet")])
def test_it_compiles(name: str, encoder: str) -> None:
    torch._dynamo.reset()
    model = make(name, encoder).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0  # a compiled graph draws other random numbers
    plain = training_step(deepcopy(model))
    model.set_gradient_checkpointing()
    compiled = training_step(model, compile=True)
    assert_same(compiled, plain, atol=1e-10)
    assert compiled.kept < 0.65 * plain.kept


def test_a_tap_sees_the_step_once() -> None:
    model = make("unetformer", "resnet10t").train()
    model.set_gradient_checkpointing()
    tap = RepresentationTap(model)
    output = model.forward_training(images().float())
    assert tap.features is output.features
    output.logits.mean().backward()
    assert tap.features is output.features


def test_setting_it_twice_is_setting_it_once() -> None:
    model = make("manet", "test_efficientnet").double().train()
    plain = training_step(deepcopy(model))
    model.set_gradient_checkpointing()
    model.set_gradient_checkpointing()
    assert_same(training_step(model), plain)
    model.set_gradient_checkpointing(False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_network_with_nothing_to_checkpoint_says_so() -> None:
    class Bare(SegmentationModel):
        representation = Representation("classifier", 3, 1)

        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(x)

        def forward_training(self, x: Tensor) -> TrainingOutput:
            return TrainingOutput(self.classifier(x), x, None)

    with pytest.raises(ValueError, match="Bare has nothing to checkpoint"):
        Bare().set_gradient_checkpointing()


def training_step(model: SegmentationModel, *, compile: bool = False) -> Step:
    forward = model.forward_training
    if compile:
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    own = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    torch.manual_seed(3)
    with saved_tensors_hooks(note, lambda value: value):
        output = forward(images())
    outputs = [value for value in output if value is not None]
    torch.stack([value.square().mean() for value in outputs]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Step(outputs, gradients, dict(model.named_buffers()), sum(kept.values()))


def images() -> Tensor:
    return torch.randn(2, 3, 43, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(found: Step, expected: Step, atol: float = 0.0) -> None:
    for value, reference in zip(found.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=atol)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=0, atol=atol)
    torch.testing.assert_close(found.buffers, expected.buffers, rtol=0, atol=atol)
