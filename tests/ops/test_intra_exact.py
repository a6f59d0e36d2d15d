import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from in2nect import ops, reference
from tests.samples import clustered


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_value_and_gradient(cpu_backend, layout, normalize):
    features, labels = clustered(5, 6, layout=layout, absent=(1,), singleton=4)
    features[0, :, 0, 0] = 0.0
    features.requires_grad_()
    options = {"temperature": 0.6, "normalize": normalize}
    loss = ops.intra_exact(features, labels, 5, **options)
    expected = reference.intra_class_loss(features, labels, 5, estimator="exact", **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, features)[0] for value in (loss, expected)))


def test_gradcheck(cpu_backend):
    features, labels = clustered(3, 4, features=(3, 3), singleton=2)
    assert gradcheck(lambda z: ops.intra_exact(z, labels, 3), features.requires_grad_())


def test_opcheck(cpu_backend):
    features, labels = clustered(4, 6)
    opcheck(torch.ops.in2nect.intra_exact, (features.requires_grad_(), labels, 4, 255, 0.7, True))
    outputs = [t.detach() for t in torch.ops.in2nect.intra_exact(features, labels, 4, 255, 0.7, True)]
    arguments = (outputs[0], features.detach(), labels, *outputs[1:], 255, 0.7, True)
    opcheck(torch.ops.in2nect.intra_exact_backward, arguments)


def test_the_gradient_is_rounded_once(cpu_backend):
    """The gradients of log D and of the positive term cancel in part: added in float32, no bits of them are lost."""
    features, labels = clustered(5, 16, features=(12, 12), dtype=torch.bfloat16, spread=0.2)
    features.requires_grad_()
    (grad,) = torch.autograd.grad(ops.intra_exact(features, labels, 5), features)
    wide = features.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.intra_class_loss(wide, labels, 5, estimator="exact"), wide)
    once = (expected.bfloat16().double() - expected).norm()
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - expected).norm() <= 1.1 * once


def test_second_derivative_is_refused(cpu_backend):
    features, labels = clustered(3, 4)
    (grad,) = torch.autograd.grad(ops.intra_exact(features.requires_grad_(), labels, 3), features, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"in2nect\.reference"):
        grad.sum().backward()


def test_errors():
    features, labels = clustered(3, 4, labels=(10, 8))
    with pytest.raises(ValueError, match=r"\(2, 4, 5, 4\) and labels \(2, 10, 8\); expected one grid"):
        ops.intra_exact(features, labels, 3)
    with pytest.raises(ValueError, match="temperature is -1"):
        ops.intra_exact(features, labels[:, ::2, ::2], 3, temperature=-1.0)
    with pytest.raises(ValueError, match=r"labels hold 7 \(40 pixels\)"):
        ops.intra_exact(features, torch.full_like(labels[:, ::2, ::2], 7), 3)
