"""RepresentationTap: the last-layer representation (the classifier's input) of any segmentation network, by a forward
hook.

It captures only while gradients are recorded, so inference pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CLASSIFIERS = (nn.Conv2d, nn.Linear)
_WIDTHS = ("in_channels", "in_features", "num_features", "num_channels", "normalized_shape")  # of a layer's input


class RepresentationTap:
    """Keeps the input of a model's classifier: the representation Z that the losses act on.

        tap = RepresentationTap(model)
        criterion = In2NeCTLoss(num_classes, tap.dim)
        loss = cross_entropy(model(x), y) + criterion(tap.features, y).total

    A model that declares its representation (``model.representation``: module and width; the package's own do) is
    tapped at that module's input. Otherwise the classifier is looked for among the Conv2d and Linear layers outside
    auxiliary heads (names with "aux" in them): the one with ``num_classes`` outputs, or, where this is not given, the
    one whose outputs no later layer takes in. A copy of a tapped model (deepcopy, pickle) is not tapped. Tap a model
    before it is compiled.

    Args:
        model: any network whose classifier is a Conv2d on (B, d, h, w), or a Linear on (B, h, w, d) or (N, d).
        layer: the classifier's dotted name, or the module itself; None looks for it.
        num_classes: how many outputs the classifier has.

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
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._note_size)),
            tapped.register_forward_pre_hook(_Hook(self._capture)),
        ]

    @property
    def features(self) -> Tensor:
        """(B, d, h, w), or (N, d), of the last forward pass under gradients; part of its graph."""
        if self._features is None:
            raise RuntimeError(
                f"The tap at {self.layer!r} holds no features: call model(x) first, with gradients enabled (under "
                "torch.no_grad nothing is captured). Is the layer part of this forward pass, and was the model tapped "
                "before it was compiled?"
            )
        return self._features

    @property
    def stride(self) -> int:
        """Image pixels a feature cell along the height, rounded, of the last forward pass."""
        if self._image_height is None or self.features.dim() != 4:
            raise RuntimeError(
                f"The tap at {self.layer!r} knows no stride: call model(x) with an image (B, C, H, W) first."
            )
        return round(self._image_height / self.features.shape[2])

    def release(self) -> None:
        """Drop the features, and with them the graph they hold on to."""
        self._features = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.release()

    def _note_size(self, inputs: tuple) -> None:
        self._features = None  # a pass that fails, or runs without gradients, must not leave the last one's behind
        image = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        self._image_height = image.shape[2] if image is not None and image.dim() == 4 else None

    def _capture(self, inputs: tuple) -> None:
        if not torch.is_grad_enabled():
            return
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

    def __init__(self, action: Callable[[tuple], None] | None = None) -> None:
        self._action = action

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        if self._action is not None:
            self._action(inputs)

    def __deepcopy__(self, memo: dict) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _find(model: nn.Module, layer: str | nn.Module | None, num_classes: int | None) -> tuple[str, int]:
    """The tapped module's name and the width of its input."""
    named = dict(model.named_modules())
    if layer is None:
        declared = _declared(model)
        if declared is not None:
            return declared
        layer = _search(named, num_classes)
    elif isinstance(layer, nn.Module):
        names = [name for name, module in named.items() if module is layer]
        if not names:
            raise ValueError(f"The layer {type(layer).__name__} is not a module of this {type(model).__name__}.")
        layer = names[0]
    assert isinstance(layer, str)
    if layer not in named:
        raise ValueError(f"There is no layer {layer!r}; {_listed(_candidates(named, num_classes))}")
    classifier = named[layer]
    if not isinstance(classifier, _CLASSIFIERS):
        raise ValueError(
            f"The layer {layer!r} is a {type(classifier).__name__}; expected the Conv2d or Linear classifier."
        )
    return layer, classifier.in_channels if isinstance(classifier, nn.Conv2d) else classifier.in_features


def _declared(model: nn.Module) -> tuple[str, int] | None:
    """The declaration of the model, or of the one inside DistributedDataParallel or torch.compile."""
    prefix = ""
    while True:
        declared = getattr(model, "representation", None)
        module, width = getattr(declared, "module", None), getattr(declared, "width", None)
        if isinstance(module, str) and isinstance(width, int):
            return prefix + module, width
        inner = next(
            (name for name in ("module", "_orig_mod") if isinstance(model._modules.get(name), nn.Module)), None
        )
        if inner is None:
            return None
        prefix, model = f"{prefix}{inner}.", model.get_submodule(inner)


def _search(named: dict[str, nn.Module], num_classes: int | None) -> str:
    candidates = _candidates(named, num_classes)
    main = [name for name in candidates if "aux" not in name.lower()]
    if len(main) != 1:
        raise ValueError(f"{len(main)} layers may be the classifier; {_listed(candidates)}")
    return main[0]


def _candidates(named: dict[str, nn.Module], num_classes: int | None) -> dict[str, nn.Module]:
    layers = {name: module for name, module in named.items() if isinstance(module, _CLASSIFIERS)}
    if num_classes is not None:
        return {name: module for name, module in layers.items() if _outputs(module) == num_classes}
    candidates: list[str] = []
    taken_in: set[int] = set()
    for name, module in reversed(named.items()):  # a classifier of 3 outputs does not feed the first layer of RGB
        if name in layers and _outputs(module) not in taken_in:
            candidates.append(name)
        taken_in.update(_input_widths(module))
    return {name: layers[name] for name in reversed(candidates)}


def _input_widths(module: nn.Module) -> Iterator[int]:
    for attribute in _WIDTHS:
        width = getattr(module, attribute, None)
        width = width[-1] if isinstance(width, tuple) and width else width
        if isinstance(width, int):
            yield width


def _outputs(module: nn.Module) -> int:
    assert isinstance(module, _CLASSIFIERS)
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


def _listed(candidates: dict[str, nn.Module]) -> str:
    if not candidates:
        return (
            "no Conv2d or Linear has that many outputs, or outputs that no later layer takes in. "
            "Name the classifier: RepresentationTap(model, 'its.name')."
        )
    lines = [f"  {name}: {type(module).__name__}, {_outputs(module)} outputs" for name, module in candidates.items()]
    return (
        "candidates, of which one can be named as RepresentationTap(model, 'its.name'), or num_classes given:\n"
        + "\n".join(lines)
    )
