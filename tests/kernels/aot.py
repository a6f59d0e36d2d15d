"""Compiles every Triton kernel ahead of time for a chip that need not be there, and says what the compiler made of it.

    python -m tests.kernels.aot --architecture sm_86 [--kernel pair_logsumexp] [--thorough] [--mix] [--json FILE]

A stub driver stands for the chip; the real host functions of kernels/ run on meta tensors, and each launch is compiled
in place of being run. Of each: shared memory, registers, stack, tensor-core instructions, and from the machine code the
loops: whether one touches local memory (a spill), and how many instructions of each kind the hottest one holds, which
is the model of its speed where there is no chip to time it on. Must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from in2nect.kernels import launch
from in2nect.kernels.table import ARCHITECTURES, TABLE, Entry

OPERATORS = ("class_moments", "class_sums", "gather_rows", "pair_logsumexp", "intra_exact", "sample_pixels")
# The kernels that are there for a product of matrices.
PRODUCTS = ("pair_symmetric_forward", "pair_symmetric_backward", "pair_forward", "pair_backward")
USUAL_DIM = 64  # of UNetFormer's features
DTYPES = {"half": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


# ------------------------------------------------------------------------------------------------- what is compiled


class Call(NamedTuple):
    """One call of a host function, whose kernels are compiled for the meta tensors among its arguments."""

    case: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    deterministic: bool = False
    tf32: bool = False
    only: tuple[str, ...] = ()  # kernels to compile; none are all
    width: int | None = None  # d, where a kernel is to be compiled only at the widths of its own table entries


def pair_logsumexp(module: ModuleType, architecture: str, thorough: bool) -> Iterator[Call]:
    """Rows (N, d) against themselves and against keys, both directions."""
    dim = USUAL_DIM
    for dtype in (torch.float32, torch.float64) if thorough else (torch.float32,):
        anchors, keys = meta((1792, dim), dtype), meta((1800, dim), dtype)
        weights, grad, log_d = meta((1792,), dtype), meta((1792,), dtype), meta((1792,), dtype)
        key_weights = meta((1800,), dtype)
        for case, columns, per_column in (("symmetric", None, weights), ("keys", keys, key_weights)):
            case = f"{case}, {name(dtype)}, d = {dim}"
            yield Call(case, module.pair_logsumexp, (anchors, columns, per_column, 0.5))
            backward = grad, log_d, anchors, columns, per_column, 0.5
            yield Call(f"{case}, backward", module.pair_logsumexp_backward, backward)


def intra_exact(module: ModuleType, architecture: str, thorough: bool) -> Iterator[Call]:
    """Features by stride under labels: every table entry at its widest and at d = 64, then what else there is."""
    kernels = [kernel for kernel in TABLE if kernel.startswith("pair_")]
    for dtype, dim in table_points(*kernels, architecture=architecture):
        yield from _intra_exact(module, meta((16, dim, 64, 64), dtype), width=dim)
    if not thorough:
        return
    half, grid = torch.bfloat16, (16, 64, 64, 64)
    channels_last = meta(grid, half, channels_last=True)
    yield from _intra_exact(module, channels_last, case="channels_last, deterministic", deterministic=True)
    yield from _intra_exact(module, meta((8, 100, 31, 33), half), case="odd grid")
    for dim, only in ((64, ()), (1024, ("pair_positive",))):  # 2^31 numbers: offsets of 64 bits
        large = meta((1, dim, 1, 2**31 // dim), half)
        yield from _intra_exact(module, large, case="large, raw rows", normalize=False, only=only)
    yield from _intra_exact(module, meta(grid, torch.float16), only=PRODUCTS)
    products = PRODUCTS[:2]  # of the rows with themselves
    yield from _intra_exact(module, meta(grid, torch.float32), case="TF32", tf32=True, only=products)


def _intra_exact(
    module: ModuleType, features: Tensor, *, case: str = "", normalize: bool = True, **how: Any
) -> Iterator[Call]:
    batch, dim, height, width = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    labels, per_class = meta((batch, height, width), torch.int64), meta((7,), dtype)
    log_d, positive = meta((labels.numel(),), dtype), meta((7, dim), dtype)
    case = f"{case or 'NCHW'}, {name(features.dtype)}, d = {dim}"
    settings = 255, 1.0, normalize
    yield Call(case, module.intra_exact, (features, labels, per_class, per_class, *settings), **how)
    backward = features, labels, log_d, per_class, per_class, positive, per_class, *settings
    yield Call(f"{case}, backward", module.intra_exact_backward, backward, **how)


def class_sums(module: ModuleType, architecture: str, thorough: bool) -> Iterator[Call]:
    """Features on their labels' grid and on a coarser one, both directions."""
    kernels = [kernel for kernel in TABLE if kernel.startswith("class_sums_")]
    for dtype, dim in table_points(*kernels, architecture=architecture):
        for height, unit in itertools.product((64, 256), (False, True)):
            features = meta((16, dim, 64, 64), dtype)
            yield from _class_sums(module, features, height, normalize=unit, squares=unit, width=dim)
    if not thorough:
        return
    half, grid, odd = torch.bfloat16, (16, 64, 64, 64), (8, 100, 31, 33)
    for height in (64, 256):
        yield from _class_sums(module, meta(grid, half), height, normalize=False)
    yield from _class_sums(module, meta(grid, half, channels_last=True), 64, label_dtype=torch.uint8)
    yield from _class_sums(module, meta(odd, half), 31, num_classes=256)
    yield from _class_sums(module, meta(odd, half, channels_last=True), 124, num_classes=256, squares=False)
    yield from _class_sums(module, meta(odd, half), 124, num_classes=2)
    for height in (16384, 65536):  # offsets and places of 64 bits
        yield from _class_sums(module, meta((1, 64, 16384, 16384), half), height)


def _class_sums(
    module: ModuleType,
    features: Tensor,
    height: int,
    *,
    num_classes: int = 7,
    normalize: bool = True,
    squares: bool = True,
    label_dtype: torch.dtype = torch.int64,
    **how: Any,
) -> Iterator[Call]:
    batch, dim, h, w = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    labels = meta((batch, height, height * w // h), label_dtype)
    sums, per_class = meta((num_classes, dim), dtype), meta((num_classes,), dtype) if squares else None
    kind = f"{'unit' if normalize else 'raw'} rows{', channels_last' if features.stride(1) == 1 else ''}"
    case = f"{kind}, {h} to {height}, {name(features.dtype)}, d = {dim}, K = {num_classes}"
    yield Call(case, module.class_sums, (features, labels, num_classes, 255, normalize, squares), **how)
    backward = sums, per_class, features, labels, 255, normalize
    yield Call(f"{case}, backward", module.class_sums_backward, backward, **how)


def class_moments(module: ModuleType, architecture: str, thorough: bool) -> Iterator[Call]:
    """Features on their labels' grid and on a coarser one, all three passes."""
    kernels = [kernel for kernel in TABLE if kernel.startswith("class_moments_")]
    for dtype, dim in table_points(*kernels, architecture=architecture):
        for height in (64, 256):
            yield from _class_moments(module, meta((16, dim, 64, 64), dtype), height, width=dim)
    if not thorough:
        return
    half, grid, odd = torch.bfloat16, (16, 64, 64, 64), (8, 100, 31, 33)
    for height in (64, 256):
        yield from _class_moments(module, meta(grid, half), height, by_class=True)
        yield from _class_moments(module, meta(grid, half, channels_last=True), height, sums=False)
    yield from _class_moments(module, meta(odd, half), 124, num_classes=19)
    yield from _class_moments(module, meta(odd, half), 31, num_classes=256)
    yield from _class_moments(module, meta(odd, half), 124, num_classes=256)
    yield from _class_moments(module, meta((1, 64, 4096, 4096), half), 65536)  # places of 64 bits


def _class_moments(
    module: ModuleType,
    features: Tensor,
    height: int,
    *,
    num_classes: int = 7,
    by_class: bool = False,
    sums: bool = True,
    **how: Any,
) -> Iterator[Call]:
    batch, dim, h, w = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    labels = meta((batch, height, height * w // h), torch.int64)
    vectors, per_class = meta((num_classes, dim), dtype), meta((num_classes,), dtype)
    present = meta((num_classes,), torch.bool)
    curvatures = meta((num_classes, dim, dim), dtype) if by_class else None
    matrices = meta((num_classes if by_class else 1, dim, dim), dtype)
    kind = f"{'by class' if by_class else 'pooled'}{', channels_last' if features.stride(1) == 1 else ''}"
    case = f"{kind}, {h} to {height}, {name(features.dtype)}, d = {dim}, K = {num_classes}"
    yield Call(case, module.class_moments, (features, labels, num_classes, 255, sums, by_class), **how)
    mixtures = features, labels, vectors, curvatures, present, per_class, 255
    yield Call(f"{case}, mixtures", module.class_moments_mixtures, mixtures, **how)
    coefficients = per_class, matrices, per_class, vectors, per_class, vectors if sums else None
    backward = features, labels, vectors, curvatures, present, *coefficients, 255
    yield Call(f"{case}, backward", module.class_moments_backward, backward, **how)


def gather_rows(module: ModuleType, architecture: str, thorough: bool) -> Iterator[Call]:
    """Rows of the cells themselves and interpolated ones, both directions."""
    kernels = [kernel for kernel in TABLE if kernel.startswith("gather_rows_")]
    indices = meta((1792,), torch.int64)
    for dtype, dim in table_points(*kernels, architecture=architecture):
        features = meta((16, dim, 64, 64), dtype)
        grad = meta((1792, dim), torch.float64 if dtype == torch.float64 else torch.float32)
        for height, unit in itertools.product((64, 256), (False, True)):
            if not unit and not (thorough and dtype == torch.bfloat16):
                continue
            case = f"{'unit' if unit else 'raw'} rows, 64 to {height}, {name(dtype)}, d = {dim}"
            settings = indices, height, height, unit
            yield Call(case, module.gather_rows, (features, *settings), width=dim)
            backward = grad, features, *settings
            yield Call(f"{case}, backward", module.gather_rows_backward, backward, width=dim)


def sample_pixels(module: ModuleType, architecture: str, thorough: bool) -> Iterator[Call]:
    seed = meta((2,), torch.int64)
    yield Call("int64 labels", module.sample_pixels, (meta((2, 64, 64), torch.int64), 7, 256, seed, 255))
    yield Call("uint8 labels, K = 256", module.sample_pixels, (meta((2, 64, 64), torch.uint8), 256, 64, seed, 255))
    if thorough:
        yield Call("int32 labels, odd N", module.sample_pixels, (meta((12345,), torch.int32), 7, 1000, seed, 255))


CASES: dict[str, Callable[[ModuleType, str, bool], Iterator[Call]]] = {
    "class_moments": class_moments,
    "class_sums": class_sums,
    "gather_rows": gather_rows,
    "pair_logsumexp": pair_logsumexp,
    "intra_exact": intra_exact,
    "sample_pixels": sample_pixels,
}


def meta(shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool = False) -> Tensor:
    """An empty tensor on the meta device; Triton takes its address for aligned to 16 bytes, as a fresh one's is."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


def table_points(*kernels: str, architecture: str) -> list[tuple[torch.dtype, int]]:
    """The (dtype, width) at which the kernels' entries for an architecture are compiled: the widest that each serves,
    where it takes the most shared memory, and the usual width in bfloat16."""
    points: dict[tuple[torch.dtype, int], None] = {}
    for kernel, (group, dtype) in itertools.product(kernels, DTYPES.items()):
        for entry in TABLE[kernel]:
            if leads_to(kernel, architecture, group, entry.max_dim) is entry:
                points[dtype, entry.max_dim] = None
        if group == "half":
            points[dtype, USUAL_DIM] = None
    return list(points)


def leads_to(kernel: str, architecture: str, group: str, dim: int) -> Entry | None:
    """The table's entry for a kernel, architecture, dtype and width."""
    fitting = (e for e in TABLE[kernel] if architecture in e.architectures and group in e.dtypes and dim <= e.max_dim)
    return next(fitting, None)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------- how it is compiled


class Recorder:
    """Compiles launches in place of running them, and keeps what was compiled."""

    def __init__(self, architecture: str, *, loops: bool = False) -> None:
        self.architecture = architecture
        self.loops = loops
        self.operator = self.case = ""
        self.launches: list[dict[str, Any]] = []
        self.failures: dict[str, list[str]] = {}  # cases by message
        self.chosen: dict[str, tuple[torch.dtype, int, int]] = {}  # by key of the table, the latest last
        self.only: tuple[str, ...] = ()
        self.width: int | None = None
        self._seen: dict[int, Any] = {}  # compiled kernels by identity, which holds them alive

    def calls(self, operator: str, calls: Iterator[Call]) -> None:
        self.operator = operator
        for call in calls:
            self.case, self.only, self.width = call.case, call.only, call.width
            torch.use_deterministic_algorithms(call.deterministic)
            torch.backends.cuda.matmul.allow_tf32 = call.tf32
            try:
                call.function(*call.arguments)
            except Exception as error:  # the report names every case that fails, not the first
                self.failures.setdefault(f"{type(error).__name__}: {error}", []).append(f"{operator}, {call.case}")
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = False

    def choose(self, key: str, dtype: torch.dtype, dim: int, entry: Entry) -> None:
        """Note the entry that a host function has chosen, and what for."""
        self.chosen.pop(key, None)
        self.chosen[key] = dtype, dim, next(i for i, e in enumerate(TABLE[key]) if e is entry)

    def key_of(self, kernel: str) -> str | None:
        """The key of the table under which a kernel was last chosen: its name, and perhaps more."""
        return next((key for key in reversed(self.chosen) if f"{key}_".startswith(f"{kernel}_")), None)

    def wants(self, kernel: str) -> bool:
        """Whether a kernel is to be compiled for what its entry was last asked for."""
        if self.only and kernel not in self.only:
            return False
        key = self.key_of(kernel)
        if key is None or self.chosen[key][1] != self.width:
            return True
        return self.chosen[key][:2] in table_points(key, architecture=self.architecture)

    def record(self, function: JITFunction, bound: dict[str, Any], compiled: Any, seconds: float) -> None:
        if id(compiled) in self._seen:
            return
        self._seen[id(compiled)] = compiled
        key = self.key_of(function.fn.__name__)
        constants = {p.name: bound[p.name] for p in function.params if p.is_constexpr and p.name in bound}
        tensors = {
            name: str(value.dtype).removeprefix("torch.") for name, value in bound.items() if torch.is_tensor(value)
        }
        self.launches.append(
            {
                "operator": self.operator,
                "case": self.case,
                "kernel": function.fn.__name__,
                "entry": None if key is None else (key, self.chosen[key][2]),
                "constants": {name: getattr(value, "name", value) for name, value in constants.items()},
                "tensors": tensors,
                "warps": compiled.metadata.num_warps,
                "stages": compiled.metadata.num_stages,
                "seconds": round(seconds, 2),
                "shared": compiled.metadata.shared,
                "ptx": count_ptx(compiled.asm["ptx"]),
                **read_cubin(compiled.asm["cubin"], loops=self.loops),
            }
        )

    def entries(self) -> list[dict[str, Any]]:
        """The table entries that lead somewhere on the architecture, and whether each one's kernel was compiled."""
        compiled = {row["entry"] for row in self.launches if row["entry"] is not None and _fits(row)}
        return [
            {"kernel": key, "index": index, "entry": str(entry), "compiled": (key, index) in compiled}
            for key in TABLE
            for index, entry in enumerate(TABLE[key])
            if any(leads_to(key, self.architecture, group, entry.max_dim) is entry for group in entry.dtypes)
        ]


@contextmanager
def compiling_only(recorder: Recorder) -> Iterator[None]:
    """Within it every launch of a Triton kernel is compiled and recorded and does not run; for a process of its own."""
    driver.set_active(StubDriver(recorder.architecture))
    run, choose = JITFunction.run, launch.choose

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not recorder.wants(self.fn.__name__):
            return None
        start = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = [p.name for p in self.params]
        recorder.record(self, {**dict(zip(names, args)), **kwargs}, compiled, time.perf_counter() - start)
        return compiled

    def choose_and_note(kernel: str, device: torch.device, dtype: torch.dtype, dim: int) -> Entry:
        entry = choose(kernel, device, dtype, dim)
        recorder.choose(kernel, dtype, dim, entry)
        return entry

    JITFunction.run, launch.choose = compile_instead, choose_and_note
    try:
        with launch.assumed_architecture(recorder.architecture):
            yield
    finally:
        JITFunction.run, launch.choose = run, choose


class StubDriver:
    """The driver of a chip that is not there."""

    def __init__(self, architecture: str) -> None:
        self._target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_all(
    architecture: str, operators: Sequence[str] = OPERATORS, *, thorough: bool = False, loops: bool = False
) -> dict[str, Any]:
    """Compile the operators' cases for an architecture; the report as a dictionary fit for JSON.

    Args:
        thorough: every flag too, not the table's entries alone.
        loops: report the hottest loops.
    """
    start = time.perf_counter()
    recorder = Recorder(architecture, loops=loops)
    absent = []
    with compiling_only(recorder):
        # imported only now, so that they take the recording `choose` out of launch.py
        for operator in operators:
            if operator not in CASES or importlib.util.find_spec(f"in2nect.kernels.{operator}") is None:
                absent.append(operator)
                continue
            module = importlib.import_module(f"in2nect.kernels.{operator}")
            recorder.calls(operator, CASES[operator](module, architecture, thorough))
    return {
        "architecture": architecture,
        "triton": triton.__version__,
        "thorough": thorough,
        "absent": absent,
        "failures": recorder.failures,
        "entries": recorder.entries(),
        "launches": recorder.launches,
        "seconds": round(time.perf_counter() - start, 1),
    }


# ------------------------------------------------------------------------------------------------ what came out of it

PTX = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "ex2": r"\bex2\.approx",
    "wide loads": r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|ld\.global[\w.:]*\.v8\.b32"
    r"|cp\.async\.c[ag]\.shared\.global[^;]*, 0x10|cp\.async\.bulk\.tensor",
    "local": r"\b(?:ld|st)\.local",
}

LONGEST_WAIT = 16  # instructions of a loop that asks a barrier whether its transactions have arrived; seen: 6

# First match wins.
FAMILIES = {
    "tensor": r"[HQIO]GMMA|[HDIQO]MMA|UTC\w*MMA",
    "mufu": r"MUFU",
    "float32": r"F(FMA|MUL|ADD|SEL|MNMX|SETP|SET|CHK|SWZADD)",
    "float64": r"D(FMA|MUL|ADD|SETP|MNMX)",
    "half": r"H(FMA|MUL|ADD|SETP|SET|MNMX)2|HFMA2",
    "convert": r"F2|I2|FRND",
    "shuffle": r"SHFL|REDUX|MATCH|VOTE|CREDUX",
    "shared": r"LDS|STS|ATOMS|MOVM|USTS|ULDS",
    "load": r"LDG|LD\b|UTMALDG|UBLKCP",
    "store": r"STG|ST\b|RED|ATOM|UTMA",
    "local": r"LDL|STL",
    "tensor memory": r"LDTM|STTM|UTCCP",
    "move": r"MOV|IMAD\.MOV|UMOV|R2UR|S2R|S2UR|CS2R|LDC|ULDC|P2R|R2P|UPLOP|PLOP",
    "integer": r"I(MAD|ADD|ABS|MNMX|SETP|DP|SCADD)|LOP|LEA|SHF|SEL|PRMT|SGXT|BMSK|POPC|FLO|BREV|VI|"
    r"U(IMAD|IADD|LOP|LEA|SHF|SEL|PRMT|ISETP|SGXT|BMSK|POPC|FLO|BREV|VI)",
    "control": r"BRA|BAR|BSSY|BSYNC|BREAK|SYNCS|WARP|DEPBAR|LDGDEPBAR|NOP|EXIT|CALL|RET|NANOSLEEP|YIELD|UTCBAR|ELECT|"
    r"MEMBAR|FENCE|ERRBAR|CCTL|ARRIVES|ACQ|PREEXIT",
}
_FAMILY = {name: re.compile(pattern) for name, pattern in FAMILIES.items()}


def count_ptx(ptx: str) -> dict[str, int]:
    """How often the instructions of ``PTX`` occur."""
    return {name: len(re.findall(pattern, ptx)) for name, pattern in PTX.items()}


def read_cubin(cubin: bytes, *, loops: bool) -> dict[str, Any]:
    """Registers and stack of a binary; its local-memory instructions, all and those in loops; its hottest loop.

    Args:
        loops: find the hottest loop. Else the machine code is read only where there is a stack to find local memory in.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        stack = max(map(int, re.findall(r"STACK:(\d+)", usage)), default=0)
        functions = parse_sass(_cuobjdump("-sass", file.name)) if loops or stack > 0 else []
    found = [loop for code in functions for loop in find_loops(code)]
    local = {i for code in functions for i in code if family(i.opcode) == "local"}
    hottest = max((loop for loop in found if loop.innermost), key=_heat, default=None)
    return {
        "registers": max(map(int, re.findall(r"REG:(\d+)", usage)), default=0),
        "stack": stack,
        "local": len(local),
        "local in loops": len(local.intersection(i for loop in found for i in loop.body)),
        "hottest": None
        if hottest is None
        else {
            "depth": hottest.depth,
            "instructions": len(hottest.body),
            "mix": dict(mix(hottest.body)),
            "tensor": dict(Counter(i.opcode for i in hottest.body if family(i.opcode) == "tensor")),
        },
    }


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    predicate: str
    opcode: str
    operands: str


class Loop(NamedTuple):
    """A natural loop: every instruction from which its head is reached again."""

    head: int
    body: list[Instruction]
    depth: int  # 1 is outermost
    innermost: bool


def family(opcode: str) -> str:
    """The family of an opcode, of ``FAMILIES``."""
    return next((name for name, pattern in _FAMILY.items() if pattern.match(opcode)), "other")


def mix(code: Sequence[Instruction]) -> Counter[str]:
    """Instructions by family."""
    return Counter(family(i.opcode) for i in code)


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;", re.MULTILINE)


def parse_sass(text: str) -> list[list[Instruction]]:
    """The instructions of each function in the output of ``cuobjdump -sass``."""
    functions = []
    for part in re.split(r"^\s*Function : .*$", text, flags=re.MULTILINE)[1:]:
        functions.append([Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in _LINE.finditer(part)])
    return functions


def find_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The natural loops of a function: an edge to a block that dominates its source closes one.

    Mere jumps backwards are not enough: the compiler moves rare paths behind the function's end, and they jump back.
    """
    starts, successors = _blocks(code)
    idom = _dominators(successors)
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for other in following:
            predecessors[other].append(block)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for head in following:
            if block in idom and _dominates(idom, head, block):
                body = bodies.setdefault(head, {head})
                stack = [block]
                while stack:
                    reached = stack.pop()
                    if reached not in body and reached in idom:
                        body.add(reached)
                        stack += predecessors[reached]
    ends = [*starts[1:], len(code)]
    instructions = {
        head: [i for block in sorted(body) for i in code[starts[block] : ends[block]]] for head, body in bodies.items()
    }
    bodies = {head: body for head, body in bodies.items() if not _waits(instructions[head])}
    return [
        Loop(
            code[starts[head]].address,
            instructions[head],
            depth=sum(head in other for other in bodies.values()),
            innermost=not any(other in body for other in bodies if other != head),
        )
        for head, body in bodies.items()
    ]


def _waits(code: Sequence[Instruction]) -> bool:
    """Whether a loop only waits: the branch to itself behind every function's end, or one that asks a barrier again."""
    return len(code) == 1 or (len(code) <= LONGEST_WAIT and any(i.opcode.startswith("SYNCS") for i in code))


def _fits(row: dict[str, Any]) -> bool:
    """Whether a launch has its entry's warps, stages and tiles (narrow rows narrow a tile)."""
    key, index = row["entry"]
    entry = TABLE[key][index]
    return (row["warps"], row["stages"]) == (entry.warps, entry.stages) and all(
        row["constants"].get(tile, size) <= size for tile, size in entry.blocks.items()
    )


def _heat(loop: Loop) -> tuple[int, int, int]:
    """Orders loops by the work that they are there for: tensor-core products, then global loads, then size."""
    families = mix(loop.body)
    return families["tensor"], families["load"], len(loop.body)


def _blocks(code: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """Basic blocks: the position where each starts, and each one's successors."""
    at = {instruction.address: position for position, instruction in enumerate(code)}
    following: dict[int, list[int]] = {}  # of the instructions that end a block
    for position, instruction in enumerate(code):
        name = instruction.opcode.split(".")[0]
        if name in ("BRA", "CALL", "JMP"):
            target = re.findall(r"0x([0-9a-f]+)$", instruction.operands)
            always = name != "CALL" and not instruction.predicate and re.fullmatch(r"0x[0-9a-f]+", instruction.operands)
            jumps = [at[int(t, 16)] for t in target if int(t, 16) in at]
            following[position] = jumps if always else [*jumps, position + 1]
        elif name in ("EXIT", "RET", "BRX", "KILL"):
            following[position] = [position + 1] if instruction.predicate else []
    heads = {0, *(p + 1 for p in following), *(target for targets in following.values() for target in targets)}
    starts = sorted(p for p in heads if p < len(code))
    index = {start: block for block, start in enumerate(starts)}
    successors = []
    for end in [*starts[1:], len(code)]:
        targets = following.get(end - 1, [end])
        successors.append([index[t] for t in targets if t < len(code)])
    return starts, successors


def _dominators(successors: list[list[int]]) -> dict[int, int]:
    """The immediate dominator of each block that block 0 reaches (Cooper, Harvey and Kennedy 2001)."""
    order: list[int] = []  # postorder
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    rank = {block: place for place, block in enumerate(order)}
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for other in successors[block]:
            predecessors[other].append(block)
    idom = {0: 0}
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            known = [p for p in predecessors[block] if p in idom]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if rank[new] < rank[other]:
                        new = idom[new]
                    else:
                        other = idom[other]
            if idom.get(block) != new:
                idom[block] = new
                changed = True
    return idom


def _dominates(idom: dict[int, int], above: int, block: int) -> bool:
    while block != above and block != 0:
        block = idom[block]
    return block == above


def _cuobjdump(option: str, path: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm
    done = subprocess.run([tools / "cuobjdump", option, path], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout


# --------------------------------------------------------------------------------------------------------- the report


def print_launches(report: dict[str, Any]) -> None:
    """A line for each compiled kernel."""
    print(f"{'kernel':34} {'regs':>4} {'stack':>5} {'shared':>7} {'local':>5} {'loops':>5}  tensor / exp2 / wide  case")
    for row in report["launches"]:
        ptx = row["ptx"]
        tensor = " ".join(f"{ptx[name]} {name}" for name in ("wgmma", "mma", "tcgen05") if ptx[name]) or "-"
        print(
            f"{row['kernel']:34} {row['registers']:4} {row['stack']:5} {row['shared']:7} {row['local']:5} "
            f"{row['local in loops']:5}  {tensor} / {ptx['ex2']} / {ptx['wide loads']}  {row['case']}, "
            f"{row['warps']} warps, {row['stages']} stages, {row['seconds']} s"
        )


def print_mix(report: dict[str, Any]) -> None:
    """The instructions of each kernel's hottest loop, a warp and iteration, by family."""
    names = [*FAMILIES, "other"]
    print(f"{'kernel':34} {'all':>5} " + " ".join(f"{name[:8]:>8}" for name in names) + "  case")
    for row in report["launches"]:
        if row["hottest"] is None:
            print(f"{row['kernel']:34} no loop  {row['case']}")
            continue
        counts = row["hottest"]["mix"]
        cells = " ".join(f"{counts.get(name, 0) or '.':>8}" for name in names)
        tensor = ", ".join(f"{n} {opcode}" for opcode, n in row["hottest"]["tensor"].items())
        print(f"{row['kernel']:34} {row['hottest']['instructions']:5} {cells}  {row['case']}; {tensor}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", required=True, choices=ARCHITECTURES)
    parser.add_argument("--kernel", action="append", choices=OPERATORS, help="an operator's name; default: all")
    parser.add_argument(
        "--thorough", action="store_true", help="every combination of flags, not the table's entries alone"
    )
    parser.add_argument("--mix", action="store_true", help="print the instruction mix of the hottest loops")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 makes Triton interpret its kernels; unset it to compile them")
    report = compile_all(
        options.architecture, options.kernel or OPERATORS, thorough=options.thorough, loops=options.mix
    )
    print_launches(report)
    if options.mix:
        print_mix(report)
    for name in report["absent"]:
        print(f"left out: {name}, which has no file in kernels/ or no cases here")
    for message, cases in report["failures"].items():
        print(f"FAILED {message}\nin {len(cases)} cases: {'; '.join(cases)}")
    missing = [row for row in report["entries"] if not row["compiled"]] if options.kernel is None else []
    for row in missing:
        print(f"not compiled: {row['kernel']} {row['index']}: {row['entry']}")
    print(f"{len(report['launches'])} kernels for {report['architecture']} in {report['seconds']} s")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 1 if report["failures"] or missing else 0


if __name__ == "__main__":
    sys.exit(main())
