"""The compiled sample_pixels against the definition: the pixels of a class sorted by hash, bit for bit."""

import math

import pytest
import torch
from torch import Tensor

from in2nect import native, reference

pytestmark = pytest.mark.skipif(not native.available("cpp"), reason=f"cpp backend: {native.why_not('cpp')}")

IGNORE = 255
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
SEEDS = ((0, 0), (5, 1), (-3, 7), (-1, -1), (2**63 - 1, 2**40), (-(2**63), -5))


def draw(labels: Tensor, num_classes: int, per_class: int, seed: tuple[int, int], ignore_index: int = IGNORE) -> Tensor:
    return torch.ops.in2nect_cpp.sample_pixels(labels, num_classes, per_class, torch.tensor(seed), ignore_index)


def definition(labels: Tensor, num_classes: int, per_class: int, seed: tuple[int, int], ignore: int = IGNORE) -> Tensor:
    rows = reference.sample_pixels(labels, num_classes, per_class, torch.tensor(seed), ignore_index=ignore)
    drawn = torch.full((num_classes, per_class), -1)
    for out, row in zip(drawn, rows, strict=True):
        out[: len(row)] = row
    return drawn


def make_labels(shape: tuple[int, ...], num_classes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Long-tailed: class k has odds 1 / (k + 1); a tenth is ignored."""
    odds = 1.0 / torch.arange(1, num_classes + 1)
    labels = torch.multinomial(odds, math.prod(shape), replacement=True).view(shape)
    ignored = torch.rand(shape) < 0.1
    return torch.where(ignored, IGNORE, labels).to(dtype)


@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_dtypes_and_seeds(dtype: torch.dtype, seed: tuple[int, int]) -> None:
    labels = make_labels((2, 37, 41), 6, dtype)
    for per_class in (1, 7, 64, 5000):  # the last is more than any class has
        assert torch.equal(draw(labels, 6, per_class, seed), definition(labels, 6, per_class, seed))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[0, 0, 0],
        lambda t: t[0, 0, 0, :0],
        lambda t: t[:, :0],
        lambda t: t[1, 1, 1, 1],
        lambda t: t[..., ::3],
        lambda t: t[:, 1, :, 1:5],
        lambda t: t.permute(3, 1, 0, 2),
        lambda t: t.flip(0)[:, ::2, 1:, ::2],
        lambda t: t[:1, :, :1].expand(4, -1, 3, -1),
        lambda t: t.transpose(0, 3)[..., None],
    ],
)
def test_shapes_and_strides(view) -> None:
    labels = view(make_labels((3, 4, 5, 6), 4))
    assert torch.equal(draw(labels, 4, 5, (1, 2)), definition(labels, 4, 5, (1, 2)))


def test_256_classes_and_several_chunks() -> None:
    labels = torch.randint(0, 256, (3, 300, 301), dtype=torch.uint8)
    assert torch.equal(draw(labels, 256, 40, (9, 9), -1), definition(labels, 256, 40, (9, 9), -1))
    labels = torch.randint(0, 5000, (70_000,))  # more classes than most pixels of a chunk allow lists for
    assert torch.equal(draw(labels, 5000, 3, (9, 9), -1), definition(labels, 5000, 3, (9, 9), -1))


def test_labels_outside_the_classes_are_skipped() -> None:
    labels = make_labels((500,), 3)
    labels[:4] = torch.tensor([-1, 3, 2**40, -(2**62)])
    drawn = draw(labels, 3, 500, (1, 1))
    assert torch.equal(drawn, definition(labels, 3, 500, (1, 1)))
    assert not torch.isin(torch.arange(4), drawn).any()
    ignored = draw(labels, 3, 500, (1, 1), 1)  # an ignored index that is itself a class is ignored
    assert (ignored[1] == -1).all()
    assert torch.equal(ignored[::2], drawn[::2])


def test_all_ignored() -> None:
    assert (draw(torch.full((40, 50), IGNORE), 3, 4, (1, 1)) == -1).all()


def test_a_class_that_falls_short_is_collected_again() -> None:
    """Of 3,000 pixels 104 are expected below the first threshold for 64; with this seed there are 63."""
    pixels, per_class, seed = 3000, 64, (83_588, 0)
    share = (per_class + 4 * per_class**0.5 + 8) / pixels
    below = (reference.hash_pixels(pixels, *seed) < int(share * 2**63)).sum()
    assert below < per_class
    labels = make_labels((pixels,), 3) % 2 + 1  # beside classes that do not
    for given in (torch.zeros(pixels).long(), labels):
        assert torch.equal(draw(given, 3, per_class, seed), definition(given, 3, per_class, seed))


def test_same_pixels_for_any_number_of_threads() -> None:
    labels = make_labels((4, 250, 251), 7)
    expected = definition(labels, 7, 256, (3, 3))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(draw(labels, 7, 256, (3, 3)), expected)
    finally:
        torch.set_num_threads(before)


def test_seed_may_be_strided() -> None:
    labels = make_labels((100,), 3)
    seed = torch.tensor([4, 0, 6])[::2]
    drawn = torch.ops.in2nect_cpp.sample_pixels(labels, 3, 5, seed, IGNORE)
    assert torch.equal(drawn, draw(labels, 3, 5, (4, 6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4)}, "uint8, int32 or int64, got Float; convert them"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"per_class": 0}, "per_class must be at least 1, got 0"),
        ({"seed": torch.tensor([1])}, r"\(2,\) int64, seed and step, got 1"),
        ({"seed": torch.tensor([1.0, 2.0])}, r"\(2,\) int64, .* of Float"),
    ],
)
def test_errors_say_what_was_given(change: dict, message: str) -> None:
    call = {"labels": torch.zeros(4).long(), "num_classes": 2, "per_class": 1, "seed": torch.tensor([0, 0])} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.in2nect_cpp.sample_pixels(*call.values(), IGNORE)
