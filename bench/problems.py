"""What is timed: an operator or a loss at one size, its inputs, the package's own call, and the float64 answer that
every implementation must give before it is timed.

Features are noise around class centres under a long-tailed, patchy label map without ignored pixels, so that every
implementation works on the same N rows. Random data on purpose: zeros run faster on a GPU than what a network gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from in2nect import functional, ops, reference
from in2nect.labels import to_feature_grid
from in2nect.ops.backend import use_backend

OPS = ("intra_class_loss", "class_sums", "pair_logsumexp", "sample_pixels", "gather_rows")
ESTIMATORS = ("exact", "sampled", "moments")
LAYOUTS = ("nchw", "channels_last", "rows")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Relative errors, of the value and of the gradient, by which an implementation still computes the same thing. A row
# that was rounded to b bits gives a gradient with a relative error of a few 2^-b; forgetting the weights, the positive
# term or the normalisation changes it by tens of percent.
TOLERANCE = {
    torch.bfloat16: (2e-2, 5e-2),
    torch.float16: (5e-3, 1e-2),
    torch.float32: (1e-5, 1e-4),
    torch.float64: (1e-10, 1e-9),
}
IMAGE = 256  # pixels a side of an image, wherever N is a multiple of its area
PATCH = 4  # pixels a side of the label map's patches
SPREAD = 0.5  # of the noise, against class centres of standard deviation 1
ORACLE_PIXELS = 4096  # up to here the equations of in2nect.reference: it holds several N x N matrices in float64
# Up to here the float64 answer is worked out at the timed size (some seconds), beyond at ORACLE_PIXELS or so:
PAIRS_CHECKED = {"cpu": 8192, "cuda": 65_536}  # where every pair counts
PIXELS_CHECKED = {"cpu": 2**19, "cuda": 2**20}  # where the cost is linear


@dataclass(frozen=True)
class Problem:
    """One operator or loss at one size. ``pixels`` are the rows of the loss: label pixels at resolution "label",
    feature cells at "feature"; the labels have ``ratio`` times the features' side."""

    op: str
    estimator: str | None
    device: torch.device
    dtype: torch.dtype
    pixels: int
    dim: int
    classes: int
    layout: str = "nchw"
    resolution: str = "label"
    ratio: int = 1
    per_class: int = 256
    keys: int = 0
    temperature: float = 1.0
    seed: int = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        """Images, height and width of the rows' grid: images of 256 x 256 where they fit, else one, nearly square; rows
        (N, d) are one line, as the package sees them."""
        if self.layout == "rows":
            return 1, 1, self.pixels
        images, rest = divmod(self.pixels, IMAGE * IMAGE)
        if images and not rest:
            return images, IMAGE, IMAGE
        height = next(h for h in range(math.isqrt(self.pixels), 0, -1) if self.pixels % h == 0)
        return 1, height, self.pixels // height

    @property
    def label_shape(self) -> tuple[int, int, int]:
        images, height, width = self.grid
        times = self.ratio if self.resolution == "feature" else 1
        return images, height * times, width * times

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        images, height, width = self.grid
        times = self.ratio if self.resolution == "label" else 1
        return images, height // times, width // times

    @property
    def every_pair(self) -> bool:
        return self.op == "pair_logsumexp" or (self.op == "intra_class_loss" and self.estimator == "exact")

    def for_check(self) -> Problem:
        """This problem at a size whose float64 answer can be afforded; itself where that is so."""
        limit = (PAIRS_CHECKED if self.every_pair else PIXELS_CHECKED)[self.device.type]
        if max(self.pixels, self.keys) <= limit:
            return self
        side = self.ratio * math.ceil(math.isqrt(ORACLE_PIXELS) / self.ratio)
        return replace(self, pixels=side * side, keys=min(self.keys, ORACLE_PIXELS))


@dataclass(frozen=True)
class Inputs:
    """``leaves`` are differentiated; the names of ``constants`` are those of the operators' arguments."""

    leaves: tuple[Tensor, ...]
    constants: dict[str, Tensor]
    upstream: Tensor | None  # gradient of the first output; None where that is a scalar, or has no gradient

    def tensors(self) -> list[Tensor]:
        return [*self.leaves, *self.constants.values()]

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def double(self) -> Inputs:
        def widen(t: Tensor) -> Tensor:
            return t.detach().double() if t.is_floating_point() else t

        return Inputs(
            tuple(widen(t).requires_grad_() for t in self.leaves),
            {name: widen(t) for name, t in self.constants.items()},
            None if self.upstream is None else widen(self.upstream),
        )


def make_inputs(problem: Problem) -> Inputs:
    """Inputs of a problem, drawn from its seed on its device."""
    generator = torch.Generator(problem.device).manual_seed(problem.seed)
    labels = _labels(problem, generator)
    if problem.op == "sample_pixels":
        return Inputs((), {"labels": labels, "seed": torch.tensor([problem.seed, 0], device=problem.device)}, None)
    if problem.op == "pair_logsumexp":
        return _pair_inputs(problem, labels, generator)
    features = _features(problem, labels, generator).requires_grad_()
    if problem.op == "intra_class_loss":
        return Inputs((features,), {"labels": labels}, None)
    if problem.op == "class_sums":
        upstream = _normal(generator, problem.classes, problem.dim, like=features)
        return Inputs((features,), {"labels": labels}, upstream)
    drawn = torch.tensor([problem.seed, 0], device=problem.device)
    grid_labels = to_feature_grid(labels.view(problem.label_shape), *problem.grid[1:])
    with use_backend("reference"):
        indices = ops.sample_pixels(grid_labels, problem.classes, problem.per_class, drawn).flatten()
    upstream = _normal(generator, len(indices), problem.dim, like=features)
    return Inputs((features,), {"indices": indices}, upstream)


def rotated(problem: Problem, inputs: Inputs, cache: int, most: int) -> list[Inputs]:
    """Copies of the inputs, each rolled by one more row, together larger than ``cache`` bytes if ``most`` bytes allow.

    Working through them keeps the inputs of one call out of the caches at the next.
    """
    size = max(inputs.bytes(), 1)
    count = max(1, min(64, math.ceil(1.5 * cache / size) + 1, most // size))
    return [inputs, *(_rolled(problem, inputs, shift) for shift in range(1, count))]


def ours(problem: Problem, inputs: Inputs, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    """The package's public function of the problem, on whichever backend is chosen."""
    return _call(problem, inputs, functional, generator)


def differentiate(inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the leaves."""
    if not inputs.leaves:
        return ()
    return torch.autograd.grad(outputs[0], inputs.leaves, inputs.upstream)


def expected(problem: Problem, inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs and gradients in float64: the equations of in2nect.reference up to ORACLE_PIXELS rows, where they are
    materialised; above, the package's reference backend, which its tests hold to those equations."""
    wide = inputs.double()
    oracle = problem.pixels <= ORACLE_PIXELS and problem.keys <= ORACLE_PIXELS
    with use_backend("reference"):
        outputs = _call(problem, wide, reference if oracle else functional, generator_for(problem))
    gradients = differentiate(wide, outputs)
    return tuple(t.detach() for t in outputs), gradients


def generator_for(problem: Problem) -> torch.Generator:
    """The generator from which a checked implementation of the ``sampled`` loss draws its pixels."""
    return torch.Generator(problem.device).manual_seed(problem.seed)


def drawn_pixels(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Anchors and keys, (K, m) each, which ``sampled`` draws out of :func:`generator_for`."""
    labels = to_feature_grid(_grid_labels(problem, inputs), *problem.grid[1:])
    seeds = reference.draw_seeds(generator_for(problem), problem.device)
    with use_backend("reference"):
        anchors, keys = (ops.sample_pixels(labels, problem.classes, problem.per_class, seed) for seed in seeds)
    return anchors, keys


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``||found - wanted|| / ||wanted||``; for integers 0 where all are equal, else infinite."""
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found.to(wanted.dtype), wanted) else math.inf
    norm = torch.linalg.vector_norm(wanted)
    return float(torch.linalg.vector_norm(found.double() - wanted) / norm.clamp(min=1e-300))


def sampling_fault(problem: Problem, inputs: Inputs, drawn: Tensor) -> str | None:
    """What is wrong with (K, m) pixels as a sample without replacement of min(m, n_k) pixels a class, -1 after them."""
    labels = to_feature_grid(_grid_labels(problem, inputs), *problem.grid[1:]).flatten()
    if drawn.shape != (problem.classes, problem.per_class):
        return f"it drew {tuple(drawn.shape)} pixels, expected {(problem.classes, problem.per_class)}"
    for k in range(problem.classes):
        members = int((labels == k).sum())
        chosen = drawn[k][drawn[k] >= 0]
        if len(chosen) != min(members, problem.per_class):
            return f"it drew {len(chosen)} pixels of the {members} of class {k}"
        if len(chosen.unique()) != len(chosen):
            return f"it drew a pixel of class {k} twice"
        if not bool((labels[chosen] == k).all()):
            return f"it drew pixels for class {k} that are of another"
    return None


def _call(problem: Problem, inputs: Inputs, source: object, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """``source`` is in2nect.functional for the operators, or in2nect.reference for the equations."""
    equations = source is reference
    constants = inputs.constants
    if problem.op == "intra_class_loss":
        loss = source.intra_class_loss(  # type: ignore[attr-defined]
            inputs.leaves[0],
            constants["labels"],
            problem.classes,
            estimator=problem.estimator,
            per_class=problem.per_class,
            temperature=problem.temperature,
            resolution=problem.resolution,
            generator=generator,
        )
        return (loss,)
    if problem.op == "class_sums":
        if equations:
            means, counts = reference.class_means(
                inputs.leaves[0],
                constants["labels"],
                problem.classes,
                resolution=problem.resolution,  # type: ignore[arg-type]
            )
            return means * counts[:, None], counts
        arguments = inputs.leaves[0], constants["labels"], problem.classes
        return ops.class_sums(*arguments, resolution=problem.resolution)[:2]
    if problem.op == "pair_logsumexp":
        anchors, *keys = inputs.leaves
        if equations:
            columns = keys[0] if keys else anchors
            return (reference.exact_log_d(anchors, columns, constants["weights"], problem.temperature),)
        weights = constants["weights"]
        return (ops.pair_logsumexp(anchors, weights, problem.temperature, keys=keys[0] if keys else None),)
    if problem.op == "sample_pixels":
        labels = to_feature_grid(_grid_labels(problem, inputs), *problem.grid[1:])
        if equations:
            drawn = reference.sample_pixels(labels, problem.classes, problem.per_class, constants["seed"])
            return (padded(drawn, problem.per_class),)
        return (ops.sample_pixels(labels, problem.classes, problem.per_class, constants["seed"]),)
    _, height, width = problem.grid
    features, indices = as_grid(inputs.leaves[0]), constants["indices"]
    if equations:
        rows = reference.label_resolution_rows(features, height, width).permute(0, 2, 3, 1).flatten(0, 2)
        there = (indices >= 0)[:, None]
        return (torch.where(there, rows[indices.clamp(min=0)], 0.0),)
    return (ops.gather_rows(features, indices, height, width),)


def as_grid(features: Tensor) -> Tensor:
    """Features as (B, d, h, w), rows (N, d) as one line of N pixels."""
    return features if features.dim() == 4 else features.T[None, :, None]


def padded(drawn: list[Tensor], per_class: int) -> Tensor:
    """Lists of pixels, one a class, as (K, per_class) with -1 after them."""
    return torch.stack([torch.nn.functional.pad(pixels, (0, per_class - len(pixels)), value=-1) for pixels in drawn])


def _grid_labels(problem: Problem, inputs: Inputs) -> Tensor:
    return inputs.constants["labels"].view(problem.label_shape)


def _labels(problem: Problem, generator: torch.Generator) -> Tensor:
    """Long-tailed (class k has odds 1 / (k + 1)) in patches; the first pixels give every class at least two."""
    images, height, width = problem.label_shape
    side = PATCH * (problem.ratio if problem.resolution == "feature" else 1)
    odds = 1.0 / torch.arange(1, problem.classes + 1, device=problem.device)
    rows, columns = math.ceil(height / side), math.ceil(width / side)
    patches = torch.multinomial(odds, images * rows * columns, replacement=True, generator=generator)
    labels = patches.view(images, rows, 1, columns, 1).expand(-1, -1, side, -1, side)
    labels = labels.reshape(images, rows * side, columns * side)[:, :height, :width].contiguous()
    height, width = problem.grid[1:]
    times = labels.shape[1] // height
    cells = torch.arange(2 * problem.classes, device=problem.device)
    image, row, column = cells // (height * width), cells // width % height, cells % width
    # the pixel under a cell's centre, which to_feature_grid takes
    labels[image, (2 * row + 1) * times // 2, (2 * column + 1) * times // 2] = cells // 2
    return labels.flatten() if problem.layout == "rows" else labels


def _features(problem: Problem, labels: Tensor, generator: torch.Generator) -> Tensor:
    images, height, width = problem.feature_shape
    cells = to_feature_grid(labels.view(problem.label_shape), height, width)
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    device = problem.device
    centres = torch.randn(problem.classes, problem.dim, generator=generator, device=device, dtype=wide)
    noise = torch.randn(images, height, width, problem.dim, generator=generator, device=device, dtype=wide)
    rows = noise.mul_(SPREAD).add_(centres[cells]).to(problem.dtype)  # [B, h, w, d]
    if problem.layout == "rows":
        return rows.flatten(0, 2)
    features = rows.permute(0, 3, 1, 2)
    return features.contiguous() if problem.layout == "nchw" else features


def _pair_inputs(problem: Problem, labels: Tensor, generator: torch.Generator) -> Inputs:
    """Unit rows, class weights 1 / n_k, and the loss's own upstream gradient, which is the weights'."""
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32

    def unit_rows(labels: Tensor) -> Tensor:
        centres = torch.randn(problem.classes, problem.dim, generator=generator, device=problem.device, dtype=wide)
        noise = torch.randn(len(labels), problem.dim, generator=generator, device=problem.device, dtype=wide)
        return reference.unit_rows(noise * SPREAD + centres[labels]).to(problem.dtype).requires_grad_()

    def weights(labels: Tensor) -> Tensor:
        return (1.0 / torch.bincount(labels, minlength=problem.classes).to(wide))[labels]

    flat = to_feature_grid(labels.view(problem.label_shape), *problem.grid[1:]).flatten()
    if not problem.keys:
        return Inputs((unit_rows(flat),), {"weights": weights(flat)}, weights(flat))
    columns = flat[torch.randint(len(flat), (problem.keys,), generator=generator, device=problem.device)]
    return Inputs((unit_rows(flat), unit_rows(columns)), {"weights": weights(columns)}, weights(flat))


def _rolled(problem: Problem, inputs: Inputs, shift: int) -> Inputs:
    """Another place in memory, and the same pixels in another order."""

    def roll(t: Tensor, steps: int) -> Tensor:
        along = -1 if t.dim() > 2 else 0  # columns of images, or rows
        return torch.empty_like(t).copy_(t.detach().roll(steps, along))  # empty_like keeps the layout

    steps = {"labels": shift * problem.label_shape[2] // problem.feature_shape[2], "weights": shift}
    leaves = tuple(roll(t, shift).requires_grad_() for t in inputs.leaves)
    constants = {name: roll(t, steps.get(name, 0)) for name, t in inputs.constants.items()}
    return Inputs(leaves, constants, inputs.upstream)


def _normal(generator: torch.Generator, *shape: int, like: Tensor) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(*shape, generator=generator, device=like.device, dtype=wide)
