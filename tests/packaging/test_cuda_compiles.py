"""The CUDA sources where there is no GPU: they compile without a warning for three chips, no kernel keeps registers in
memory, and what a block may take of shared memory is what the chips have. About a minute and a half on two cores.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "86", "90a")  # A100, RTX 30 (the least shared memory), H100
MOST_SHARED_BYTES = 99 * 1024  # a block's on sm_86 and sm_89
PAIR_KERNELS = 4 + 3 * (2 + 2 + 1 + 1)  # forward by dtype; backward by what owns the rows, dtype and, of halves, width

# Kernels that may spill, with the reason.
MAY_SPILL: dict[str, str] = {}


class Kernel(NamedTuple):
    """What ptxas says of a kernel on one chip."""

    name: str
    architecture: str
    stack: int
    spilled: int
    registers: int
    shared: int  # static


def nvcc() -> str | None:
    for place in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        try:
            subprocess.run([place, "--version"], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return place
    return None


NVCC = nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, of the CUDA toolkit")


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.name)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Kernel]]:
    """The kernels of one source, compiled as CMakeLists.txt has it and with every warning an error."""
    build = (ROOT / "CMakeLists.txt").read_text()
    match = re.search(r"target_compile_definitions\(\$\{name\} PRIVATE (.*?)\)", build)
    assert match is not None
    definitions = [f"-D{definition}" for definition in [*match[1].split(), "USE_CUDA"]]
    standard = re.search(r"set\(CMAKE_CUDA_STANDARD (\d+)\)", build)
    assert standard is not None
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    assert NVCC is not None
    command = [NVCC, f"-std=c++{standard[1]}", "-O3", "-t2", *targets, *definitions]
    command += ["-isystem", str(Path(torch.__file__).parent / "include"), "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror"]
    command += ["-Werror", "all-warnings", "-Xptxas", "-v", "-c", str(request.param)]
    target = tmp_path_factory.mktemp("cuda") / "out.o"
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param.name, parse(done.stdout + done.stderr)


def parse(log: str) -> list[Kernel]:
    """The kernels in what ``ptxas -v`` wrote."""
    found = []
    pattern = r"Compiling entry function '(\w+)' for 'sm_(\w+)'(.*?)Used (\d+) registers([^\n]*)"
    for name, architecture, properties, registers, rest in re.findall(pattern, log, re.DOTALL):
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", properties)
        assert frame is not None, properties
        shared = re.search(r"(\d+) bytes smem", rest)
        stack, stores, loads = map(int, frame.groups())
        found.append(Kernel(name, architecture, stack, stores + loads, int(registers), int(shared[1]) if shared else 0))
    return found


def test_every_kernel_keeps_to_registers(kernels: tuple[str, list[Kernel]]) -> None:
    source, found = kernels
    assert found, "ptxas reported no kernel"
    for architecture in ARCHITECTURES:
        assert {k.name for k in found if k.architecture == architecture} == {k.name for k in found}
    if source == "pair_logsumexp.cu":
        assert sum("pair_forward" in k.name or "pair_backward" in k.name for k in found) == 3 * PAIR_KERNELS
    allowed = [k for k in found if any(name in k.name for name in MAY_SPILL)]
    assert [k for k in found if (k.spilled or k.stack) and k not in allowed] == []


def test_shared_memory_fits_the_smallest_chip(kernels: tuple[str, list[Kernel]]) -> None:
    source, found = kernels
    assert all(kernel.shared <= 48 * 1024 for kernel in found)  # what a kernel may declare
    if source == "pair_logsumexp.cu":  # it asks for more at launch, which a static_assert holds to this limit
        header = (ROOT / "csrc" / "cuda" / "pair_logsumexp_kernels.h").read_text()
        limit = re.search(r"kMostSharedBytes = (\d+) \* 1024;", header)
        assert limit is not None
        assert int(limit[1]) * 1024 <= MOST_SHARED_BYTES
