"""create_model's checks and the contract every registered network keeps."""

import dataclasses

import pytest
import torch

from in2nect import RepresentationTap
from in2nect.models import Representation, SegmentationModel, create_model, list_models, register_model


def test_list_models_names_the_hosts() -> None:
    assert {"lsknet_s", "lsknet_t", "manet", "unetformer"} <= set(list_models())
    assert list_models() == sorted(list_models())


def test_unknown_model_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'unetfomer'.*unetformer"):
        create_model("unetfomer", 7)


@pytest.mark.parametrize("num_classes", [0, 1])
def test_too_few_classes(num_classes: int) -> None:
    with pytest.raises(ValueError, match=f"num_classes is {num_classes}"):
        create_model("unetformer", num_classes)


def test_no_channels() -> None:
    with pytest.raises(ValueError, match="in_channels is 0"):
        create_model("unetformer", 7, in_channels=0)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'unetformer' is registered already"):
        register_model("unetformer")(lambda num_classes, **options: pytest.fail("never built"))


def test_representation_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Representation("classifier", 64, 4).width = 32  # type: ignore[misc]


@pytest.mark.parametrize("size", [(64, 96), (123, 77)])
@pytest.mark.parametrize("name", list_models())
def test_every_model_keeps_the_contract(name: str, size: tuple[int, int]) -> None:
    model = create_model(name, 5).eval()
    height, width = (side + -side % model.size_multiple for side in size)
    assert isinstance(model, SegmentationModel)
    assert len(model.input_mean) == len(model.input_std) == 3
    inputs = []
    model.get_submodule(model.representation.module).register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        logits = model(x)
        output = model.forward_training(x)
    stride = model.representation.stride
    assert output.features.shape == (2, model.representation.width, -(-height // stride), -(-width // stride))
    assert torch.equal(output.features, inputs[0])
    assert torch.equal(output.features, inputs[1])
    assert output.logits.shape == (2, 5, height, width)
    assert torch.equal(output.logits, logits)
    assert output.auxiliary is None or output.auxiliary.shape == logits.shape
    with torch.no_grad():
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), logits, rtol=1e-4, atol=1e-4)
    training = model.train().forward_training(x)
    assert training.logits.shape == logits.shape and training.features.shape == output.features.shape
    assert training.logits.isfinite().all()


def test_tap_takes_the_representation_before_dropout() -> None:
    model = create_model("unetformer", 5).train()
    tap = RepresentationTap(model)
    assert (tap.layer, tap.dim) == (model.representation.module, model.representation.width)
    output = model.forward_training(torch.randn(2, 3, 64, 96))
    assert torch.equal(tap.features, output.features)
