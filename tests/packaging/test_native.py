"""Loading the compiled operators: what is said where that fails, and what the libraries depend on."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from in2nect import native


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    native.why_not.cache_clear()
    yield
    native.why_not.cache_clear()


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="one of cpp, cuda; got 'tpu'"):
        native.available("tpu")


@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_a_library_that_is_not_built(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda backend: tmp_path / f"{backend}.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not native.available(backend)
    with pytest.raises(
        RuntimeError, match=rf"{backend} backend is not available: {backend}.so is not built.*pip install"
    ):
        native.load(backend)


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "library", lambda backend: broken)
    assert re.search(r"does not load with torch .*pip install", native.why_not("cpp") or "")


def test_cuda_operators_on_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in (native.why_not("cuda") or "")


@pytest.mark.skipif(not native.library("cpp").is_file(), reason="the cpp operators are not built")
def test_loading_twice_registers_once() -> None:
    native.load("cpp")
    native.why_not.cache_clear()
    native.load("cpp")
    assert native.available()
    assert torch.ops.in2nect_cpp.class_sums.default._schema.returns[1].name == "counts"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no binutils")
@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_what_a_library_depends_on(backend: str) -> None:
    path = native.library(backend)
    if not path.is_file():
        pytest.skip(f"the {backend} operators are not built")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    ours = [name for name in names if re.search("torch|c10|caffe2|N2at", name)]
    assert ours
    # the stable interface is C: nothing mangled may come from torch
    assert [name for name in ours if not re.match("(aoti_)?torch_", name)] == []
    dynamic = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert not re.search("RPATH|RUNPATH|libcudart|libpython|libc10", dynamic)
    assert ("cuda" in dynamic) == (backend == "cuda")
