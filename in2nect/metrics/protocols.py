"""Evaluation protocols by name: which classes a mean is taken over. Standard library alone.

A protocol never changes what is counted. The confusion matrix, and with it every class's false positives and false
negatives and the overall accuracy, is of all classes; only the means leave classes out.
"""

from collections.abc import Sequence
from typing import Literal

Protocol = Literal["all", "loveda", "isprs"]
"""all: means over every class. loveda: the same, of LoveDA's seven classes. isprs: of the six classes of Vaihingen and
Potsdam, means over the five that are not clutter; it is meant for eroded labels."""

_CLASSES = {"loveda": 7, "isprs": 6}
_LEFT_OUT = {"isprs": "clutter"}


def averaged_classes(protocol: Protocol, names: Sequence[str]) -> tuple[bool, ...]:
    """Whether each class is part of the means.

    Args:
        names: of the classes, in the order of their codes. The class that `isprs` leaves out is found by its name,
            which starts with "clutter".

    Raises:
        ValueError: an unknown protocol, another number of classes than it is made for, or no one class that it leaves
            out.
    """
    if protocol not in ("all", *_CLASSES):
        raise ValueError(f"protocol {protocol!r}; expected one of all, {', '.join(_CLASSES)}")
    expected = _CLASSES.get(protocol, len(names))
    if len(names) != expected:
        raise ValueError(
            f"protocol {protocol} scores {expected} classes, and {len(names)} were given ({', '.join(names)}); give "
            "the data set's classes, or choose the protocol all"
        )
    if protocol not in _LEFT_OUT:
        return (True,) * len(names)
    averaged = tuple(not name.lower().startswith(_LEFT_OUT[protocol]) for name in names)
    if averaged.count(False) != 1:
        raise ValueError(
            f"protocol {protocol} leaves the class {_LEFT_OUT[protocol]} out of the means, and the classes are "
            f"{', '.join(names)}; name one of them {_LEFT_OUT[protocol]}, or choose the protocol all"
        )
    return averaged
