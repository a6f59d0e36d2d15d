import subprocess
import sys
import types

import pytest
import torch

from in2nect import In2NeCTLoss, ops, use_backend
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


def test_a_chip_the_library_was_not_built_for(monkeypatch):
    """It falls back, and doctor can say why, instead of failing in the first step."""
    monkeypatch.setattr(backend.native, "why_not", lambda name: None)
    backend.device_why_not.cache_clear()

    def no_image(*arguments):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.ops, "in2nect_cuda", types.SimpleNamespace(class_sums=no_image), raising=False)
    assert "TORCH_CUDA_ARCH_LIST" in backend.device_why_not(torch.device("cpu"), "cuda")
    backend.device_why_not.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("resolution", ["feature", "label"])
@pytest.mark.parametrize("estimator", ["moments", "exact", "sampled"])
def test_a_loss_step_on_cuda_never_waits(estimator, resolution):
    features, labels = clustered(4, 6, labels=(10, 8), dtype=torch.float32)
    criterion = In2NeCTLoss(4, 6, estimator=estimator, per_class=100, resolution=resolution)
    expected = criterion(features, labels).total
    features, labels, criterion = features.cuda().requires_grad_(), labels.cuda(), criterion.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = criterion(features, labels).total
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(total.detach().cpu(), expected, rtol=1e-4, atol=1e-5)
    assert features.grad is not None
