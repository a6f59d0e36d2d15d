"""The Triton kernels of ``sample_pixels``: the reference's sample, whatever the shape, the seed or chance does."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch.library import opcheck

from in2nect import ops, reference
from in2nect.ops.backend import use_backend

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("in2nect.kernels.sample_pixels")

GARBAGE = 0x5A5A5A5A
TAIL = 1e-4  # a right sampler fails a two-sided test of this level for one choice of the seeds in 10^4


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds garbage, so that a slot which no kernel writes is seen."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(GARBAGE))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(GARBAGE))


@pytest.fixture
def candidates(monkeypatch):
    """(candidates, n_k) of every class, as the repair kernel meets them."""
    seen: list[tuple[int, int]] = []
    launch = kernels.launch

    def spy(kernel, grid, *arguments, **sizes):
        if kernel is kernels.sample_pixels_repair:
            seen.extend(zip(arguments[3].tolist(), arguments[2].tolist()))
        launch(kernel, grid, *arguments, **sizes)

    monkeypatch.setattr(kernels, "launch", spy)
    return seen


def make_labels(shape, num_classes, ignore_index=255, absent=()):
    """Long-tailed labels, a tenth of them ignored."""
    odds = torch.tensor([0.0 if k in absent else 1 / (k + 1) for k in range(num_classes)])
    labels = torch.multinomial(odds, max(int(np.prod(shape)), 1), replacement=True)[: int(np.prod(shape))].view(shape)
    labels[torch.rand(shape) < 0.1] = ignore_index
    return labels


def seed(value=5, step=0, device="cpu"):
    return torch.tensor([value, step], device=device)


def check(labels, num_classes, per_class, seeds, device, ignore_index=255):
    """The sample is the reference's, and -1 behind it."""
    labels, seeds = labels.to(device), seeds.to(device)
    drawn = ops.sample_pixels(labels, num_classes, per_class, seeds, ignore_index=ignore_index)
    assert drawn.shape == (num_classes, per_class)
    expected = torch.full((num_classes, per_class), -1)
    wanted = reference.sample_pixels(labels.cpu(), num_classes, per_class, seeds.cpu(), ignore_index=ignore_index)
    for row, indices in zip(expected, wanted):
        row[: len(indices)] = indices
    assert torch.equal(drawn.cpu(), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("per_class", [1, 16, 300, 2000])
@pytest.mark.parametrize("num_classes", [2, 7])
@pytest.mark.parametrize("pixels", [0, 1, 7, 1000, 5000])
def test_is_the_reference(triton_device, pixels, num_classes, per_class):
    absent = (3,) if num_classes > 3 else ()
    check(make_labels((pixels,), num_classes, absent=absent), num_classes, per_class, seed(), triton_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("per_class", [1, 40])
def test_many_classes(triton_device, per_class):
    labels = make_labels((5000,), 256, ignore_index=-100, absent=(0, 17, 255))
    check(labels, 256, per_class, seed(), triton_device, ignore_index=-100)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_label_dtypes(triton_device, dtype):
    for ignore_index in (255, 2, -100):  # 2 is a class too; -100 is no uint8, and leaves 255 outside 0..K-1
        labels = make_labels((2, 17, 23), 7).to(dtype)
        check(labels, 7, 30, seed(), triton_device, ignore_index=ignore_index)


def test_labels_far_outside(triton_device):
    labels = torch.tensor([0, 2**32, 1, -1, 2**32 + 1, -(2**63), 2**63 - 1, 1])  # 0 and 1 in their lower 32 bits
    check(labels, 2, 4, seed(), triton_device)


def test_strided_labels(triton_device):
    labels = make_labels((4, 22, 34), 5)[:, ::2, 1::2]
    assert not labels.is_contiguous()
    check(labels, 5, 20, seed(), triton_device)
    check(labels.transpose(0, 2), 5, 20, seed(), triton_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "values", [(0, 0), (-3, 7), (-(2**63), 2**63 - 1), (2**63 - 1, -1), (2**62 + 12345, 2**40), (-1, -(2**63))]
)
def test_seeds(triton_device, values):
    check(make_labels((3000,), 4), 4, 25, torch.tensor(values), triton_device)


def test_all_ignored(triton_device):
    check(torch.full((3, 50), 255), 3, 4, seed(), triton_device)


@triton.jit
def _hashes(seeds, start, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, kernels._hash(kernels._stream(seeds), start, BLOCK))


@pytest.mark.parametrize("start", [0, 2**31 - 8, 2**32 - 8, 2**45 + 16])
def test_hash_of_far_pixels(triton_device, start):
    out = torch.zeros(16, dtype=torch.int64, device=triton_device)
    _hashes[(1,)](seed(-7, 3, triton_device), start, out, BLOCK=16)
    with np.errstate(over="ignore"):
        stream = reference_mix(np.uint64(2**64 - 7) + GOLDEN * np.uint64(4))
        indices = np.arange(start + 1, start + 17, dtype=np.uint64)
        expected = reference_mix(stream + GOLDEN * indices) >> np.uint64(1)
    assert out.tolist() == expected.tolist()


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def reference_mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def test_threshold_lets_through_what_it_should(triton_device, candidates):
    """No repair with the slack as it is, and not everything is a candidate either."""
    labels = torch.arange(40_000) % 2
    for step in range(10):
        check(labels, 2, 20, seed(3, step), triton_device)
    expected = 20 + 8 * 20**0.5 + 64
    assert len(candidates) == 20
    for found, _ in candidates:
        assert abs(found - expected) < 5 * expected**0.5
    assert abs(np.mean([found for found, _ in candidates]) - expected) < 5 * (expected / 20) ** 0.5


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("per_class", "least"), [(64, 0.0), (100, -95.0), (64, -63.5), (127, 40.0)], ids=["even", "few", "one", "many"]
)
def test_repair(triton_device, candidates, monkeypatch, per_class, least):
    """With hardly any slack chance lets through too few or too many of a class, and the sample is still exact.

    The capacity is that of no slack: room for m and the one that may share the last one's hash, in multiples of 64.
    """
    monkeypatch.setattr(kernels, "SLACK_DEVIATIONS", 0.0)
    monkeypatch.setattr(kernels, "SLACK_LEAST", least)
    monkeypatch.setattr(kernels, "_capacity", lambda m: triton.cdiv(m + 1, 64) * 64)
    labels = make_labels((3000,), 3)
    for step in range(2):
        check(labels, 3, per_class, seed(9, step), triton_device)
    few = [found for found, n in candidates if found < min(per_class, n)]
    many = [found for found, _ in candidates if found > triton.cdiv(per_class + 1, 64) * 64]
    if least < 0:
        assert len(few) == 6
    elif least > 0:
        assert many
    else:
        assert few


def test_pixels_with_one_hash_go_by_index(triton_device):
    """A pair in the middle, one across the last slot, and a class with fewer pixels than slots."""
    hashes = torch.tensor([[3, 5, 5, 9, 9, 12], [1, 1, 2, 2**63 - 1, 2**63 - 1, 2**63 - 1]], device=triton_device)
    order = torch.tensor([[5, 1, 0, 2, 3, 4], [0, 1, 2, 3, 4, 5]], device=triton_device)
    indices = torch.tensor([[10, 30, 40, 20, 99, 7], [8, 6, 4, 2, 2, 2]], device=triton_device)
    counts = torch.tensor([6, 3], device=triton_device)
    sample = torch.full((2, 4), GARBAGE, device=triton_device)
    kernels.sample_pixels_emit[(1, 2)](hashes, order, indices, counts, sample, 4, 6, BLOCK_S=16)
    assert sample.tolist() == [[7, 10, 30, 20], [6, 8, 4, -1]]


def test_parts_merge(triton_device):
    """Of the samples of two parts, the pixels with the smallest hashes are the sample of the whole."""
    labels = make_labels((4000,), 3)
    first, second = labels.clone(), labels.clone()
    first[1500:], second[:1500] = 255, 255
    whole, *parts = (
        ops.sample_pixels(part.to(triton_device), 3, 50, seed(device=triton_device)).cpu()
        for part in (labels, first, second)
    )
    hashes = reference.hash_pixels(4000, 5, 0)
    for row, *rows in zip(whole, *parts):
        members = torch.cat(rows)
        members = members[members >= 0].numpy()
        assert row.tolist() == members[np.argsort(hashes[members])][:50].tolist()


def test_same_every_time(triton_device):
    labels = make_labels((20_000,), 4).to(triton_device)
    first = ops.sample_pixels(labels, 4, 100, seed(device=triton_device))
    for _ in range(3):
        assert torch.equal(ops.sample_pixels(labels, 4, 100, seed(device=triton_device)), first)


def assert_uniform(table):
    """Pearson's chi-square of counts that are multinomial with equal odds, two-sided at level ``TAIL``."""
    table = np.asarray(table, dtype=float).ravel()
    assert table.mean() >= 20  # else the statistic is not chi-square's
    statistic = ((table - table.mean()) ** 2 / table.mean()).sum()
    low, high = stats.chi2.ppf([TAIL / 2, 1 - TAIL / 2], len(table) - 1)
    assert low < statistic < high


def assert_uniform_draws(draws, pixels):
    """Each slot holds every pixel equally often, each two slots every ordered pair, each pixel is drawn equally often.

    Args:
        draws: (T, m) pixels of 0..pixels-1, each row without replacement.
    """
    trials, m = draws.shape
    for slot in range(m):
        assert_uniform(np.bincount(draws[:, slot], minlength=pixels))
    off_diagonal = ~np.eye(pixels, dtype=bool)
    for one, other in itertools.combinations(range(m), 2):
        pairs = np.bincount(draws[:, one] * pixels + draws[:, other], minlength=pixels**2).reshape(pixels, pixels)
        assert pairs.trace() == 0
        assert_uniform(pairs[off_diagonal])
    hits = np.bincount(draws.ravel(), minlength=pixels)
    share = m / pixels
    variance = trials * share * (1 - share) * pixels / (pixels - 1)  # of draws without replacement
    low, high = stats.chi2.ppf([TAIL / 2, 1 - TAIL / 2], pixels - 1)
    assert low < ((hits - trials * share) ** 2).sum() / variance < high


def test_kernels_draw_uniformly(triton_device):
    """256 classes of 8 pixels each are 256 draws at once; 1,536 draws of 3."""
    labels = (torch.arange(256 * 8, device=triton_device) * 5) % 256
    place = torch.arange(256 * 8) // 256  # of a pixel within its class
    draws = [ops.sample_pixels(labels, 256, 3, seed(21, t, triton_device), ignore_index=-1).cpu() for t in range(6)]
    assert_uniform_draws(place[torch.cat(draws)].numpy(), 8)


def test_operator_draws_uniformly():
    """20,480 draws of 4 of 12 pixels, which lie scattered; over steps of one seed, and over seeds at one step."""
    labels = torch.arange(1024 * 12).view(12, 1024) % 1024
    place = torch.arange(1024 * 12) // 1024
    with use_backend("reference"):
        for seeds in ([seed(4, t) for t in range(20)], [seed(t, 2**40) for t in range(20)]):
            draws = torch.cat([ops.sample_pixels(labels, 1024, 4, s, ignore_index=-1) for s in seeds])
            assert_uniform_draws(place[draws].numpy(), 12)


def test_steps_and_seeds_draw_independently():
    """Two steps, or two seeds as those of anchors and keys are, meet in every pair of pixels equally often."""
    labels = torch.arange(1024 * 12) % 1024
    place = torch.arange(1024 * 12) // 1024
    with use_backend("reference"):
        first = [place[ops.sample_pixels(labels, 1024, 1, seed(t, 0), ignore_index=-1)[:, 0]] for t in range(0, 24, 2)]
        later = [place[ops.sample_pixels(labels, 1024, 1, seed(t, 1), ignore_index=-1)[:, 0]] for t in range(0, 24, 2)]
        other = [
            place[ops.sample_pixels(labels, 1024, 1, seed(t + 1, 0), ignore_index=-1)[:, 0]] for t in range(0, 24, 2)
        ]
    for second in (later, other):
        pairs = torch.cat(first) * 12 + torch.cat(second)
        assert_uniform(np.bincount(pairs.numpy(), minlength=144))


def test_opcheck(triton_device):
    labels = torch.randint(0, 4, (2, 6, 5), device=triton_device)
    opcheck(torch.ops.in2nect.sample_pixels, (labels, 4, 3, seed(device=triton_device), 255))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("per_class", [1, 256, 5000])
def test_captured(per_class):
    """A captured draw follows the seed and the labels that lie in its inputs when it is replayed; nothing waits."""
    labels, seeds = make_labels((4, 512, 512), 7).cuda(), seed(1, 0, "cuda")
    with use_backend("triton"):
        ops.sample_pixels(labels, 7, per_class, seeds)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = ops.sample_pixels(labels, 7, per_class, seeds)
        for step in range(3):
            seeds.copy_(seed(1, step))
            labels.copy_(make_labels((4, 512, 512), 7))
            graph.replay()
            with use_backend("reference"):
                assert torch.equal(drawn, ops.sample_pixels(labels, 7, per_class, seeds))
