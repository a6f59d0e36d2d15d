"""Builds csrc/ with CMake and ninja, and maps kernels/ to `in2nect.kernels`; the metadata is in pyproject.toml.

Environment:
    IN2NECT_NATIVE=0      pure Python: nothing is compiled, the losses run on torch's own operators
    IN2NECT_CUDA=0 | 1    without, or insist on, the CUDA operators; by default they are built where nvcc is
    TORCH_CUDA_ARCH_LIST  CUDA targets, as for torch's own extensions: "8.6;9.0+PTX"
    MAX_JOBS, CXX, CUDACXX, CUDA_HOME
    IN2NECT_SANITIZE      for `build_ext --inplace`: the CPU operators with these sanitizers, "address,undefined", in
                          build/sanitized, where IN2NECT_NATIVE_DIR finds them; what is installed stays as it is
A build that is repeated compiles only what changed: its tree stays in build/native.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TREE, SANITIZED_TREE = ROOT / "build" / "native", ROOT / "build" / "sanitized"
LIBRARIES = ("_C.abi3.so", "_C_cuda.abi3.so")
PYTHON_FLOOR = "cp311"  # the wheel serves every CPython from here on
GIB_PER_JOB = 2.0  # memory that one nvcc job over torch's headers needs
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0")  # A100, RTX 30, RTX 40, H100, B200


class NativeBuild(build_ext):
    """Runs CMake and ninja, and takes the libraries to where the packages are built (or, editable, to in2nect/)."""

    built: tuple[str, ...] = ()

    def run(self) -> None:
        plan = configure()
        if plan.tree != TREE and not self.inplace:
            _fail("IN2NECT_SANITIZE is for tests in a checkout, not for wheels: run `setup.py build_ext --inplace`")
        for command in (plan.configure, plan.build):
            if subprocess.run(command, check=False).returncode != 0:
                _fail(f"{Path(command[0]).name} failed; its messages are above. The command: {' '.join(command)}")
        if plan.tree != TREE:  # stays where it is, apart from what is installed
            return
        self.built = plan.libraries
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        for name in LIBRARIES:
            if name in plan.libraries:  # by renaming: a process that has the old library open keeps it
                partial = folder / f"{name}.partial"
                shutil.copyfile(TREE / name, partial)
                os.replace(partial, folder / name)
            else:  # one that is not part of this build must not stay from an earlier one
                (folder / name).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "in2nect", name)) for name in self.built]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {output: str(self._folder() / Path(output).name) for output in self.get_outputs()}

    def _folder(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib)) / "in2nect"


class Plan(NamedTuple):
    """The two command lines of a build, and the libraries that come out of it, in `tree`."""

    tree: Path
    configure: list[str]
    build: list[str]
    libraries: tuple[str, ...]


def configure() -> Plan:
    """Plans the build from what is installed here; a SystemExit names a tool that is missing and how to get it."""
    torch = find_torch()
    cmake = _tool("cmake", "pip install cmake")
    ninja = _tool("ninja", "pip install ninja")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(shlex.split(compiler)[0]) is None:
        what = f"the compiler {compiler!r} that CXX names" if compiler else "a C++ compiler"
        _missing(what, "install one for C++17, for example with `apt install g++` or `dnf install gcc-c++`, or set CXX")
    sanitizers = os.environ.get("IN2NECT_SANITIZE", "")
    tree = SANITIZED_TREE if sanitizers else TREE
    nvcc, reason = (None, "IN2NECT_SANITIZE") if sanitizers else find_nvcc(torch)
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_CXX_COMPILER_LAUNCHER": shutil.which("ccache") or "",
        "TORCH_ROOT": str(torch),
        "IN2NECT_WITH_CUDA": "ON" if nvcc else "OFF",
        "IN2NECT_SANITIZE": sanitizers,
    }
    if nvcc:
        targets = cuda_targets(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), _known_targets(nvcc))
        definitions["CMAKE_CUDA_COMPILER"] = nvcc
        definitions["CMAKE_CUDA_COMPILER_LAUNCHER"] = definitions["CMAKE_CXX_COMPILER_LAUNCHER"]
        definitions["CMAKE_CUDA_ARCHITECTURES"] = ";".join(targets)
        print(f"in2nect: building the CPU and the CUDA operators ({' '.join(targets)})", flush=True)
    else:
        print(f"in2nect: a CPU-only build: {reason}", flush=True)
    options = [f"-D{name}={value}" for name, value in definitions.items()]
    return Plan(
        tree,
        [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(tree), *options],
        [cmake, "--build", str(tree), "--parallel", str(jobs())],
        LIBRARIES if nvcc else LIBRARIES[:1],
    )


def find_torch() -> Path:
    """Folder of the installed torch; found, not imported: importing it costs seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        _missing("torch", "pip install 'torch>=2.11', then pip install --no-build-isolation -e .")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 11):
        _fail(f"torch {version} is too old; pip install -U 'torch>=2.11'")
    return Path(spec.submodule_search_locations[0])


def find_nvcc(torch: Path) -> tuple[str | None, str]:
    """Path of nvcc, or None and why the CUDA operators are left out; SystemExit where IN2NECT_CUDA=1 asks for them."""
    wanted = os.environ.get("IN2NECT_CUDA", "")
    if wanted == "0":
        return None, "IN2NECT_CUDA=0"
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((found for place in places if place and (found := shutil.which(place))), None)
    if nvcc is None:
        reason = "no nvcc (install the CUDA toolkit, or name it with CUDA_HOME, for the CUDA operators)"
    elif not (torch / "lib" / "libtorch_cuda.so").is_file():
        reason = "the installed torch has no CUDA (install a CUDA build of torch for the CUDA operators)"
    else:
        return nvcc, ""
    if wanted == "1":
        _fail(f"IN2NECT_CUDA=1 cannot be met: {reason}")
    return None, reason


def cuda_targets(requested: str, known: set[int]) -> list[str]:
    """CMake's CUDA_ARCHITECTURES for a TORCH_CUDA_ARCH_LIST ("" is our default, with PTX of the newest) and an nvcc."""
    entries = re.split(r"[;,\s]+", requested.strip()) if requested.strip() else []
    if not entries:
        ours = [a for a in CUDA_ARCHITECTURES if _number(a) in known]
        entries = [*ours[:-1], f"{ours[-1]}+PTX"] if ours else []
    targets = []
    for entry in entries:
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", entry)
        if match is None or _number(match[1]) not in known:
            _fail(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}; expected versions that this nvcc knows, for example "
                f'"8.6;9.0+PTX"; it knows {", ".join(f"{n / 10:.1f}" for n in sorted(known))}'
            )
        name = f"{_number(match[1])}{match[2]}"
        targets += [f"{name}-real", *([f"{name}-virtual"] if match[3] else [])]
    return targets


def jobs() -> int:
    """Compilations at once: MAX_JOBS, else one a core as far as memory goes."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_available_gib() / GIB_PER_JOB)))


def _available_gib() -> float:
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(match[1]) / 2**20 if match else GIB_PER_JOB
    except OSError:
        return GIB_PER_JOB


def _tool(name: str, remedy: str) -> str:
    # pip puts cmake and ninja beside the interpreter, which is not on the PATH of an environment used by path.
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    found = shutil.which(name, path=beside)
    if found is None:
        _missing(name, remedy)
    return found


def _missing(what: str, remedy: str) -> NoReturn:
    _fail(
        f"the build needs {what}, not found here: {remedy}. Or set IN2NECT_NATIVE=0 to install without compiled "
        "operators; the losses then run on torch's own, slower."
    )


def _fail(message: str) -> NoReturn:
    # SystemExit, which pip and setuptools let through without a traceback.
    raise SystemExit(f"in2nect: {message}")


def _known_targets(nvcc: str) -> set[int]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    return {int(number) for number in re.findall(r"compute_(\d+)", listed)}


def _number(version: str) -> int:
    return int(version.replace(".", ""))


def main() -> None:
    native = os.environ.get("IN2NECT_NATIVE", "1") != "0"
    if not native:
        print("in2nect: IN2NECT_NATIVE=0: nothing is compiled", flush=True)
    in_kernels = [f"in2nect.kernels{'.' if name else ''}{name}" for name in ["", *find_packages("kernels")]]
    setup(
        packages=[*find_packages(include=["in2nect", "in2nect.*"]), *in_kernels],
        package_dir={"in2nect.kernels": "kernels"},
        package_data={"in2nect": ["py.typed"], "in2nect.data": ["splits/*/*.txt"]},
        ext_modules=[Extension("in2nect._C", sources=[], py_limited_api=True)] if native else [],
        cmdclass={"build_ext": NativeBuild},
        options={"bdist_wheel": {"py_limited_api": PYTHON_FLOOR}} if native else {},
    )


if __name__ == "__main__":
    main()
