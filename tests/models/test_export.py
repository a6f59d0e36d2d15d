"""Export for inference: the same logits, and neither auxiliary head, tap nor losses in graph or file."""

from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram

from in2nect import In2NeCTLoss, RepresentationTap
from in2nect.models import export_model, export_program
from tests.models.hosts import HOSTS, make

TRAINING_ONLY = ("aux_head", "criterion", "In2NeCTLoss", "tap", "in2nect::", "checkpoint")


@pytest.mark.parametrize(("name", "encoder"), HOSTS)
def test_the_graph_holds_the_network_alone(name: str, encoder: str) -> None:
    model = make(name, encoder).train()
    tap = RepresentationTap(model)
    model.set_gradient_checkpointing()
    model.criterion = In2NeCTLoss(5, tap.dim, projection=16)  # as some keep it
    model.training_only = (*model.training_only, "criterion")
    program = export_program(model, (75, 64))
    assert model.training and isinstance(model.criterion, In2NeCTLoss)
    assert not [text for text in told_by(program) for word in TRAINING_ONLY if word in text]
    unused = {key for key in model.state_dict() if key.startswith(("decoder.aux_head.", "criterion."))}
    assert set(program.state_dict) == set(model.state_dict()) - unused
    model.eval()
    for batch in (1, 3):
        x = torch.randn(batch, 3, 75, 64)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x))


def test_the_training_pass_would_be_found() -> None:
    """The words above do occur in the graph of what is not exported."""
    model = make("unetformer", "resnet10t").eval()
    model.forward = model.forward_training  # type: ignore[method-assign, assignment]
    program = torch.export.export(model, (torch.randn(1, 3, 64, 64),))
    assert any("aux_head" in text for text in told_by(program))


def test_a_file_runs_by_torch_alone(tmp_path: Path) -> None:
    model = make("manet", "test_efficientnet").eval()
    export_model(model, tmp_path / "model.pt2", (64, 75))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    x = torch.randn(2, 3, 64, 75)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "model.pt2").module()(x)
        torch.testing.assert_close(found, model(x))


def test_a_size_that_the_network_does_not_take() -> None:
    model = make("unetformer", "resnet10t")
    model.size_multiple = 32
    with pytest.raises(ValueError, match=r"size is \(64, 75\); expected positive multiples of 32"):
        export_program(model, (64, 75))


def told_by(program: ExportedProgram) -> list[str]:
    """Whatever a graph says of what a node does and which module it comes from."""
    texts = [*program.state_dict, *program.constants]
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        texts += [node.name, str(node.target), *(f"{path} {kind}" for path, kind in stack.values())]
    return texts
