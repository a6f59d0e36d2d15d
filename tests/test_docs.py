"""The Python of the documents, run as it stands there."""

import re
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.test_tap import OneOutput, Segmenter

ROOT = Path(__file__).parents[1]


def blocks(document):
    """(heading above, program) of each block."""
    text = (ROOT / document).read_text(encoding="utf-8")
    heading = ""
    found = []
    for title, program in re.findall(r"^#+ ([^\n]*)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        heading = title or heading
        if program:
            found.append((heading, program))
    return found


(_, PREAMBLE), *EXAMPLES = blocks("docs/your-own-model.md")


@pytest.fixture
def torchrun(monkeypatch):
    """What `torchrun` tells the only process that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize(
    "program", [pytest.param(program, id=f"{number}. {heading}") for number, (heading, program) in enumerate(EXAMPLES)]
)
def test_your_own_model(program, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.compiler.reset()  # a block that compiles must not meet a graph of the one before
    names = {"__name__": "example"}
    exec(PREAMBLE, names)
    exec(program, names)
    if "loss" in names:
        assert names["loss"].isfinite()
        assert next(names["model"].parameters()).grad.abs().sum() > 0


def test_every_example_is_run():
    text = (ROOT / "docs/your-own-model.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) + 1 == text.count("```python") == text.count("```") // 2
    assert len(EXAMPLES) > 10


def test_the_lines_of_the_readme():
    (_, first), (_, second) = blocks("README.md")
    x, y = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    y[0, :4] = 255
    for program, model in ((first, OneOutput()), (first.rpartition("loss = ")[0] + second, Segmenter())):
        names: dict = {"model": model, "x": x, "y": y, "num_classes": 5}
        exec(program, names)
        names["loss"].backward()
        assert isinstance(model, nn.Module) and model.backbone.weight.grad.abs().sum() > 0
