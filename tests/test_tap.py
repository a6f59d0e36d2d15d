"""The tap: what it finds in networks of four libraries, and that it comes through whatever training does to them."""

import copy
import gc
import io
import os
import pickle
import weakref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from in2nect import In2NeCTLoss, RepresentationTap
from in2nect.metrics import CollapseMetrics

K = 5


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


class OneOutput(Segmenter):
    """Logits alone, at the image's size."""

    def forward(self, x):
        return F.interpolate(super().forward(x)["out"], size=x.shape[2:], mode="bilinear")


class LinearHead(nn.Module):
    def __init__(self, flatten=False):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 4, stride=4)
        self.classifier = nn.Linear(6, 3)
        self.flatten = flatten

    def forward(self, x):
        tokens = self.body(x).permute(0, 2, 3, 1)
        return self.classifier(tokens.flatten(1, 2) if self.flatten else tokens)


def before_the_classifier(model, x):
    """What the tap of a Segmenter must hold."""
    return model.head[1](model.head[0](model.backbone(x)))


def a_batch(size=32):
    """Images whose classes have colours of their own, and labels with a border that is not labelled."""
    y = torch.full((2, size, size), K - 1)
    y[:, : size // 2] = torch.arange(K - 1).repeat_interleave(size // (K - 1))
    colours = torch.randn(K, 3)
    x = (colours[y] + 0.3 * torch.randn(2, size, size, 3)).permute(0, 3, 1, 2).contiguous()
    y[:, :2] = 255
    return x, y


def losses(outputs, tap, y, criterion=None):
    """Cross-entropy of the logits, wherever they are, and the terms of the tapped features."""
    logits = outputs["out"] if isinstance(outputs, dict) and "out" in outputs else getattr(outputs, "logits", outputs)
    logits = F.interpolate(logits, size=y.shape[1:], mode="bilinear")
    criterion = criterion or In2NeCTLoss(K, tap.dim)
    return F.cross_entropy(logits, y, ignore_index=255), criterion(tap.features, y)


def gradients(model, call=None):
    """Of a training step of `model`, taken by `call` if that wraps it and tapped there."""
    call = model if call is None else call
    tap = RepresentationTap(call)
    x, y = a_batch()
    cross_entropy, terms = losses(call(x), tap, y)
    (cross_entropy + terms.total).backward()
    return [parameter.grad for name, parameter in model.named_parameters() if "aux" not in name]


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


def test_names_are_found_inside_wrappers():
    wrapped = torch.optim.swa_utils.AveragedModel(Segmenter())
    assert RepresentationTap(wrapped, "head.2").layer == RepresentationTap(wrapped, "module.head.2").layer
    assert RepresentationTap(torch.compile(wrapped, backend="eager"), "head.2").layer == "_orig_mod.module.head.2"


def test_layers_with_as_many_outputs_as_classes_are_no_classifiers_where_they_are_normalised():
    widths = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 1), nn.LayerNorm([5]))
    widths.append(nn.ConvTranspose2d(5, 5, 2, stride=2))
    tap = RepresentationTap(widths, num_classes=5)
    assert (tap.layer, tap.dim) == ("5", 5)
    cascade = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 3))  # a classifier, and one that refines its logits
    with pytest.raises(ValueError, match="2 layers may be the classifier"):
        RepresentationTap(cascade, num_classes=5)


def test_an_error_lists_few_of_many_candidates():
    heads = nn.ModuleList(nn.Conv2d(4, 5, 1) for _ in range(30))
    with pytest.raises(
        ValueError, match=r"30 layers may[\s\S]*\(18 more before these\)\n  18: Conv2d, 5 outputs\n  19"
    ) as e:
        RepresentationTap(heads)
    assert "29: Conv2d" in str(e.value)


def test_a_lazy_classifier_is_tapped_once_it_knows_its_width():
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU(), nn.LazyConv2d(5, 1))
    with pytest.raises(ValueError, match="does not know its width yet, being a LazyConv2d: run the model once"):
        RepresentationTap(model, "2")
    model(torch.randn(1, 3, 4, 4))
    assert RepresentationTap(model).dim == 4


def test_images_and_features_by_keyword():
    class Keywords(Segmenter):
        def forward(self, *, mask, pixels):
            return self.head[2](input=before_the_classifier(self, pixels))

    model = Keywords(auxiliary=False)
    tap = RepresentationTap(model)
    x = torch.randn(2, 3, 32, 24)
    model(mask=torch.ones(2, 32, 24), pixels=x)
    torch.testing.assert_close(tap.features, before_the_classifier(model, x))
    assert tap.stride == 4


# Inference and memory


def test_inference_is_the_same_with_a_tap_and_keeps_nothing():
    model = Segmenter().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)["out"]
    tap = RepresentationTap(model)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(x)["out"], expected)
        assert tap._features is None
    model(x)  # eval mode with gradients, as fine-tuning with frozen normalisation has it, is training
    assert tap.features.requires_grad
    tap.remove()
    assert not model._forward_pre_hooks and not model.head[2]._forward_pre_hooks
    assert torch.equal(model(x)["out"], expected)


def test_features_live_until_the_next_forward_pass():
    model = Segmenter()
    tap = RepresentationTap(model)
    x = torch.randn(1, 3, 16, 16)
    model(x)
    first = weakref.ref(tap.features)
    model(x)
    gc.collect()
    assert first() is None
    second = weakref.ref(tap.features)
    tap.release()
    gc.collect()
    assert second() is None
    model(x)
    with pytest.raises(RuntimeError):  # a pass that fails leaves nothing stale behind
        model(torch.randn(1, 4, 16, 16))
    assert tap._features is None


def test_measuring_captures_without_gradients():
    model = Segmenter().eval()
    tap = RepresentationTap(model)
    metrics = CollapseMetrics(K, tap.dim)
    x, y = a_batch()
    with torch.no_grad(), tap.measuring():
        model(x)
        assert not tap.features.requires_grad
        metrics.update(tap.features, y)
        torch.testing.assert_close(tap.features, before_the_classifier(model, x))
    assert metrics.compute()["nc1"] > 0
    assert tap._features is None
    with torch.no_grad():
        model(x)
    assert tap._features is None


def test_an_export_sees_the_network_alone():
    model = OneOutput().eval()
    x = torch.randn(1, 3, 16, 16)
    expected = model(x)
    tap = RepresentationTap(model)
    exported = torch.export.export(model, (x,))  # gradients are on, as a user would leave them
    assert tap._features is None
    assert len(next(node for node in exported.graph.nodes if node.op == "output").args[0]) == 1
    torch.testing.assert_close(exported.module()(x), expected)


# Copies


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


def test_an_averaged_model_leaves_the_tap_alone_and_holds_no_activations():
    model = Segmenter()
    tap = RepresentationTap(model)
    x = torch.randn(1, 3, 16, 16)
    model(x)
    features = weakref.ref(tap.features)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    averaged(2 * x)
    assert tap.features is features()
    tap.release()
    gc.collect()
    assert features() is None
    reloaded = Segmenter()
    reloaded.load_state_dict(averaged.module.state_dict())
    RepresentationTap(averaged, "head.2").remove()  # and the average can be tapped for itself


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
@pytest.mark.parametrize("tap_first", [False, True])
def test_a_tap_that_is_copied_with_its_model_taps_the_copy(duplicate, tap_first):
    """As where a training module holds both, and its average is a copy of it, taken between two steps."""
    model = Segmenter()
    tap = RepresentationTap(model)
    owner = {"tap": tap, "model": model} if tap_first else {"model": model, "tap": tap}
    x = torch.randn(1, 3, 16, 16)
    model(x)
    features = tap.features
    twin = duplicate(owner)
    with pytest.raises(RuntimeError, match="holds no features"):
        _ = twin["tap"].features
    twin["model"](2 * x)
    assert tap.features is features
    torch.testing.assert_close(twin["tap"].features, before_the_classifier(model, 2 * x))
    twin["tap"].remove()
    twin["model"](x)
    assert twin["tap"]._features is None and tap.features is features
    shallow = copy.copy(tap)
    model(x)
    assert tap.features is not features and shallow._features is None


def test_a_whole_model_is_saved_and_loaded():
    model = Segmenter()
    RepresentationTap(model)
    model(torch.randn(1, 3, 16, 16))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(x)["out"], model(x)["out"])


def test_a_replica_of_data_parallel_is_an_error():
    model = nn.Conv2d(3, 5, 1)
    RepresentationTap(model)
    replica = model._replicate_for_data_parallel()
    replica.weight, replica.bias = model.weight, model.bias
    with torch.no_grad():
        replica(torch.randn(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match=r"DataParallel runs copies of the model.*use DistributedDataParallel"):
        replica(torch.randn(1, 3, 4, 4))


# Mixed precision and checkpointing


def test_autocast():
    model = Segmenter()
    tap = RepresentationTap(model)
    x, y = a_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cross_entropy, terms = losses(model(x), tap, y)
    assert tap.features.dtype == torch.bfloat16
    assert terms.total.dtype == torch.float32
    (cross_entropy + terms.total).backward()
    reduced = model.backbone.weight.grad
    torch.manual_seed(0)
    model = Segmenter()
    full = gradients(model)[0]
    assert F.cosine_similarity(reduced.flatten(), full.flatten(), dim=0) > 0.99


class Checkpointed(Segmenter):
    """Saves memory on what makes the representation, or on the classifier with it."""

    def __init__(self, segment, use_reentrant):
        super().__init__()
        self.segment, self.use_reentrant = segment, use_reentrant

    def forward(self, x):
        features = self.backbone(x)
        if self.segment == "head":
            return {"out": checkpoint(self.head, features, use_reentrant=self.use_reentrant)}
        return {"out": self.head[2](checkpoint(self.head[:2], features, use_reentrant=self.use_reentrant))}


@pytest.mark.parametrize(
    ("segment", "use_reentrant"), [("representation", False), ("representation", True), ("head", False)]
)
def test_gradient_checkpointing(segment, use_reentrant):
    torch.manual_seed(0)
    expected = gradients(Segmenter())
    torch.manual_seed(0)
    model = Checkpointed(segment, use_reentrant)
    tap = RepresentationTap(model)
    torch.testing.assert_close(gradients(model), expected)
    x, y = a_batch()
    cross_entropy, terms = losses(model(x), tap, y)
    features = tap.features
    (cross_entropy + terms.total).backward()
    assert tap.features is features  # and not those that the backward pass computed again


def test_a_classifier_in_a_reentrant_checkpoint_is_an_error():
    model = Checkpointed("head", True)
    tap = RepresentationTap(model)
    model(torch.randn(1, 3, 16, 16))
    with pytest.raises(RuntimeError, match="needs use_reentrant=False"):
        _ = tap.features


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_whole(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)  # a graph break is an error


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("order", ["before", "after", "in place"])
def test_compiled_without_a_graph_break(order):
    torch.manual_seed(0)
    expected = gradients(Segmenter())
    torch.manual_seed(0)
    model = compiled = Segmenter()
    if order == "after":
        compiled = compiled_whole(model)
    tap = RepresentationTap(compiled)
    if order == "before":
        compiled = compiled_whole(model)
    if order == "in place":
        model.compile(backend="aot_eager", fullgraph=True)
    x, y = a_batch()
    cross_entropy, terms = losses(compiled(x), tap, y)
    assert tap.stride == 4
    (cross_entropy + terms.total).backward()
    found = [parameter.grad for name, parameter in model.named_parameters() if "aux" not in name]
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_always_holds_the_features_of_its_last_forward_pass():
    model = Segmenter()
    tap = RepresentationTap(model)
    compiled = compiled_whole(model)
    for size in (16, 16, 32, 48, 16):
        x = torch.randn(2, 3, size, size)
        compiled(x)
        tap.features.sum().backward()
        torch.testing.assert_close(tap.features, before_the_classifier(model, x))
        with torch.no_grad():
            compiled(x)
        assert tap._features is None
    with torch.no_grad(), tap.measuring():
        compiled(x)
        torch.testing.assert_close(tap.features, before_the_classifier(model, x))
    tap.remove()
    compiled(x)
    assert tap._features is None  # the graph that captures is not run any more


@pytest.mark.usefixtures("fresh_compiler")
def test_a_graph_from_before_the_tap_is_an_error_that_says_so():
    model = Segmenter()
    compiled = compiled_whole(model)
    x = torch.randn(2, 3, 16, 16)
    compiled(x)
    tap = RepresentationTap(compiled)
    compiled(x)
    with pytest.raises(RuntimeError, match=r"before the model was tapped: call torch\.compiler\.reset"):
        _ = tap.features
    torch.compiler.reset()
    compiled(x)
    torch.testing.assert_close(tap.features, before_the_classifier(model, x))


@pytest.mark.usefixtures("fresh_compiler")
def test_two_tapped_and_compiled_networks_of_one_class():
    first, second = Segmenter(), Segmenter()
    taps = RepresentationTap(first), RepresentationTap(second)
    x = torch.randn(2, 3, 16, 16)
    compiled = compiled_whole(first), compiled_whole(second)
    for _ in range(2):
        for one in compiled:
            one(x)
    for model, tap in zip((first, second), taps):
        torch.testing.assert_close(tap.features, before_the_classifier(model, x))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_twin_without_a_tap_shares_no_graph_where_hooks_are_looked_at():
    """By default torch does not look, and the twin's graph captures nothing: an error, too."""
    for looks in (False, True):
        torch.compiler.reset()
        x = torch.randn(2, 3, 16, 16)
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not looks):
            compiled_whole(Segmenter())(x)
            model = Segmenter()
            tap = RepresentationTap(model)
            compiled_whole(model)(x)
        if looks:
            torch.testing.assert_close(tap.features, before_the_classifier(model, x))
        else:
            with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset"):
                _ = tap.features


# Several processes


@pytest.fixture
def alone(tmp_path):
    """A group of one process: two of them cost the import of torch twice."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(module):
    return DistributedDataParallel(module, find_unused_parameters=True)  # those of the auxiliary classifier


@pytest.mark.usefixtures("alone", "fresh_compiler")
@pytest.mark.parametrize("order", ["tap, DDP", "DDP, tap", "DDP, compile, tap", "compile, DDP, tap"])
@pytest.mark.filterwarnings("ignore:.*find_unused_parameters.*")
def test_distributed_data_parallel(order):
    torch.manual_seed(0)
    expected = gradients(Segmenter())
    torch.manual_seed(0)
    model = Segmenter()
    if order == "tap, DDP":
        tap = RepresentationTap(model)
        x, y = a_batch()
        wrapped = distributed(model)
        cross_entropy, terms = losses(wrapped(x), tap, y)
        (cross_entropy + terms.total).backward()
        found = [parameter.grad for name, parameter in model.named_parameters() if "aux" not in name]
    else:
        call = model
        for wrapper in order.split(", ")[:-1]:
            call = distributed(call) if wrapper == "DDP" else torch.compile(call, backend="aot_eager")
        found = gradients(model, call)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("alone")
def test_a_projection_is_trained_like_the_model():
    """Its parameters are the criterion's, whose gradients DistributedDataParallel must average as well."""
    model = Segmenter(auxiliary=False)
    model.forward = lambda x: model.head(model.backbone(x))
    tap = RepresentationTap(model)
    criterion = DistributedDataParallel(In2NeCTLoss(K, tap.dim, projection=16))
    wrapped = DistributedDataParallel(model)
    x, y = a_batch()
    cross_entropy, terms = losses(wrapped(x), tap, y, criterion)
    (cross_entropy + terms.total).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in (*model.parameters(), *criterion.parameters()))


# Networks of other libraries


class Timm(nn.Module):
    """A backbone of timm with a head of one's own."""

    def __init__(self):
        import timm

        super().__init__()
        self.backbone = timm.create_model("resnet18", features_only=True, pretrained=False, out_indices=(2,))
        self.classifier = nn.Conv2d(self.backbone.feature_info.channels()[-1], K, 1)

    def forward(self, x):
        return F.interpolate(self.classifier(self.backbone(x)[-1]), size=x.shape[2:], mode="bilinear")


def from_smp(name, num_classes=K):
    import segmentation_models_pytorch as smp

    return getattr(smp, name)("resnet18", encoder_weights=None, classes=num_classes)


def from_torchvision(name, **options):
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=K, **options)


def from_transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4]}
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=K, decoder_hidden_size=16, **sizes))


def plain():
    stem = nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, nn.Conv2d(16, K, 1))


HOSTS = {  # builder, layer, width, stride
    "smp Unet": (lambda: from_smp("Unet"), "segmentation_head.0", 16, 1),
    "smp FPN": (lambda: from_smp("FPN"), "segmentation_head.0", 128, 4),
    "smp DeepLabV3Plus": (lambda: from_smp("DeepLabV3Plus"), "segmentation_head.0", 256, 4),
    "smp UPerNet": (lambda: from_smp("UPerNet"), "segmentation_head.0", 256, 4),
    "smp PSPNet": (lambda: from_smp("PSPNet"), "segmentation_head.0", 512, 8),
    "smp Segformer": (lambda: from_smp("Segformer"), "segmentation_head.0", 256, 4),
    "torchvision deeplabv3_resnet50": (
        lambda: from_torchvision("deeplabv3_resnet50", aux_loss=True),
        "classifier.4",
        256,
        8,
    ),
    "transformers SegFormer": (from_transformers, "decode_head.classifier", 16, 4),
    "timm backbone": (Timm, "classifier", 128, 8),
    "nn.Sequential": (plain, "3", 16, 4),
}


@pytest.mark.parametrize("host", HOSTS)
def test_three_lines_train_a_network_of(host):
    build, layer, dim, stride = HOSTS[host]
    x, y = a_batch()
    model = build().train()
    tap = RepresentationTap(model)
    criterion = In2NeCTLoss(K, tap.dim)
    assert (tap.layer, tap.dim) == (layer, dim)
    assert RepresentationTap(model, num_classes=K).layer == layer
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    total, tuning = [], []
    for step in range(5):
        cross_entropy, terms = losses(model(x), tap, y, criterion)
        if step == 0:
            assert tap.stride == stride
            classifier = model.get_submodule(layer).weight
            first = next(model.parameters())
            reached, unreached = torch.autograd.grad(
                terms.total, (first, classifier), retain_graph=True, allow_unused=True
            )
            assert reached.abs().sum() > 0 and unreached is None  # what makes the features, and not what reads them
        optimizer.zero_grad()
        (cross_entropy + terms.total).backward()
        optimizer.step()
        total.append((cross_entropy + terms.total).item())
        tuning.append(terms.total.item())
    assert all(torch.tensor(total).isfinite())
    assert tuning[-1] < 0.99 * tuning[0]
    assert total[-1] < 0.99 * total[0]


@pytest.mark.parametrize(
    ("build", "num_classes", "layer", "dim"),
    [
        (lambda: from_smp("UnetPlusPlus", 16), 16, "segmentation_head.0", 16),  # its last widths are 16 as well
        (lambda: from_smp("MAnet"), K, "segmentation_head.0", 16),
        (lambda: from_smp("Linknet", 16), 16, "segmentation_head.0", 32),
        (lambda: from_torchvision("fcn_resnet50", aux_loss=True), K, "classifier.4", 512),
    ],
)
def test_finds_the_classifier_of(build, num_classes, layer, dim):
    tap = RepresentationTap(build(), num_classes=num_classes)
    assert (tap.layer, tap.dim) == (layer, dim)


def test_logits_that_are_summed_are_ambiguous():
    model = from_torchvision("lraspp_mobilenet_v3_large")
    with pytest.raises(
        ValueError, match=r"2 layers may[\s\S]*classifier.low_classifier[\s\S]*classifier.high_classifier"
    ):
        RepresentationTap(model, num_classes=K)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name is not in 5.0
def test_transformers_by_keyword_with_checkpointing():
    model = from_transformers().train()
    model.gradient_checkpointing_enable()
    tap = RepresentationTap(model)
    x, y = a_batch()
    outputs = model(pixel_values=x, labels=y)
    assert tap.stride == 4
    (outputs.loss + losses(outputs, tap, y)[1].total).backward()
    assert next(model.parameters()).grad.abs().sum() > 0
