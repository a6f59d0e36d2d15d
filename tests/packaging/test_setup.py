"""The build driver: what it says where a tool is missing, which CUDA targets it builds for, how many jobs it runs."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = {75, 80, 86, 89, 90, 100}


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment without its variables."""
    for name in ("IN2NECT_NATIVE", "IN2NECT_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("in2nect_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hide(monkeypatch: pytest.MonkeyPatch, build: ModuleType, *names: str) -> None:
    """Makes the build see a machine without these programs, and with every other."""

    def which(name: str, path: str | None = None) -> str | None:
        return None if Path(name).name in names else f"/somewhere/{name}"

    monkeypatch.setattr(build, "shutil", SimpleNamespace(which=which))


@pytest.mark.parametrize(
    ("tools", "what", "remedy"),
    [
        (("cmake",), "cmake", "pip install cmake"),
        (("ninja",), "ninja", "pip install ninja"),
        (("c++", "g++", "clang++"), r"a C\+\+ compiler", r"apt install g\+\+"),
    ],
)
def test_missing_tool(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tools: tuple[str, ...], what: str, remedy: str
) -> None:
    hide(monkeypatch, build, *tools)
    with pytest.raises(SystemExit, match=rf"needs {what}, not found here: .*{remedy}.*IN2NECT_NATIVE=0"):
        build.configure()


def test_compiler_that_cxx_names(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, build, "no-such-c++")
    monkeypatch.setenv("CXX", "no-such-c++ -m64")
    with pytest.raises(SystemExit, match=r"'no-such-c\+\+ -m64' that CXX names"):
        build.configure()


def test_missing_torch(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs torch, not found here: pip install 'torch>=2\.11'"):
        build.configure()


def test_old_torch(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "2.10.1+cpu")
    with pytest.raises(SystemExit, match=r"torch 2.10.1\+cpu is too old"):
        build.find_torch()


def test_a_failed_build_shows_no_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler")}
    environment.pop("IN2NECT_NATIVE", None)
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "in2nect: the build needs the compiler" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.fixture
def torch_folder(tmp_path: Path) -> Path:
    """Stands for a torch with CUDA."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    return tmp_path


def test_cuda_is_left_out_on_request(build: ModuleType, monkeypatch: pytest.MonkeyPatch, torch_folder: Path) -> None:
    hide(monkeypatch, build)
    assert build.find_nvcc(torch_folder)[0] is not None
    monkeypatch.setenv("IN2NECT_CUDA", "0")
    assert build.find_nvcc(torch_folder) == (None, "IN2NECT_CUDA=0")


def test_cuda_is_left_out_without_nvcc(build: ModuleType, monkeypatch: pytest.MonkeyPatch, torch_folder: Path) -> None:
    hide(monkeypatch, build, "nvcc")
    nvcc, reason = build.find_nvcc(torch_folder)
    assert nvcc is None
    assert reason.startswith("no nvcc")
    assert "\n" not in reason
    monkeypatch.setenv("IN2NECT_CUDA", "1")
    with pytest.raises(SystemExit, match="IN2NECT_CUDA=1 cannot be met: no nvcc"):
        build.find_nvcc(torch_folder)


def test_cuda_is_left_out_where_torch_has_none(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hide(monkeypatch, build)
    nvcc, reason = build.find_nvcc(tmp_path)
    assert nvcc is None
    assert "torch has no CUDA" in reason


@pytest.mark.parametrize(
    ("requested", "known", "targets"),
    [
        ("", KNOWN, "80-real 86-real 89-real 90-real 100-real 100-virtual"),
        ("", {75, 80, 86}, "80-real 86-real 86-virtual"),  # an old nvcc: PTX for everything newer
        ("8.6", KNOWN, "86-real"),
        ("8.0;9.0a+PTX", KNOWN, "80-real 90a-real 90a-virtual"),
        ("7.5 10.0+PTX", KNOWN, "75-real 100-real 100-virtual"),
    ],
)
def test_cuda_targets(build: ModuleType, requested: str, known: set[int], targets: str) -> None:
    assert build.cuda_targets(requested, known) == targets.split()


@pytest.mark.parametrize("requested", ["Hopper", "8.6;12.0", "sm_90"])
def test_unknown_cuda_target(build: ModuleType, requested: str) -> None:
    with pytest.raises(SystemExit, match=rf"{requested.split(';')[-1]}.*it knows 7.5, 8.0, .*10.0"):
        build.cuda_targets(requested, KNOWN)


def test_jobs_fit_the_memory(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_available_gib", lambda: 0.5)
    assert build.jobs() == 1
    monkeypatch.setattr(build, "_available_gib", lambda: 1000.0)
    assert build.jobs() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_this_nvcc_lists_its_targets(build: ModuleType) -> None:
    assert build._known_targets(shutil.which("nvcc")) & KNOWN
