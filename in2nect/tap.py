"""RepresentationTap: the last-layer representation (the classifier's input) of any segmentation network, by forward
hooks.

It captures only while gradients are recorded, so inference pays nothing; and it copies nothing: training pays for the
features until the next forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_CLASSIFIERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_NORMALISED_WIDTHS = ("num_features", "num_channels", "normalized_shape")
_WIDTHS = ("in_channels", "in_features", *_NORMALISED_WIDTHS)  # of a layer's input
_LISTED = 12  # candidates that an error shows: the last, since a classifier comes late


class RepresentationTap:
    """Keeps the input of a model's classifier: the representation Z that the losses act on.

        tap = RepresentationTap(model)
        criterion = In2NeCTLoss(num_classes, tap.dim)
        loss = cross_entropy(model(x), y) + criterion(tap.features, y).total

    A model that declares its representation (``model.representation``: module and width; the package's own do) is
    tapped at that module's input. Otherwise the classifier is looked for among the Conv2d, ConvTranspose2d and Linear
    layers outside auxiliary heads (names with "aux" in them): the one with ``num_classes`` outputs that no
    normalisation follows, or, where this is not given, the one whose outputs no later layer takes in.

    The model may be wrapped in DistributedDataParallel or torch.compile before or after. A copy of a tapped model
    (deepcopy, pickle) is not tapped, unless the tap is copied with it, as part of one object that holds both. A layer
    that a forward pass runs several times is captured the last time.

    Args:
        model: any network whose classifier is a convolution on (B, d, h, w), or a Linear on (B, h, w, d) or (N, d).
        layer: the classifier's dotted name, or the module itself; None looks for it.
        num_classes: how many outputs the classifier has.

    Attributes:
        layer: the tapped module's dotted name in ``model``.
        dim: d, channels of the representation.

    Raises:
        ValueError: no such layer, no candidate, or several: the message lists them.
    """

    def __init__(
        self, model: nn.Module, layer: str | nn.Module | None = None, *, num_classes: int | None = None
    ) -> None:
        self.layer, self.dim = _find(model, layer, num_classes)
        tapped = model.get_submodule(self.layer)
        self._channels_last = isinstance(tapped, nn.Linear)
        self._features: Tensor | None = None
        self._image_height: int | None = None
        self._measuring = False
        self._hooks = [_Hook(), _Hook()]
        self._connect()
        self._handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module, hook in zip((model, tapped), self._hooks)
        ]

    @property
    def features(self) -> Tensor:
        """(B, d, h, w), or (N, d), of the last forward pass under gradients; part of its graph.

        Raises:
            RuntimeError: the last forward pass captured nothing; the message says what may be the reason.
        """
        if self._features is None:
            raise RuntimeError(
                f"The tap at {self.layer!r} holds no features: call model(x) first, with gradients enabled (under "
                "torch.no_grad nothing is captured outside of tap.measuring()). If it was called: the layer has no "
                "part in this forward pass; or it runs inside torch.utils.checkpoint, which then needs "
                "use_reentrant=False; or torch.compile runs a graph from before the model was tapped: call "
                "torch.compiler.reset()."
            )
        return self._features

    @property
    def stride(self) -> int:
        """Image pixels a feature cell along the height, rounded, of the last forward pass.

        Raises:
            RuntimeError: the last forward pass captured no (B, d, h, w), or had no image among its arguments.
        """
        if self._image_height is None or self.features.dim() != 4:
            raise RuntimeError(
                f"The tap at {self.layer!r} knows no stride: call model(x) with an image (B, C, H, W) first."
            )
        return round(self._image_height / self.features.shape[2])

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within it, features are captured under torch.no_grad too, as to measure their collapse on held-out images;
        the last are dropped at its end.
        """
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
            self.release()

    def release(self) -> None:
        """Drop the features, and with them the graph they hold on to; the next forward pass does so by itself."""
        self._features = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        for hook in self._hooks:
            hook.action = None  # compiled graphs do not see that a hook is gone, but do see this
        self._handles, self._hooks = [], []
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": None, "_measuring": False, "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def _connect(self) -> None:
        for hook, action in zip(self._hooks, (self._begin, self._capture)):
            if hook.action is None:  # it is not where copy.copy shares the original's hooks
                hook.action = action

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self._features = None  # a pass that fails, or runs without gradients, must not leave the last one's behind
        heights = [image.shape[2] for image in inputs if isinstance(image, Tensor) and image.dim() == 4]
        self._image_height = heights[0] if heights else None

    def _capture(self, module: nn.Module, inputs: tuple) -> None:
        if not (torch.is_grad_enabled() or self._measuring) or _is_rerun():
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel runs copies of the model, each on a part of the batch, and a tap cannot follow "
                "them all; use DistributedDataParallel, with one process a GPU."
            )
        features = inputs[0]
        if self._channels_last and features.dim() == 4:
            features = features.permute(0, 3, 1, 2)
        if features.dim() not in (2, 4):
            raise ValueError(
                f"The tap at {self.layer!r} saw features of shape {tuple(features.shape)}; expected (B, d, h, w), "
                "(B, h, w, d) for a Linear, or (N, d). Tap a layer before the tokens are flattened."
            )
        self._features = features


class _Hook:
    """A forward pre-hook that its copies forget: a copied model must not write into the original's tap."""

    def __init__(self) -> None:
        self.action: Callable[[nn.Module, tuple], None] | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.action is not None:
            self.action(module, (*args, *kwargs.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _is_rerun() -> bool:
    """Whether the forward pass is not a training step's: a network being exported, or a checkpointed segment that the
    backward pass computes again.
    """
    if torch.compiler.is_exporting():
        return True
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _find(model: nn.Module, layer: str | nn.Module | None, num_classes: int | None) -> tuple[str, int]:
    """The tapped module's name and the width of its input."""
    named = dict(model.named_modules(remove_duplicate=False))
    if layer is None:
        declared = _declared(model)
        if declared is not None:
            return declared
        name = _search(dict(model.named_modules()), num_classes)
    elif isinstance(layer, nn.Module):
        names = [name for name, module in named.items() if module is layer]
        if not names:
            raise ValueError(f"The layer {type(layer).__name__} is not a module of this {type(model).__name__}.")
        name = names[0]
    else:
        name = next((prefix + layer for prefix, _ in _unwrapped(model) if prefix + layer in named), layer)
    if name not in named:
        raise ValueError(f"There is no layer {name!r}; {_listed(_candidates(named, num_classes))}")
    classifier = named[name]
    if not isinstance(classifier, _CLASSIFIERS):
        raise ValueError(
            f"The layer {name!r} is a {type(classifier).__name__}; expected the classifier: a Conv2d, ConvTranspose2d "
            "or Linear."
        )
    width = classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels
    if width == 0:
        raise ValueError(
            f"The layer {name!r} does not know its width yet, being a {type(classifier).__name__}: run the model once, "
            "then tap it."
        )
    return name, width


def _unwrapped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, then what DistributedDataParallel, torch.compile or AveragedModel wraps, each with the prefix of its
    names.
    """
    prefix = ""
    while True:
        yield prefix, model
        inner = next(
            (name for name in ("module", "_orig_mod") if isinstance(model._modules.get(name), nn.Module)), None
        )
        if inner is None:
            return
        prefix, model = f"{prefix}{inner}.", model.get_submodule(inner)


def _declared(model: nn.Module) -> tuple[str, int] | None:
    """The declaration of the model, or of the one inside its wrappers."""
    for prefix, inner in _unwrapped(model):
        declared = getattr(inner, "representation", None)
        module, width = getattr(declared, "module", None), getattr(declared, "width", None)
        if isinstance(module, str) and isinstance(width, int):
            return prefix + module, width
    return None


def _search(named: dict[str, nn.Module], num_classes: int | None) -> str:
    candidates = _candidates(named, num_classes)
    main = [name for name in candidates if "aux" not in name.lower()]
    if len(main) != 1:
        raise ValueError(f"{len(main)} layers may be the classifier; {_listed(candidates)}")
    return main[0]


def _candidates(named: dict[str, nn.Module], num_classes: int | None) -> dict[str, nn.Module]:
    layers = {name: module for name, module in named.items() if isinstance(module, _CLASSIFIERS)}
    if num_classes is not None:
        normalised = _normalised(named)
        return {
            name: module
            for name, module in layers.items()
            if _outputs(module) == num_classes and name not in normalised
        }
    candidates: list[str] = []
    taken_in: set[int] = set()
    for name, module in reversed(named.items()):  # a classifier of 3 outputs does not feed the first layer of RGB
        if name in layers and _outputs(module) not in taken_in:
            candidates.append(name)
        taken_in.update(_widths(module, _WIDTHS))
    return {name: layers[name] for name in reversed(candidates)}


def _normalised(named: dict[str, nn.Module]) -> set[str]:
    """Layers followed by a normalisation of their outputs: no classifier, however many outputs they have."""
    leaves = [(name, module) for name, module in named.items() if not module._modules]
    return {
        name
        for (name, module), (_, after) in pairwise(leaves)
        if isinstance(module, _CLASSIFIERS) and _outputs(module) in _widths(after, _NORMALISED_WIDTHS)
    }


def _widths(module: nn.Module, attributes: tuple[str, ...]) -> Iterator[int]:
    for attribute in attributes:
        width = getattr(module, attribute, None)
        width = width[-1] if isinstance(width, tuple) and width else width
        if isinstance(width, int):
            yield width


def _outputs(module: nn.Module) -> int:
    assert isinstance(module, _CLASSIFIERS)
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _listed(candidates: dict[str, nn.Module]) -> str:
    if not candidates:
        return (
            "no Conv2d, ConvTranspose2d or Linear has that many outputs, or outputs that no later layer takes in. "
            "Name the classifier: RepresentationTap(model, 'its.name')."
        )
    lines = [f"  {name}: {type(module).__name__}, {_outputs(module)} outputs" for name, module in candidates.items()]
    more = [f"  ({len(lines) - _LISTED} more before these)"] if len(lines) > _LISTED else []
    return (
        "candidates, of which one can be named as RepresentationTap(model, 'its.name'), or num_classes given:\n"
        + "\n".join([*more, *lines[-_LISTED:]])
    )
