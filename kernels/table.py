"""The static launch table: for each kernel the tiles, warps and pipeline stages by architecture, dtype and width, the
first entry that fits. Every entry says why it is what it is; every entry is compiled in the tests for its
architectures, which hold its shared memory to the chip's limit and its main loops free of spills.

Limits, a block: sm_80 163 KiB of shared memory, sm_86 and sm_89 99 KiB, sm_90 and sm_100 227 KiB; 255 registers a
thread; 65,536 registers a multiprocessor everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
EVERY = ARCHITECTURES
FLOATS = ("half", "float32", "float64")
_LARGE = ("sm_80", "sm_90", "sm_100")  # 163 KiB of shared memory and more, float64 tensor cores
_SMALL = ("sm_86", "sm_89")


class Entry(NamedTuple):
    """One line of the table."""

    architectures: tuple[str, ...]
    dtypes: tuple[str, ...]  # of "half", "float32", "float64"
    max_dim: int
    blocks: Mapping[str, int]  # tile sizes, by the name the kernel gives them
    warps: int
    stages: int
    reason: str


TABLE: dict[str, Sequence[Entry]] = {}
CANDIDATES: dict[str, Sequence[Entry]] = {}  # what IN2NECT_AUTOTUNE=1 tries

# pair_logsumexp and intra_exact. BLOCK_D is the widest tile; wider rows come in parts of it. "Model" is the instruction
# mix of the compiled loop (python -m tests.kernels.aot --mix) against the rates of the chip's units; no entry is timed.
_HOPPER = ("sm_90", "sm_100")  # wgmma or tcgen05, 227 KiB of shared memory
_AMPERE = ("sm_80", "sm_86", "sm_89")  # mma.sync
TABLE["pair_row_statistics"] = (
    Entry(
        EVERY,
        FLOATS,
        1024,
        {"BLOCK_P": 64, "BLOCK_D": 64},
        warps=4,
        stages=2,
        reason="one read of the rows, next to nothing beside the N^2 that follows; 32 numbers a thread in flight",
    ),
)
TABLE["pair_symmetric_forward"] = (
    Entry(
        ("sm_90",),
        ("half",),
        64,
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 64},
        warps=4,
        stages=3,
        reason="247 registers and 40 KiB, so two programs a processor: one's exponentials run under the other's "
        "products; 8 warps on 128 x 128 leave one program. Model: 8.1 instructions an element, MUFU-bound",
    ),
    Entry(
        ("sm_90",),
        ("half",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 64},
        warps=4,
        stages=2,
        reason="a third stage would leave room for one program (114 KiB at d = 128) instead of two",
    ),
    Entry(
        ("sm_100",),
        ("half",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 64},
        warps=8,
        stages=3,
        reason="with 4 warps the sums spill, because products come out of tensor memory by rows of 128",
    ),
    Entry(
        _AMPERE,
        ("half",),
        64,
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 64},
        warps=4,
        stages=3,
        reason="33 KiB and 204 registers: two programs a processor on every chip. Model: tensor cores bind on sm_86",
    ),
    Entry(
        _AMPERE,
        ("half",),
        128,
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 128},
        warps=4,
        stages=2,
        reason="48 KiB, two programs within sm_86's 100; in parts of 64 the row tile would be read twice",
    ),
    Entry(
        _AMPERE,
        ("half",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64},
        warps=4,
        stages=2,
        reason="24 KiB at any width; 128 columns spill on sm_80, 128 channels take 96 KiB",
    ),
    Entry(
        ("sm_90",),
        ("float32",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32},
        warps=4,
        stages=2,
        reason="three TF32 products keep high and low parts of both tiles in registers: 64 channels spill at d = 128",
    ),
    Entry(
        ("sm_100",),
        ("float32",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32},
        warps=8,
        stages=2,
        reason="160 registers, where 4 warps take 244",
    ),
    Entry(
        _AMPERE,
        ("float32",),
        64,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 64},
        warps=4,
        stages=2,
        reason="168 registers, three programs a processor; 64 x 64 spills in the loop",
    ),
    Entry(
        _AMPERE,
        ("float32",),
        1024,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 32},
        warps=4,
        stages=2,
        reason="parts of 64 channels spill in the loop",
    ),
    Entry(
        _LARGE,
        ("float64",),
        1024,
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 32},
        warps=4,
        stages=2,
        reason="DMMA tiles; 154 registers, no spills. float64 is there to check gradients",
    ),
    Entry(
        _SMALL,
        ("float64",),
        1024,
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="no DMMA on these chips: 32 x 32 by DFMA spills",
    ),
)
TABLE["pair_symmetric_backward"] = (
    Entry(
        _HOPPER,
        ("half",),
        64,
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64},
        warps=8,
        stages=3,
        reason="123 registers and 42 KiB: two programs a processor, so that exponentials run under products. 128 x 128 "
        "has fewer instructions an element (10.0 against 10.8) but one program; 64 rows would read L2 twice as much",
    ),
    Entry(
        _HOPPER,
        ("half",),
        128,
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 128},
        warps=8,
        stages=2,
        reason="the whole row in one tile: in two parts every similarity would be computed twice",
    ),
    Entry(
        _HOPPER,
        ("half",),
        256,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 256},
        warps=8,
        stages=2,
        reason="the whole row in one tile; 226 registers",
    ),
    Entry(
        _HOPPER,
        ("half",),
        1024,
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 128},
        warps=8,
        stages=2,
        reason="parts of 128: 256 spill, a third stage spills",
    ),
    Entry(
        _AMPERE,
        ("half",),
        64,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64},
        warps=4,
        stages=3,
        reason="25 KiB and 168 registers: three programs a processor, on 99 KiB too",
    ),
    Entry(
        _AMPERE,
        ("half",),
        128,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 128},
        warps=4,
        stages=2,
        reason="40 KiB: two programs on 99 KiB",
    ),
    Entry(
        _AMPERE,
        ("half",),
        256,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 256},
        warps=8,
        stages=2,
        reason="72 KiB of the 99; 236 registers",
    ),
    Entry(
        _AMPERE,
        ("half",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 128},
        warps=4,
        stages=2,
        reason="40 KiB: two programs; 64 columns spill on sm_80",
    ),
    Entry(
        ("sm_90",),
        ("float32",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64},
        warps=4,
        stages=2,
        reason="216 registers at d = 64 for high and low parts; 64 columns spill",
    ),
    Entry(
        ("sm_100",),
        ("float32",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64},
        warps=8,
        stages=2,
        reason="170 registers; 4 warps spill",
    ),
    Entry(
        _AMPERE,
        ("float32",),
        64,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 64},
        warps=4,
        stages=2,
        reason="234 registers, no spills; 64 x 64 has 440 local accesses in its loop",
    ),
    Entry(
        _AMPERE,
        ("float32",),
        128,
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 64},
        warps=4,
        stages=2,
        reason="166 registers, 64 KiB",
    ),
    Entry(
        _AMPERE,
        ("float32",),
        1024,
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 32},
        warps=4,
        stages=2,
        reason="209 registers at any width; parts of 64 spill in the loop",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 32},
        warps=4,
        stages=2,
        reason="no spills with or without DMMA; float64 is there to check gradients",
    ),
)
# The general kernels serve samples of a few thousand rows and rare fallbacks.
TABLE["pair_forward"] = (
    Entry(
        EVERY,
        ("half",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64},
        warps=4,
        stages=2,
        reason="168 registers at most; 64 rows a program, so that 1,792 anchors (7 classes of 256) make 28 programs",
    ),
    Entry(
        ("sm_90",),
        ("float32",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32},
        warps=4,
        stages=2,
        reason="192 registers for high and low parts",
    ),
    Entry(
        ("sm_100",),
        ("float32",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32},
        warps=8,
        stages=2,
        reason="125 registers",
    ),
    Entry(
        _AMPERE,
        ("float32",),
        1024,
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 32},
        warps=4,
        stages=2,
        reason="wider tiles spill in the loop; 56 programs for 1,792 anchors",
    ),
    Entry(
        _LARGE,
        ("float64",),
        1024,
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 32},
        warps=4,
        stages=2,
        reason="32 rows spill once in the loop on sm_90",
    ),
    Entry(
        _SMALL,
        ("float64",),
        1024,
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="no DMMA: a second stage spills in the loop",
    ),
)
TABLE["pair_backward"] = (
    Entry(
        EVERY,
        ("half",),
        64,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64},
        warps=4,
        stages=2,
        reason="233 registers, no spills",
    ),
    Entry(
        EVERY,
        ("half",),
        128,
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 128},
        warps=4,
        stages=1,
        reason="the whole row, as in pair_symmetric_backward, whose last step it shares",
    ),
    Entry(
        ("sm_90",),
        ("half",),
        256,
        {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_D": 256},
        warps=8,
        stages=1,
        reason="the whole row; 32 columns spill in the loop",
    ),
    Entry(
        EVERY,
        ("half",),
        256,
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 256},
        warps=8,
        stages=1,
        reason="the whole row, as in pair_symmetric_backward; spills outside the loop only",
    ),
    Entry(
        EVERY,
        ("half",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 128},
        warps=4,
        stages=1,
        reason="parts of 128: no spills",
    ),
    Entry(
        ("sm_90",),
        ("float32",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64},
        warps=4,
        stages=1,
        reason="239 registers at most",
    ),
    Entry(
        ("sm_100",),
        ("float32",),
        1024,
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64},
        warps=8,
        stages=1,
        reason="186 registers at most",
    ),
    Entry(
        _AMPERE,
        ("float32",),
        64,
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 64},
        warps=4,
        stages=1,
        reason="174 registers; 64 rows spill",
    ),
    Entry(
        _AMPERE,
        ("float32",),
        1024,
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="106 registers; 32 rows spill once in the loop",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="168 registers with or without DMMA",
    ),
)
TABLE["pair_positive"] = (
    Entry(
        EVERY,
        FLOATS,
        1024,
        {"BLOCK_P": 8},
        warps=4,
        stages=1,
        reason="whole rows of up to 1,024 channels: 64 numbers a thread of each operand",
    ),
)

# What the search tries; all keep the table's BLOCK_D, by which the callers plan.
CANDIDATES["pair_symmetric_forward"] = tuple(
    Entry(EVERY, FLOATS, 1024, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}, warps=warps, stages=stages, reason="")
    for m, n in ((32, 64), (64, 64), (64, 128), (128, 128))
    for d in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4)
)
CANDIDATES["pair_symmetric_backward"] = tuple(
    Entry(EVERY, FLOATS, 1024, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}, warps=warps, stages=stages, reason="")
    for m, n in ((32, 32), (64, 32), (64, 64), (128, 64), (64, 128), (128, 128))
    for d in (32, 64, 128, 256)
    for warps in (4, 8)
    for stages in (2, 3, 4)
)

# sample_pixels: the width is K. A pixel's hash takes some eighty integer instructions, its label 1 to 8 bytes.
TABLE["sample_pixels_count"] = (
    Entry(
        EVERY,
        FLOATS,
        1024,
        {"BLOCK_N": 2048},
        warps=4,
        stages=1,
        reason="16 pixels a thread: one 16-byte load of uint8 labels, and a histogram's barriers shared by 2048 pixels",
    ),
)
TABLE["sample_pixels_candidates"] = (
    Entry(
        EVERY,
        FLOATS,
        1024,
        {"BLOCK_N": 512},
        warps=4,
        stages=1,
        reason="4 pixels a thread keep within 64 registers, so that all 8 programs of a processor are resident (8 take "
        "100, 16 take 180, for 2 % fewer instructions a pixel); nothing is used twice, so nothing is staged",
    ),
)

# class_sums. PROGRAMS a multiprocessor walk over the tiles: as many as are resident, so that all end together. The
# registers and instructions are the compiler's, at d = 64, K = 7; no entry is timed.
TABLE["class_sums_same_grid"] = (
    Entry(
        _LARGE,
        ("half",),
        64,
        {"BLOCK_P": 128, "BLOCK_D": 64, "PROGRAMS": 3},
        warps=4,
        stages=4,
        reason="16 KiB a stage; three stages of three programs are 144 KiB in flight, where 4.8 TB/s over 132 "
        "multiprocessors times 0.8 us takes 29; up to 168 registers let three programs in, whose 12 warps hide the "
        "barriers; 290 instructions a warp and stage, a third of what can be issued in the time it takes to arrive",
    ),
    Entry(
        _SMALL,
        ("half",),
        64,
        {"BLOCK_P": 128, "BLOCK_D": 64, "PROGRAMS": 2},
        warps=4,
        stages=3,
        reason="as above; two programs of 36 KiB fit into 100 KiB, and 6 KiB in flight would do at 0.77 TB/s",
    ),
    Entry(
        _LARGE,
        ("half",),
        1024,
        {"BLOCK_P": 64, "BLOCK_D": 128, "PROGRAMS": 2},
        warps=8,
        stages=4,
        reason="16 KiB a stage; 8 warps, so that rows which are not aligned, and come number by number, do not spill",
    ),
    Entry(
        _SMALL,
        ("half",),
        1024,
        {"BLOCK_P": 64, "BLOCK_D": 128, "PROGRAMS": 2},
        warps=8,
        stages=3,
        reason="as above; two programs fit into 100 KiB",
    ),
    Entry(
        _LARGE,
        ("float32",),
        64,
        {"BLOCK_P": 64, "BLOCK_D": 64, "PROGRAMS": 2},
        warps=4,
        stages=4,
        reason="16 KiB a stage; unit rows, which are float32 in the tile whatever the features are, take up to 216 "
        "registers and 84 KiB: two programs",
    ),
    Entry(
        _SMALL,
        ("float32",),
        64,
        {"BLOCK_P": 64, "BLOCK_D": 64, "PROGRAMS": 1},
        warps=4,
        stages=3,
        reason="as above, in 99 KiB: one program of unit rows, 32 KiB in flight",
    ),
    Entry(
        EVERY,
        ("float32",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 128, "PROGRAMS": 1},
        warps=4,
        stages=3,
        reason="as above; unit rows up to 128 wide stay in one tile",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 64, "PROGRAMS": 2},
        warps=4,
        stages=2,
        reason="16 KiB a stage; float64 is for checks: what fits into the registers",
    ),
)
TABLE["class_sums_counts"] = (
    Entry(
        EVERY,
        FLOATS,
        1024,
        {"BLOCK_P": 2048, "PROGRAMS": 16},
        warps=4,
        stages=1,
        reason="16 labels a thread: 16-byte loads of uint8, and a histogram's barriers shared by 2048; two or three "
        "waves, so that it matters little how many programs are resident",
    ),
)
TABLE["class_sums_norms"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 32, "PROGRAMS": 24},
        warps=4,
        stages=1,
        reason="8 numbers a thread from each of four cells, on 48 to 96 registers: 20 warps or more hide the loads; 64 "
        "channels would spill where rows are not aligned; three waves or more, whatever is resident",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 16, "PROGRAMS": 24},
        warps=4,
        stages=1,
        reason="as above, half as wide: float64 takes twice the registers",
    ),
)
TABLE["class_sums_cells"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 64, "BLOCK_D": 64, "PROGRAMS": 4},
        warps=2,
        stages=1,
        reason="one cell a thread: the walk over its labels exchanges nothing, 32 instructions a label; the product "
        "wants all weights in every warp, so there are two; some 200 registers: four programs",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 64, "PROGRAMS": 4},
        warps=2,
        stages=1,
        reason="as above, half the cells: float64 takes twice the registers",
    ),
)
TABLE["class_sums_add"] = (
    Entry(
        EVERY,
        ("float32", "float64"),
        1024,
        {"BLOCK_S": 256, "BLOCK_E": 16},
        warps=8,
        stages=1,
        reason="nothing but latency: 16 loads a thread at once, two rounds for the 396 slots of 132 multiprocessors",
    ),
)
TABLE["class_sums_backward_same_grid"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 64, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="16 numbers a thread, in 16-byte stores; with 64 channels unit rows which are not aligned would spill",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="as above, half the pixels: float64 takes twice the registers",
    ),
)
TABLE["class_sums_backward_cells"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 128, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="one cell a thread, as in class_sums_cells; 32 channels at a time stay within 128 registers",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="as above, fewer cells: float64 takes twice the registers",
    ),
)
TABLE["class_sums_backward_cells_curved"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 128, "BLOCK_D": 16},
        warps=4,
        stages=1,
        reason="as class_sums_backward_cells; the weights of nine neighbours leave registers for 16 channels",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 16},
        warps=4,
        stages=1,
        reason="as above, fewer cells: float64 takes twice the registers",
    ),
)

# class_moments. The registers are the compiler's at d = 64, K = 7; no entry is timed.
TABLE["class_moments_same_grid"] = (
    Entry(
        EVERY,
        ("half",),
        64,
        {"BLOCK_P": 32, "BLOCK_J": 32, "PROGRAMS": 2},
        warps=4,
        stages=1,
        reason="255 registers, no spills; all 64 columns of the second moments spill in the loop on sm_80 and sm_86",
    ),
    Entry(
        EVERY,
        ("half", "float32"),
        128,
        {"BLOCK_P": 16, "BLOCK_J": 32, "PROGRAMS": 2},
        warps=4,
        stages=1,
        reason="up to 243 registers for rows of 128, high and low parts of float32 included; 32 pixels spill",
    ),
    Entry(
        EVERY,
        ("float64",),
        128,
        {"BLOCK_P": 16, "BLOCK_J": 16, "PROGRAMS": 1},
        warps=8,
        stages=1,
        reason="160 registers; float64 is there to check gradients",
    ),
)
TABLE["class_moments_same_grid_mixtures"] = (
    Entry(
        ("sm_100",),
        ("half", "float32"),
        128,
        {"BLOCK_P": 32, "PROGRAMS": 2},
        warps=8,
        stages=1,
        reason="with four warps, as below, it spills in the loop",
    ),
    Entry(
        EVERY,
        ("half", "float32"),
        128,
        {"BLOCK_P": 32, "PROGRAMS": 4},
        warps=4,
        stages=1,
        reason="16 numbers a thread of rows of 64, 32 of rows of 128; four programs hide the loads",
    ),
    Entry(
        EVERY,
        ("float64",),
        128,
        {"BLOCK_P": 16, "PROGRAMS": 4},
        warps=4,
        stages=1,
        reason="as above, half the pixels: float64 takes twice the registers",
    ),
)
TABLE["class_moments_same_grid_backward"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        64,
        {"BLOCK_P": 32, "BLOCK_J": 32},
        warps=4,
        stages=1,
        reason="16 numbers a thread of rows, M z and du; up to 183 registers for bfloat16",
    ),
    Entry(
        EVERY,
        ("half", "float32"),
        128,
        {"BLOCK_P": 16, "BLOCK_J": 16},
        warps=8,
        stages=1,
        reason="as above, for rows of 128; more pixels spill, in the loop over the parts of M too",
    ),
    Entry(
        EVERY,
        ("float64",),
        128,
        {"BLOCK_P": 16, "BLOCK_J": 16},
        warps=4,
        stages=1,
        reason="as above; float64 takes twice the registers",
    ),
)
TABLE["class_moments_grams"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 64, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="16 numbers a thread of a cell and of each neighbour, which come out of the cache",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 16},
        warps=4,
        stages=1,
        reason="as above, fewer: float64 takes twice the registers",
    ),
)
TABLE["class_moments_forms"] = (
    Entry(
        EVERY,
        ("half",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 64},
        warps=4,
        stages=1,
        reason="rows of 64 take one product; 16 numbers a thread of M z, and of a neighbour",
    ),
    Entry(
        EVERY,
        ("float32",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 32},
        warps=4,
        stages=1,
        reason="high and low parts of M and of the rows: 64 x 64 spills in the loop",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 16},
        warps=4,
        stages=1,
        reason="as above, fewer: float64 takes twice the registers",
    ),
)
TABLE["class_moments_gather"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 128, "NUMBERS": 8},
        warps=4,
        stages=1,
        reason="one cell a thread of up to 8 classes: nothing is exchanged; NUMBERS a thread of each array of classes "
        "and cells, a quarter as many with a covariance a class",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "NUMBERS": 2},
        warps=4,
        stages=1,
        reason="as above, fewer: float64 takes twice the registers",
    ),
)
TABLE["class_moments_linear"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 64, "BLOCK_D": 64, "PROGRAMS": 4},
        warps=4,
        stages=1,
        reason="32 numbers a thread of the rows, up to 32 of the sums; four programs hide the loads",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 32, "PROGRAMS": 4},
        warps=4,
        stages=1,
        reason="as above, fewer: float64 takes twice the registers",
    ),
)
TABLE["class_moments_quadratic"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 64, "PROGRAMS": 1},
        warps=8,
        stages=1,
        reason="16 numbers a thread of the sums, 8 of the rows and of the neighbours; four warps spill",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 16, "BLOCK_D": 32, "PROGRAMS": 2},
        warps=4,
        stages=1,
        reason="as above, fewer: float64 takes twice the registers",
    ),
)
TABLE["class_moments_gradient"] = (
    Entry(
        EVERY,
        ("half", "float32"),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 64, "BLOCK_R": 32},
        warps=4,
        stages=1,
        reason="16 numbers a thread of the gradient, of the neighbours' sum and of a neighbour; twice as many spill "
        "where channels come last",
    ),
    Entry(
        EVERY,
        ("float64",),
        1024,
        {"BLOCK_P": 32, "BLOCK_D": 32, "BLOCK_R": 16},
        warps=4,
        stages=1,
        reason="as above, fewer: float64 takes twice the registers",
    ),
)
TABLE["class_moments_add"] = (
    Entry(
        EVERY,
        ("float32", "float64"),
        1024,
        {"BLOCK_S": 128, "BLOCK_E": 16},
        warps=4,
        stages=1,
        reason="nothing but latency, as class_sums_add",
    ),
)

# gather_rows: a few thousand rows, all latency; small programs spread them over the multiprocessors.
TABLE["gather_rows_forward"] = (
    Entry(
        EVERY,
        FLOATS,
        1024,
        {"BLOCK_P": 16, "BLOCK_D": 64},
        warps=4,
        stages=1,
        reason="7 classes of 256 rows make 112 programs; 8 numbers a thread from each of four cells",
    ),
)
TABLE["gather_rows_through_norms"] = TABLE["gather_rows_forward"]
TABLE["gather_rows_entries"] = (
    Entry(EVERY, FLOATS, 1024, {"BLOCK_P": 128}, warps=4, stages=1, reason="one row a thread"),
)
TABLE["gather_rows_add"] = (
    Entry(
        EVERY,
        FLOATS,
        1024,
        {"BLOCK_D": 128},
        warps=1,
        stages=1,
        reason="a program an entry, most of which end at once or add two or three rows: one warp, four channels a "
        "thread",
    ),
)
