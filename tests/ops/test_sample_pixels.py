import pytest
import torch
from torch.library import opcheck

from in2nect import native, ops, reference, use_backend
from in2nect.ops.sample_pixels import hash_pixels


def seed(value=5, step=0):
    return torch.tensor([value, step])


@pytest.mark.parametrize("values", [(0, 0), (5, 1), (2**62 - 1, 2**40), (-3, 7)])
def test_hash_is_the_references(values):
    expected = reference.hash_pixels(1000, *values)
    assert hash_pixels(1000, torch.tensor(values)).tolist() == expected.tolist()


@pytest.mark.parametrize("per_class", [1, 7, 500])
@pytest.mark.parametrize("shape", [(2, 13, 11), (300,), (0,)])
def test_is_the_reference(cpu_backend, shape, per_class):
    labels = torch.randint(0, 6, shape)
    labels[labels == 3] = 255  # class 3 is absent
    drawn = ops.sample_pixels(labels, 6, per_class, seed())
    assert drawn.shape == (6, per_class)
    for row, expected in zip(drawn, reference.sample_pixels(labels, 6, per_class, seed()), strict=True):
        assert row[: len(expected)].tolist() == expected.tolist()
        assert (row[len(expected) :] == -1).all()


def test_draws_the_class_without_replacement(cpu_backend):
    labels = torch.randint(0, 4, (40, 50))
    drawn = ops.sample_pixels(labels, 4, 64, seed())
    for k, row in enumerate(drawn):
        assert (labels.flatten()[row] == k).all()
        assert len(row.unique()) == 64


def test_uniform(cpu_backend):
    """Chi-square over 40 pixels in 2,000 draws of 4: beyond its 99.99 % quantile for 39 degrees once in 10^4 seeds."""
    labels = torch.zeros(40, dtype=torch.uint8)
    hits = torch.zeros(40)
    for step in range(2000):
        hits[ops.sample_pixels(labels, 2, 4, seed(11, step))[0]] += 1
    expected = 2000 * 4 / 40
    chi_square = float(((hits - expected) ** 2 / expected).sum()) / (1 - 4 / 40)  # drawn without replacement
    assert 12.0 < chi_square < 81.0


def test_opcheck(cpu_backend):
    labels = torch.randint(0, 4, (2, 6, 5))
    opcheck(torch.ops.in2nect.sample_pixels, (labels, 4, 3, seed(), 255))


def test_errors():
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="per_class is 0"):
        ops.sample_pixels(labels, 2, 0, seed())
    with pytest.raises(ValueError, match=r"expected \(2,\) int64"):
        ops.sample_pixels(labels, 2, 1, torch.tensor([1]))


needs_cuda = pytest.mark.skipif(
    not (native.available("cuda") and torch.cuda.is_available()),
    reason=native.why_not("cuda") or "needs a CUDA device",
)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("per_class", [1, 7, 256, 5000])
@pytest.mark.parametrize("shape", [(3, 251, 123), (300,), (0,)])
def test_cuda_kernels_draw_the_references_pixels(shape, per_class, dtype):
    labels = torch.randint(0, 6, shape)
    labels[labels == 3] = 255
    labels = labels.to("cuda", dtype)
    with use_backend("cuda"):
        drawn = ops.sample_pixels(labels, 6, per_class, seed().cuda())
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample_pixels(labels, 6, per_class, seed().cuda()))


@pytest.mark.gpu
@needs_cuda
def test_cuda_kernels_in_a_graph():
    """New labels and a new step in the captured memory; every replay the reference's sample."""
    labels, seeds = torch.randint(0, 7, (4, 512, 512)).cuda(), seed().cuda()
    with use_backend("cuda"):
        ops.sample_pixels(labels, 7, 256, seeds)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = ops.sample_pixels(labels, 7, 256, seeds)
    for step in range(20):
        seeds.copy_(seed(1, step))
        labels.copy_(torch.randint(0, 7, (4, 512, 512)))
        graph.replay()
        with use_backend("reference"):
            assert torch.equal(drawn, ops.sample_pixels(labels, 7, 256, seeds))
