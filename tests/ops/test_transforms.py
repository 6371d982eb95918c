"""Forward-mode differentiation and the transforms of torch.func, against the reference, which is PyTorch throughout."""

import copy

import pytest
import torch
from torch.autograd import forward_ad

from ccnet_d2.layers import RCCA
from ccnet_d2.ops import compiled, criss_cross_attention

BACKENDS = ("auto", "matmul")
needs_library = pytest.mark.skipif(not compiled.is_available(), reason=str(compiled.unavailable_reason()))


def draw(batch=2, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, c, 4, 5, generator=generator, requires_grad=requires_grad) for c in (3, 3, 6)]


def attend(backend):
    return lambda query, key, value: criss_cross_attention(query, key, value, backend=backend)


def layers(backend, **options):
    """A layer, and the same of the reference backend."""
    torch.manual_seed(0)
    layer = RCCA(16, backend=backend, **options)
    torch.nn.init.constant_(layer.gamma, 0.7)
    reference = copy.deepcopy(layer)
    reference.backend = "reference"
    return layer, reference


def tangent_of(function, *inputs):
    """Of the result, where every input is its own tangent."""
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*(forward_ad.make_dual(x, x) for x in inputs))).tangent


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_of_the_op(backend):
    inputs = draw()
    wanted = tangent_of(attend("reference"), *inputs)
    assert wanted.norm() > 1
    torch.testing.assert_close(tangent_of(attend(backend), *inputs), wanted)
    torch.testing.assert_close(torch.func.jvp(attend(backend), tuple(inputs), tuple(inputs))[1], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_of_the_layer(backend):
    layer, reference = layers(backend)
    x = torch.randn(2, 16, 4, 5)
    wanted = tangent_of(reference, x)
    torch.testing.assert_close(tangent_of(layer, x), wanted)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (x,))[1], wanted)

    def of_weights(module):
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        names = list(parameters)
        return tangent_of(
            lambda *values: torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,)),
            *parameters.values(),
        )

    torch.testing.assert_close(of_weights(layer), of_weights(reference))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_image(backend):
    x = torch.randn(3, 16, 4, 5)

    def gradients(module):
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(parameters, image):
            return torch.func.functional_call(module, parameters, (image[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    got, wanted = (gradients(module) for module in layers(backend))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_by_transforms(backend):
    query, key, value = draw(batch=1)

    def hessian(backend):
        return torch.func.hessian(lambda q: attend(backend)(q, key, value).square().sum())(query)

    torch.testing.assert_close(hessian(backend), hessian("reference"), rtol=1e-3, atol=1e-3)


@needs_library
def test_the_compiled_operator_refuses():
    layer, _ = layers("compiled")
    x = torch.randn(1, 16, 4, 5)
    for function, inputs in ((attend("compiled"), draw()), (layer, (x,))):
        for run in (
            lambda f=function, i=inputs: tangent_of(f, *i),
            lambda f=function, i=inputs: torch.func.jvp(f, tuple(i), tuple(i)),
            lambda f=function, i=inputs: torch.func.grad(lambda *a: f(*a).sum())(*i),
        ):
            with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*use backend='matmul'"):
                run()
    layer(x)  # nothing of it stays behind


@needs_library
@pytest.mark.parametrize("of", ["op", "layer", "recomputing layer"])
def test_tangents_of_a_gradient_are_refused(of):
    if of == "op":
        function, inputs = attend("auto"), draw(requires_grad=True)
    else:
        function, _ = layers("auto", recompute=of == "recomputing layer")
        inputs = [torch.randn(1, 16, 4, 5, requires_grad=True)]
    out = function(*inputs)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"no forward-mode derivative.*use backend='matmul'"),
    ):
        torch.autograd.grad(out, inputs, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputing_layers_refuse(backend):
    layer, _ = layers(backend, recompute=True)
    x = torch.randn(1, 16, 4, 5)
    with pytest.raises(RuntimeError, match="use recompute=False"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="use recompute=False"):
        layer(forward_ad.make_dual(x, x))
