"""What `import in2nect` brings with it, and `in2nect.kernels` from a checkout where nothing is installed."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from in2nect import _kernels_path

ROOT = Path(__file__).parents[2]
PIPELINE = {"lightning", "pytorch_lightning", "timm", "segmentation_models_pytorch", "rasterio", "torchvision"}
PIPELINE |= {"torchmetrics", "matplotlib", "sklearn", "tensorboard", "jsonargparse", "rich", "transformers"}
SECONDS = 0.4


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python without its site, so that no editable install is seen: site-packages is a plain folder on the path."""
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_kernels_from_a_bare_checkout() -> None:
    done = run("-c", "import in2nect.kernels, in2nect; print(in2nect.__file__, in2nect.kernels.__file__, sep='\\n')")
    assert done.returncode == 0, done.stderr
    package, kernels = (Path(line) for line in done.stdout.split())
    assert package == ROOT / "in2nect" / "__init__.py"
    assert kernels == ROOT / "kernels" / "__init__.py"


def test_nothing_else_of_the_checkout_is_a_subpackage() -> None:
    code = (
        "import importlib.util as u, in2nect, in2nect.kernels;"
        "print([n for n in ('tests', 'csrc', 'configs', 'setup', 'in2nect', 'nothing') if u.find_spec('in2nect.' + n)])"
    )
    done = run("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_kernels_need_torch_and_triton_alone() -> None:
    done = run("-c", "import in2nect.kernels, sys; print(*sys.modules)")
    assert {name.split(".")[0] for name in done.stdout.split()} & PIPELINE == set()


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_a_package_named_kernels_beside_an_installed_one_is_not_ours(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finders: list[object] = []
    monkeypatch.setattr(sys, "meta_path", finders)
    for place in (tmp_path / folder, tmp_path / "checkout"):
        (place / "kernels").mkdir(parents=True)
        (place / "kernels" / "__init__.py").touch()
    monkeypatch.setattr(_kernels_path, "__file__", str(tmp_path / folder / "in2nect" / "_kernels_path.py"))
    _kernels_path.register()
    assert finders == []
    monkeypatch.setattr(_kernels_path, "__file__", str(tmp_path / "checkout" / "in2nect" / "_kernels_path.py"))
    _kernels_path.register()
    _kernels_path.register()
    assert len(finders) == 1


def test_import_is_light_and_fast() -> None:
    """Every public name of the losses: `import in2nect` alone loads none of them, nor torch."""
    program = (
        "import sys, in2nect; assert 'torch' not in sys.modules; import time, torch; start = time.perf_counter();"
        "from in2nect import *; print(time.perf_counter() - start, *sys.modules)"
    )
    seconds = []
    for _ in range(3):  # the best of three: another process may have the core
        first, *modules = run("-c", program).stdout.split()
        assert {name.split(".")[0] for name in modules} & PIPELINE == set()
        assert "in2nect.loss" in modules
        seconds.append(float(first))
        if seconds[-1] < SECONDS:
            return
    pytest.fail(f"importing in2nect takes {min(seconds):.2f} s beyond torch; expected under {SECONDS} s")
