import importlib

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from in2nect import ops, reference
from tests.samples import clustered

module = importlib.import_module("in2nect.ops.class_sums")  # its name in the package is the function


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("size", [(5, 4), (10, 8), (7, 9)])
def test_sums_counts_and_squares(cpu_backend, size, normalize, squares):
    features, labels = clustered(4, 6, labels=size, absent=(2,))
    features.requires_grad_()
    sums, counts, squared = ops.class_sums(features, labels, 4, normalize=normalize, squares=squares)
    z, y = reference.labelled_rows(features, labels, 4, ignore_index=255, resolution="label")
    rows = reference.unit_rows(z) if normalize else z
    for k in range(4):
        torch.testing.assert_close(sums[k], rows[y == k].sum(0), rtol=1e-12, atol=1e-12)
        assert counts[k] == (y == k).sum()
        if squares:
            torch.testing.assert_close(squared[k], rows[y == k].square().sum(), rtol=1e-12, atol=1e-12)
    assert squared.shape == ((4,) if squares else (0,))

    def outputs(z):
        sums, _, squared = ops.class_sums(z, labels, 4, normalize=normalize, squares=squares)
        return (sums, squared) if squares else sums

    assert gradcheck(outputs, features)
    if not normalize and not squares:
        assert gradgradcheck(outputs, features)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_opcheck(cpu_backend, resolution, normalize):
    features, labels = clustered(4, 6, labels=(10, 8))
    settings = (255, resolution, normalize)
    opcheck(torch.ops.in2nect.class_sums, (features.requires_grad_(), labels, 4, *settings, True))
    grads = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    opcheck(torch.ops.in2nect.class_sums_backward, (*grads, features.detach(), labels, *settings))
    opcheck(torch.ops.in2nect.class_sums_backward, (grads[0], None, features.detach(), labels, *settings))


@pytest.mark.parametrize(("cells", "pixels"), [(3, 12), (5, 7), (4, 4), (6, 3), (1, 5)])
def test_adjoint_by_matrices(cells, pixels):
    """What stands in for torch's own adjoint in deterministic mode on CUDA."""
    grad = torch.randn(2, 3, pixels, pixels + 2, dtype=torch.float64)
    expected = module._downsample_adjoint(grad, cells, cells + 1)
    rows, columns = module._axis_weights(pixels, cells, grad), module._axis_weights(pixels + 2, cells + 1, grad)
    torch.testing.assert_close(rows.T @ grad @ columns, expected)


def test_squares_alone_have_a_gradient(cpu_backend):
    features, labels = clustered(4, 6)
    squared = ops.class_sums(features.requires_grad_(), labels, 4, squares=True)[2]
    (grad,) = torch.autograd.grad(squared.sum(), features)
    expected = 2 * features.detach() * (labels < 4)[:, None]
    torch.testing.assert_close(grad, expected)


def test_many_classes(cpu_backend):
    features, labels = torch.randn(2, 3, 30, 30), torch.randint(0, 256, (2, 30, 30)).to(torch.uint8)
    sums, counts, _ = ops.class_sums(features, labels, 256, ignore_index=-1)
    assert counts.tolist() == torch.bincount(labels.flatten().long(), minlength=256).tolist()
    torch.testing.assert_close(sums.sum(0), features.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_second_derivative_of_unit_rows_is_refused(cpu_backend):
    features, labels = clustered(4, 6)
    sums = ops.class_sums(features.requires_grad_(), labels, 4, normalize=True)[0]
    (grad,) = torch.autograd.grad(sums.square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="once differentiable"):
        grad.sum().backward()
