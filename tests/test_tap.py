import copy
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from in2nect import In2NeCTLoss, RepresentationTap


class Segmenter(nn.Module):
    """A backbone at stride 4, an auxiliary classifier and a classifier, as torchvision's networks have them."""

    def __init__(self, auxiliary=True, num_classes=5):
        super().__init__()
        self.backbone = nn.Conv2d(3, 12, 3, stride=4, padding=1)
        self.head = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, num_classes, 1))
        if auxiliary:
            self.aux_classifier = nn.Conv2d(12, num_classes, 1)

    def forward(self, x):
        features = self.backbone(x)
        return {"out": self.head(features), "aux": self.aux_classifier(features)}


class LinearHead(nn.Module):
    def __init__(self, flatten=False):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 4, stride=4)
        self.classifier = nn.Linear(6, 3)
        self.flatten = flatten

    def forward(self, x):
        tokens = self.body(x).permute(0, 2, 3, 1)
        return self.classifier(tokens.flatten(1, 2) if self.flatten else tokens)


def test_finds_the_classifier_and_captures_its_input():
    model = Segmenter()
    tap = RepresentationTap(model, num_classes=5)
    assert (tap.layer, tap.dim) == ("head.2", 8)
    x = torch.randn(2, 3, 32, 24)
    model(x)
    expected = model.head[1](model.head[0](model.backbone(x)))
    torch.testing.assert_close(tap.features, expected)
    assert tap.stride == 4
    assert RepresentationTap(model).layer == "head.2"  # the auxiliary classifier is registered last and does not win


def test_three_lines_train_a_model():
    model = Segmenter()
    x, y = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    tap = RepresentationTap(model)
    criterion = In2NeCTLoss(5, tap.dim)
    logits = nn.functional.interpolate(model(x)["out"], size=y.shape[1:], mode="bilinear")
    loss = nn.functional.cross_entropy(logits, y) + criterion(tap.features, y).total
    loss.backward()
    assert model.backbone.weight.grad.abs().sum() > 0


def test_linear_classifier():
    model = LinearHead()
    tap = RepresentationTap(model)
    x = torch.randn(2, 3, 16, 8)
    model(x)
    torch.testing.assert_close(tap.features, model.body(x))
    flat = LinearHead(flatten=True)
    RepresentationTap(flat)
    with pytest.raises(ValueError, match=r"shape \(2, 8, 6\).*before the tokens are flattened"):
        flat(x)


def test_nothing_at_inference():
    model = Segmenter()
    tap = RepresentationTap(model)
    x = torch.randn(1, 3, 16, 16)
    model(x)
    with torch.no_grad():
        model(x)
    with pytest.raises(RuntimeError, match=r"'head.2' holds no features: call model\(x\) first"):
        _ = tap.features
    tap.remove()
    model(x)
    with pytest.raises(RuntimeError):
        _ = tap.features
    assert not model._forward_pre_hooks
    assert not model.head[2]._forward_pre_hooks


def test_named_layers_and_errors():
    model = Segmenter()
    assert RepresentationTap(model, "aux_classifier").dim == 12
    assert RepresentationTap(model, model.head[2]).layer == "head.2"
    with pytest.raises(ValueError, match=r"no layer 'classifier'; candidates[\s\S]*head.2: Conv2d, 5 outputs"):
        RepresentationTap(model, "classifier")
    with pytest.raises(ValueError, match=r"'head.1' is a ReLU"):
        RepresentationTap(model, "head.1")
    with pytest.raises(ValueError, match="not a module of this Segmenter"):
        RepresentationTap(model, nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="0 layers may be the classifier"):
        RepresentationTap(model, num_classes=6)
    two = nn.ModuleDict({"a": nn.Conv2d(4, 5, 1), "b": nn.Conv2d(4, 5, 1)})  # and so with a boundary head of 1 output
    with pytest.raises(ValueError, match=r"2 layers may be the classifier[\s\S]*a: Conv2d, 5 outputs\n  b: Conv2d"):
        RepresentationTap(two)


def test_a_declared_representation_wins():
    class Declaration(NamedTuple):
        module: str
        width: int

    model = Segmenter()
    model.representation = Declaration("head.1", 8)
    tap = RepresentationTap(model)
    assert (tap.layer, tap.dim) == ("head.1", 8)


def test_a_second_head_is_never_taken_by_its_place():
    model = Segmenter(auxiliary=False)
    model.boundary = nn.Conv2d(12, 1, 1)
    with pytest.raises(
        ValueError, match=r"2 layers may be the classifier[\s\S]*head.2: Conv2d, 5[\s\S]*boundary: Conv2d, 1"
    ):
        RepresentationTap(model)
    assert RepresentationTap(model, num_classes=5).layer == "head.2"


def test_a_module_called_representation_is_no_declaration():
    model = Segmenter()
    model.representation = nn.Sequential(nn.Linear(8, 8))
    assert RepresentationTap(model, num_classes=5).layer == "head.2"


def test_declaration_inside_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    class Declaration(NamedTuple):
        module: str
        width: int

    model = Segmenter()
    model.representation = Declaration("head.1", 8)
    tap = RepresentationTap(Wrapper(model))
    assert (tap.layer, tap.dim) == ("module.head.1", 8)
    assert RepresentationTap(torch.compile(model, backend="eager")).layer.endswith("head.1")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_tapped(duplicate):
    """As an exponential moving average makes one in mid-training: its forward must not touch the tap."""
    model = Segmenter()
    tap = RepresentationTap(model)
    x = torch.randn(1, 3, 16, 16)
    model(x)
    features = tap.features
    twin = duplicate(model)
    twin(2 * x)
    assert tap.features is features
    assert twin.state_dict().keys() == model.state_dict().keys() == Segmenter().state_dict().keys()


def test_compiled_model():
    model = Segmenter()
    tap = RepresentationTap(model)
    x = torch.randn(2, 3, 16, 16)
    torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(tap.features, model.head[1](model.head[0](model.backbone(x))))


def test_the_lines_of_the_readme():
    """The README's Python, run as it stands there."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    x, y = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    y[0, :4] = 255

    class Plain(Segmenter):
        def forward(self, x):
            return nn.functional.interpolate(super().forward(x)["out"], size=x.shape[2:], mode="bilinear")

    for program, model in ((first, Plain()), (first.rpartition("loss = ")[0] + second, Segmenter())):
        names = {"model": model, "x": x, "y": y, "num_classes": 5}
        exec(program, names)
        names["loss"].backward()
        assert model.backbone.weight.grad.abs().sum() > 0
