import subprocess
import sys

import pytest
import torch

from in2nect import ops, use_backend
from in2nect.ops import backend
from tests.samples import clustered


def test_choice_and_its_end(monkeypatch):
    calls = []
    original = backend._implementations["class_sums", "reference"]
    monkeypatch.setitem(
        backend._implementations, ("class_sums", "reference"), lambda *a: calls.append(1) or original(*a)
    )
    features, labels = clustered(3, 4)
    with use_backend("reference"):
        ops.class_sums(features, labels, 3)
    assert len(calls) == 1
    if backend.why_not("cpp") is None:
        ops.class_sums(features, labels, 3)
        assert len(calls) == 1


def test_unknown_and_unavailable(monkeypatch):
    with pytest.raises(ValueError, match="no backend 'numpy'; expected one of reference, cpp, cuda, triton"):
        use_backend("numpy")
    monkeypatch.setattr(backend.native, "why_not", lambda name: "the library is not built; run make")
    with pytest.raises(RuntimeError, match="'cpp' is not available: the library is not built; run make"):
        use_backend("cpp")
    features, labels = clustered(3, 4)
    monkeypatch.setenv("IN2NECT_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="'cpp' is not available"):
        ops.class_sums(features, labels, 3)


def test_environment_variable():
    code = (
        "import torch, in2nect; from in2nect.ops import backend;"
        "reference = backend._implementations['class_sums', 'reference'];"
        "print(backend.select('class_sums', torch.device('cpu')) is reference)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={"IN2NECT_BACKEND": "reference", "PATH": ""}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "True", run.stderr


def test_wrong_device(monkeypatch):
    monkeypatch.setattr(backend, "_chosen", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' runs on cuda and the tensors are on cpu"):
        backend.select("class_sums", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_without_synchronisation():
    features, labels = clustered(4, 6, labels=(10, 8), dtype=torch.float32)
    features, labels = features.cuda().requires_grad_(), labels.cuda()
    expected = ops.class_sums(features.cpu(), labels.cpu(), 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums, counts, _ = ops.class_sums(features, labels, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(sums.cpu(), expected[0])
    assert torch.equal(counts.cpu(), expected[1])
