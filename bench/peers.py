"""The competition: the best that PyTorch and public libraries offer for each operator and loss, computing the same.

No library has the intra-class loss, but several have a log-sum-exp over all pairs that never holds the pairs. Around
each of them stands the rest of the loss in plain torch: normalisation, class weights as log w_j on the columns, and the
positive term from class sums, exactly as docs/mathematics.md has it. So every peer gives the whole loss, and the
gradient with respect to the raw features. In half precision the unit rows are rounded once and multiplied in half
precision; sums and exponentials stay in float32.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from ceilings import available_memory
from problems import Inputs, Problem, as_grid, drawn_pixels, padded
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from in2nect.labels import to_feature_grid
from in2nect.reference import all_rows

EPSILON = 1e-12  # as in2nect's: shorter rows count as zero
HURRIED_PIXELS = 8192  # up to here a run on the CPU is over in minutes, and compilations would be most of it
MATERIALISED = 5  # matrices of N x M in float32 that autograd keeps at once, at most, where pairs are materialised

Outputs = tuple[Tensor, ...]
Call = Callable[[Problem, Inputs, int | None, bool], Outputs]  # chunk; whether the drawn pixels are prescribed


@dataclass(frozen=True)
class Peer:
    """``chunks`` are the sizes of which the fastest counts; ``compiles`` where a new size costs a compilation."""

    name: str
    call: Call
    why_not: Callable[[Problem], str | None] = lambda problem: None
    chunks: Callable[[Problem], tuple[int | None, ...]] = lambda problem: (None,)
    compiles: bool = False
    sampler: Callable[[Problem, Inputs], Tensor] | None = None  # (K, m) pixels, where it draws its own


@dataclass(frozen=True)
class PairSum:
    """A way to ``log sum_j w_j exp(a_i . k_j)``; ``weighted`` instead gives sum_i c_i of it, where it can at once."""

    name: str
    log_d: Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
    weighted: Callable[[Tensor, Tensor, Tensor, Tensor, int | None], Tensor] | None = None
    why_not: Callable[[Problem], str | None] = lambda problem: None
    chunks: Callable[[Problem], tuple[int | None, ...]] = lambda problem: (None,)
    compiles: bool = False


def peers(problem: Problem) -> list[Peer]:
    """The peers of a problem, the plainest first."""
    if problem.op == "intra_class_loss":
        if problem.estimator == "exact":
            return [_whole_loss(way) for way in PAIR_SUMS]
        return {"sampled": SAMPLED, "moments": MOMENTS}[problem.estimator or ""]
    if problem.op == "pair_logsumexp":
        return [_log_d_alone(way) for way in PAIR_SUMS]
    return {"class_sums": CLASS_SUMS, "sample_pixels": SAMPLERS, "gather_rows": GATHERS}[problem.op]


# --- log-sum-exp over all pairs; anchors are already divided by the temperature -----------------------------


def _body(anchors: Tensor, keys: Tensor, log_weights: Tensor) -> Tensor:
    if anchors.element_size() >= 4:
        return torch.logsumexp(torch.addmm(log_weights, anchors, keys.T), dim=1)
    return torch.logsumexp((anchors @ keys.T).float() + log_weights, dim=1)


def _naive(anchors: Tensor, keys: Tensor, log_weights: Tensor, chunk: int | None) -> Tensor:
    return _body(anchors, keys, log_weights)


def _checkpointed(anchors: Tensor, keys: Tensor, log_weights: Tensor, chunk: int | None, body: Any = _body) -> Tensor:
    """Blocks of anchors, forgotten after the forward and worked out again in the backward."""
    blocks = anchors.split(chunk or len(anchors))
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random in it
    return torch.cat([checkpoint(body, block, keys, log_weights, **settings) for block in blocks])


def _compiled(anchors: Tensor, keys: Tensor, log_weights: Tensor, chunk: int | None) -> Tensor:
    return _checkpointed(anchors, keys, log_weights, chunk, _compile(_body))


@functools.cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _linear_cross_entropy(anchors: Tensor, keys: Tensor, log_weights: Tensor, chunk: int | None) -> Tensor:
    """``log sum_j exp(logit_ij) = cross entropy against any target + the target's logit``, which is added back."""
    targets = torch.arange(len(anchors), device=anchors.device) % len(keys)
    rows, columns, bias = _with_bias(anchors, keys, log_weights)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    entropy = F.linear_cross_entropy(rows, columns, targets, linear_bias=bias, reduction="none", options=options)
    return entropy + _own_logits(anchors, keys, log_weights, targets)


def _linear_cross_entropy_weighted(
    anchors: Tensor, keys: Tensor, log_weights: Tensor, coefficients: Tensor, chunk: int | None
) -> Tensor:
    """Each row against itself as the target, so that the weight of target i is row i's; the sum, as the function wants
    it: only then does it work out the gradient in the forward. In bf16 that sum comes rounded to 2 digits, which are
    no value of a loss; there each row's entropy is asked for instead."""
    if anchors.dtype == torch.bfloat16:
        return (coefficients * _linear_cross_entropy(anchors, keys, log_weights, chunk)).sum()
    targets = torch.arange(len(anchors), device=anchors.device)
    rows, columns, bias = _with_bias(anchors, keys, log_weights)
    entropy = F.linear_cross_entropy(
        rows,
        columns,
        targets,
        linear_bias=bias,
        weight=coefficients.to(rows.dtype),
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk),
    )
    return entropy + (coefficients * _own_logits(anchors, keys, log_weights, targets)).sum()


def _with_bias(anchors: Tensor, keys: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The bias has the rows' dtype, in which log w would keep 2 digits: in half precision it becomes two columns."""
    if anchors.element_size() >= 4:
        return anchors, keys, log_weights
    high = log_weights.to(keys.dtype)
    low = (log_weights - high).to(keys.dtype)
    ones = torch.ones_like(high)
    zeros = ones.new_zeros(len(keys), 6)  # eight columns keep the rows aligned for the tensor cores
    columns = torch.cat([keys, high[:, None], low[:, None], zeros], dim=1)
    ones = anchors.new_ones(len(anchors), 8)
    return torch.cat([anchors, ones], dim=1), columns, None


def _own_logits(anchors: Tensor, keys: Tensor, log_weights: Tensor, targets: Tensor) -> Tensor:
    wide = log_weights.dtype
    return (anchors.to(wide) * keys.to(wide)[targets]).sum(1) + log_weights[targets]


def _flex_attention(anchors: Tensor, keys: Tensor, log_weights: Tensor, chunk: int | None) -> Tensor:
    return _compile(_flex_body())(anchors, keys, log_weights)


@functools.cache
def _flex_body() -> Callable:
    """Attention's own log-sum-exp; the values, which nobody asks for, are as narrow as the kernel allows."""
    from torch.nn.attention import flex_attention as module

    attend: Any = module.flex_attention
    asked: dict[str, Any]
    if hasattr(module, "AuxRequest"):  # torch 2.9 and later; return_lse is deprecated there
        asked = {"return_aux": module.AuxRequest(lse=True)}
    else:
        asked = {"return_lse": True}

    def body(anchors: Tensor, keys: Tensor, log_weights: Tensor) -> Tensor:
        def add_log_weight(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + log_weights[k]

        values = keys.detach()[None, None, :, :16].contiguous()
        arguments = anchors[None, None], keys[None, None], values
        found = attend(*arguments, score_mod=add_log_weight, scale=1.0, **asked)[1]
        return getattr(found, "lse", found)[0, 0]

    return body


def _keops(anchors: Tensor, keys: Tensor, log_weights: Tensor, chunk: int | None) -> Tensor:
    from pykeops.torch import LazyTensor

    wide = log_weights.dtype
    rows, columns = LazyTensor(anchors.to(wide)[:, None, :]), LazyTensor(keys.to(wide)[None, :, :])
    return ((rows | columns) + LazyTensor(log_weights[None, :, None])).logsumexp(dim=1).view(-1)


def _cut_cross_entropy(anchors: Tensor, keys: Tensor, log_weights: Tensor, chunk: int | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    targets = torch.arange(len(anchors), device=anchors.device) % len(keys)
    rows, columns, bias = _with_bias(anchors, keys, log_weights)
    entropy = linear_cross_entropy(rows, columns, targets, bias=bias, reduction="none", impl="cce_exact")
    return entropy.to(log_weights.dtype) + _own_logits(anchors, keys, log_weights, targets)


def _pairs_do_not_fit(problem: Problem) -> str | None:
    """Only asked on the CPU, where running out of memory kills the process; on CUDA it is an error like any other."""
    if problem.device.type == "cuda":
        return None
    columns = problem.keys or problem.pixels
    needed = MATERIALISED * problem.pixels * columns * 4
    there = available_memory(problem.device)
    if needed < 0.8 * there:
        return None
    return f"the pairs would take {needed / 2**30:.0f} GiB and {there / 2**30:.0f} GiB are free"


def _no_linear_cross_entropy(problem: Problem) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch.nn.functional.linear_cross_entropy takes torch 2.13 or later; this is {torch.__version__}"


def _no_flex_attention(problem: Problem) -> str | None:
    if problem.device.type == "cpu":
        return "flex_attention has no backward on the CPU"
    if problem.dtype == torch.float64:
        return "flex_attention has no float64"
    if problem.dim < 16:
        return f"flex_attention wants rows of 16 numbers or more; d is {problem.dim}"
    return None


def _no_keops(problem: Problem) -> str | None:
    return _missing("pykeops", "pip install pykeops")


def _no_cut_cross_entropy(problem: Problem) -> str | None:
    if problem.device.type == "cpu":
        return "cut-cross-entropy runs on CUDA alone"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return "cut-cross-entropy's backward takes bf16 and fp16 alone"
    return _missing("cut_cross_entropy", "pip install cut-cross-entropy")


def _missing(module: str, how: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed ({how})"


def _chunks(problem: Problem) -> tuple[int | None, ...]:
    """Blocks of which the pairs are between some megabytes, which stay in a cache, and a gigabyte or two."""
    columns = problem.keys or problem.pixels
    sizes = (2**22, 2**24) if problem.device.type == "cpu" else (2**26, 2**28)
    return tuple(dict.fromkeys(min(problem.pixels, max(64, size // columns)) for size in sizes))


def _cross_entropy_chunks(problem: Problem) -> tuple[int | None, ...]:
    """Its own choice too."""
    return (None, *_chunks(problem))


def _compiled_chunks(problem: Problem) -> tuple[int | None, ...]:
    """On the CPU a compilation takes many seconds: for sizes of the default run the larger block only."""
    hurried = problem.device.type == "cpu" and problem.pixels <= HURRIED_PIXELS
    return _chunks(problem)[-1:] if hurried else _chunks(problem)


PAIR_SUMS = (
    PairSum("torch_naive", _naive, why_not=_pairs_do_not_fit),
    PairSum("torch_checkpoint", _checkpointed, chunks=_chunks),
    PairSum("torch_compile", _compiled, chunks=_compiled_chunks, compiles=True),
    PairSum(
        "linear_cross_entropy",
        _linear_cross_entropy,
        _linear_cross_entropy_weighted,
        why_not=_no_linear_cross_entropy,
        chunks=_cross_entropy_chunks,
    ),
    PairSum("flex_attention", _flex_attention, why_not=_no_flex_attention, compiles=True),
    PairSum("keops", _keops, why_not=_no_keops, compiles=True),
    PairSum("cut_cross_entropy", _cut_cross_entropy, why_not=_no_cut_cross_entropy, compiles=True),
)


# --- the whole loss -----------------------------------------------------------------------------------------


def _whole_loss(way: PairSum) -> Peer:
    def call(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
        unit, one_hot = _unit_rows(problem, inputs)
        weights, anchor_weights, positive = _terms(problem, unit, one_hot)
        anchors = (unit / problem.temperature).to(problem.dtype)
        keys = unit.to(problem.dtype)
        if way.weighted is not None:
            return (way.weighted(anchors, keys, weights.log(), anchor_weights, chunk) - positive,)
        return ((anchor_weights * way.log_d(anchors, keys, weights.log(), chunk)).sum() - positive,)

    return Peer(way.name, call, way.why_not, way.chunks, way.compiles)


def _log_d_alone(way: PairSum) -> Peer:
    def call(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
        anchors, *keys = inputs.leaves
        scaled = anchors if problem.temperature == 1 else (anchors / problem.temperature).to(anchors.dtype)
        columns = keys[0] if keys else anchors
        return (way.log_d(scaled, columns, inputs.constants["weights"].log(), chunk),)

    return Peer(way.name, call, way.why_not, way.chunks, way.compiles)


def _unit_rows(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Unit rows (N, d) in float32 or float64, and one-hot rows (N, K) of their classes."""
    rows, classes = all_rows(inputs.leaves[0], inputs.constants["labels"], resolution=problem.resolution)  # type: ignore[arg-type]
    unit = F.normalize(rows, dim=1, eps=EPSILON)
    one_hot = (classes[:, None] == torch.arange(problem.classes, device=classes.device)).to(unit.dtype)
    return unit, one_hot


def _terms(problem: Problem, unit: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights 1 / n of the columns and of the anchors, and the positive term, from class sums."""
    counts = one_hot.sum(0)
    paired = counts >= 2
    weights = one_hot @ (1 / counts.clamp(min=1))
    anchor_weights = one_hot @ (paired / counts.clamp(min=1))
    pairs = torch.where(paired, counts * (counts - 1), 1.0)
    sums, squares = one_hot.T @ unit, one_hot.T @ unit.square().sum(1)
    positive = torch.where(paired, (sums.square().sum(1) - squares) / pairs, 0.0).sum() / problem.temperature
    return weights, anchor_weights, positive


def _sampled(sampler: Callable[[Problem, Inputs], Tensor]) -> Call:
    """Plain log-sum-exp over drawn pixels: (K m)^2 pairs are few enough to hold."""

    def call(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
        unit, one_hot = _unit_rows(problem, inputs)
        _, _, positive = _terms(problem, unit, one_hot)
        drawn = drawn_pixels(problem, inputs) if prescribed else (sampler(problem, inputs), sampler(problem, inputs))
        (anchors, anchor_weights), (keys, key_weights) = (_drawn_rows(unit, pixels) for pixels in drawn)
        paired = (one_hot.sum(0) >= 2).repeat_interleave(problem.per_class)
        scaled = (anchors / problem.temperature).to(problem.dtype)
        log_d = _body(scaled, keys.to(problem.dtype), key_weights.log())
        return ((torch.where(paired, anchor_weights, 0.0) * log_d).sum() - positive,)

    return call


def _drawn_rows(unit: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (K m, d) and their weights, 1 / m_k, and 0 where a class has fewer pixels than m."""
    there = pixels >= 0
    weights = there / there.sum(1, keepdim=True).clamp(min=1).to(unit.dtype)
    return unit[pixels.clamp(min=0).flatten()], weights.flatten()


def _moments(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
    """The pooled expansion, through the d x d moments, as in docs/mathematics.md."""
    unit, one_hot = _unit_rows(problem, inputs)
    return (_moments_body(unit, one_hot, problem.temperature),)


def _moments_compiled(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
    unit, one_hot = _unit_rows(problem, inputs)
    return (_compile(_moments_body)(unit, one_hot, problem.temperature),)


def _moments_body(unit: Tensor, one_hot: Tensor, temperature: float) -> Tensor:
    counts = one_hot.sum(0)
    present, paired = counts > 0, counts >= 2
    sums = one_hot.T @ unit
    centres = sums / counts.clamp(min=1)[:, None]
    weights = one_hot @ (1 / counts.clamp(min=1))
    anchor_weights = one_hot @ (paired / counts.clamp(min=1))
    pairs = torch.where(paired, counts * (counts - 1), 1.0)
    squares = one_hot.T @ unit.square().sum(1)
    positive = torch.where(paired, (sums.square().sum(1) - squares) / pairs, 0.0).sum() / temperature
    logits = (unit @ centres.T / temperature).masked_fill(~present, -math.inf)
    second_moment = (unit * weights[:, None]).T @ unit
    covariance = (second_moment - centres.T @ centres) / present.sum()
    anchors_moment = (unit * anchor_weights[:, None]).T @ unit
    log_d = (anchor_weights * torch.logsumexp(logits, dim=1)).sum()
    return log_d + (covariance * anchors_moment).sum() / (2 * temperature**2) - positive


# --- class sums ---------------------------------------------------------------------------------------------


def _index_add(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
    rows, classes = _rows(problem, inputs)
    sums = rows.new_zeros(problem.classes, problem.dim).index_add(0, classes, rows)
    return sums, torch.bincount(classes, minlength=problem.classes)


def _one_hot_product(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
    """(B, d, h w) features times (B, h w, K) one-hot labels, without moving the channels; summed over images."""
    features, labels = inputs.leaves[0], inputs.constants["labels"]
    if problem.layout == "rows" or problem.ratio > 1:
        rows, classes = _rows(problem, inputs)
        one_hot = classes[:, None] == torch.arange(problem.classes, device=classes.device)
        return one_hot.T.to(rows.dtype) @ rows, one_hot.sum(0)
    one_hot = labels.flatten(1)[:, :, None] == torch.arange(problem.classes, device=labels.device)
    sums = torch.bmm(features.flatten(2), one_hot.to(features.dtype))  # [B, d, K]
    return sums.to(torch.promote_types(sums.dtype, torch.float32)).sum(0).T, one_hot.sum((0, 1))


def _segment_reduce(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
    rows, classes = _rows(problem, inputs)
    counts = torch.bincount(classes, minlength=problem.classes)
    return torch.segment_reduce(rows[classes.argsort()], "sum", lengths=counts, axis=0, initial=0), counts


def _torch_scatter(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
    from torch_scatter import scatter_add

    rows, classes = _rows(problem, inputs)
    sums = scatter_add(rows, classes, dim=0, dim_size=problem.classes)
    return sums, torch.bincount(classes, minlength=problem.classes)


def _rows(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return all_rows(inputs.leaves[0], inputs.constants["labels"], resolution=problem.resolution)  # type: ignore[arg-type]


# --- sampling and gathering ---------------------------------------------------------------------------------


def _randperm(problem: Problem, inputs: Inputs) -> Tensor:
    """As one would write it: the pixels of each class, shuffled. Waits for the device at every class."""
    flat = _row_classes(problem, inputs)
    chosen = []
    for k in range(problem.classes):
        members = (flat == k).nonzero().squeeze(1)
        chosen.append(members[torch.randperm(len(members), device=flat.device)[: problem.per_class]])
    return padded(chosen, problem.per_class)


def _topk(problem: Problem, inputs: Inputs) -> Tensor:
    """Without waiting: the largest of random numbers, class by class."""
    flat = _row_classes(problem, inputs)
    noise = torch.rand(len(flat), device=flat.device)
    wanted = min(problem.per_class, len(flat))
    chosen = []
    for k in range(problem.classes):
        value, index = torch.where(flat == k, noise, -1.0).topk(wanted)
        chosen.append(F.pad(torch.where(value >= 0, index, -1), (0, problem.per_class - wanted), value=-1))
    return torch.stack(chosen)


def _row_classes(problem: Problem, inputs: Inputs) -> Tensor:
    labels = inputs.constants["labels"].view(problem.label_shape)
    return to_feature_grid(labels, *problem.grid[1:]).flatten()


def _indexing(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
    """Interpolated as a whole where the grids differ, then indexed."""
    _, height, width = problem.grid
    features = as_grid(inputs.leaves[0])
    if features.shape[2:] != (height, width):
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        features = F.interpolate(wide, size=(height, width), mode="bilinear", align_corners=False)
    image, y, x, there = _places(problem, inputs)
    rows = features[image, :, y, x]
    return (torch.where(there, rows.to(torch.promote_types(rows.dtype, torch.float32)), 0.0),)


def _grid_sample(problem: Problem, inputs: Inputs, chunk: int | None, prescribed: bool) -> Outputs:
    """Interpolated at the drawn pixels alone, each on its own image: one call an image."""
    images, height, width = problem.grid
    features = inputs.leaves[0]
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    image, y, x, there = _places(problem, inputs)
    points = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1).to(wide.dtype)[None, :, None]
    rows = wide.new_zeros(len(image), wide.shape[1])
    for i in range(images):
        own = F.grid_sample(wide[i : i + 1], points, padding_mode="border", align_corners=False)[0, :, :, 0].T
        rows = rows + torch.where((image == i)[:, None] & there, own, 0.0)
    return (rows,)


def _places(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, height, width = problem.grid
    indices = inputs.constants["indices"]
    pixel = indices.clamp(min=0)
    return pixel // (height * width), pixel // width % height, pixel % width, (indices >= 0)[:, None]


def _same_grid(problem: Problem) -> str | None:
    if problem.grid == problem.feature_shape:
        return "there is nothing to interpolate: the labels have the features' grid"
    return None


CLASS_SUMS = [
    Peer("index_add", _index_add),
    Peer("one_hot", _one_hot_product),
    Peer("segment_reduce", _segment_reduce),
    Peer("torch_scatter", _torch_scatter, lambda problem: _missing("torch_scatter", "pip install torch-scatter")),
]
SAMPLED = [
    Peer("torch_randperm", _sampled(_randperm), sampler=_randperm),
    Peer("torch_topk", _sampled(_topk), sampler=_topk),
]
MOMENTS = [Peer("torch_moments", _moments), Peer("torch_compile", _moments_compiled, compiles=True)]
SAMPLERS = [
    Peer("torch_randperm", lambda problem, inputs, *_: (_randperm(problem, inputs),), sampler=_randperm),
    Peer("torch_topk", lambda problem, inputs, *_: (_topk(problem, inputs),), sampler=_topk),
]
GATHERS = [Peer("torch_indexing", _indexing), Peer("grid_sample", _grid_sample, _same_grid)]
