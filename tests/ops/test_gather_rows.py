import importlib

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from in2nect import ops, reference
from tests.samples import clustered

module = importlib.import_module("in2nect.ops.gather_rows")  # its name in the package is the function


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("size", [(5, 4), (10, 8), (17, 9), (3, 2)])
@pytest.mark.parametrize("normalize", [False, True])
def test_is_the_upsampled_row(cpu_backend, size, layout, normalize):
    features, _ = clustered(3, 6, layout=layout)
    features.requires_grad_()
    indices = torch.randint(0, 2 * size[0] * size[1], (50,))  # some pixels twice
    indices[::7] = -1
    rows = reference.label_resolution_rows(features, *size).permute(0, 2, 3, 1).flatten(0, 2)
    expected = (reference.unit_rows(rows) if normalize else rows)[indices] * (indices >= 0)[:, None]
    ours = ops.gather_rows(features, indices, *size, normalize=normalize)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(ours)
    grads = [torch.autograd.grad(x, features, upstream)[0] for x in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_and_opcheck(cpu_backend, normalize):
    features, _ = clustered(3, 4, features=(3, 3))
    features.requires_grad_()
    indices = torch.tensor([0, 5, 5, -1, 71, 30])
    assert gradcheck(lambda z: ops.gather_rows(z, indices, 6, 6, normalize=normalize), features)
    opcheck(torch.ops.in2nect.gather_rows, (features, indices, 6, 6, normalize))
    grad = torch.randn(6, 4, dtype=torch.float64)
    opcheck(torch.ops.in2nect.gather_rows_backward, (grad, features.detach(), indices, 6, 6, normalize))


def test_large_grids_keep_their_pixels(cpu_backend):
    """Beyond 2^23 pixels along an axis a position no longer fits into float32."""
    pixel = torch.tensor([2**23 + 1, 2**24 + 1])
    lower, _, weight = module._neighbours(pixel, 2**25, 2**25, torch.float32)
    assert lower.tolist() == pixel.tolist()
    assert weight.tolist() == [0.0, 0.0]
    rows = torch.arange(2**23 + 8, dtype=torch.float32)[None, None, None]  # as (N, 1) features are seen
    assert ops.gather_rows(rows, pixel[:1], 1, 2**23 + 8).tolist() == [[2.0**23 + 1]]


def test_no_index(cpu_backend):
    features = torch.randn(1, 4, 3, 3, requires_grad=True)
    rows = ops.gather_rows(features, torch.empty(0, dtype=torch.int64), 6, 6)
    assert rows.shape == (0, 4)
    assert not torch.autograd.grad(rows.sum(), features)[0].any()


def test_low_precision_accumulates_in_float32(cpu_backend):
    features = torch.randn(1, 4, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    rows = ops.gather_rows(features, torch.arange(36), 6, 6)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(
        rows, reference.label_resolution_rows(features.float(), 6, 6).permute(0, 2, 3, 1).flatten(0, 2)
    )
    assert torch.autograd.grad(rows.sum(), features)[0].dtype == torch.bfloat16


def test_errors():
    with pytest.raises(ValueError, match=r"expected \(B, d, h, w\) and \(M,\) int64"):
        ops.gather_rows(torch.zeros(3, 4), torch.arange(3), 1, 1)
