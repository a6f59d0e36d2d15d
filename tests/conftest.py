"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which they must be told before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from in2nect.ops import backend


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs is kept from one test to the next, and not among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IN2NECT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpp"])
def cpu_backend(request: pytest.FixtureRequest):
    """Run the test once on each backend of the CPU."""
    reason = backend.why_not(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with backend.use_backend(request.param):
        yield request.param


@pytest.fixture
def triton_device():
    """Run the test on the Triton kernels: on a GPU where there is one, else in the interpreter on the CPU."""
    reason = backend.why_not("triton")
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
    with backend.use_backend("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def real_data() -> str:
    """Folder of the real data sets; the test skips where IN2NECT_DATA does not name one."""
    root = os.environ.get("IN2NECT_DATA", "")
    if not os.path.isdir(root):
        pytest.skip("IN2NECT_DATA does not name a folder with the real data sets")
    return root
