"""The derivatives of a matmul with a weight, against JAX's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.matmul import multiply

CASES = {
    "BLD,DF->BLF": ((2, 3, 4), (4, 5)),
    "BLD,DHN->BLHN": ((2, 3, 4), (4, 5, 6)),
    "BLHN,HND->BLD": ((2, 3, 5, 6), (5, 6, 4)),
    "ESD,EDF->ESF": ((2, 3, 4), (2, 4, 5)),
}


def losses(equation, *arrays):
    own = lambda x, w: jnp.sum(jnp.sin(multiply(equation, x, w)))  # noqa: E731
    of_jax = lambda x, w: jnp.sum(jnp.sin(jnp.einsum(equation, x, w)))  # noqa: E731
    return (jax.jit(jax.grad(each, (0, 1))).trace(*arrays) for each in (own, of_jax))


@pytest.mark.parametrize("equation", CASES)
def test_the_derivatives_are_those_of_the_einsum(equation):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in CASES[equation]]
    own, of_jax = (traced.lower().compile()(*arrays) for traced in losses(equation, *arrays))
    for gradient, expected in zip(own, of_jax, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", CASES)
def test_gpus_get_the_products_of_jax_itself(equation):
    """On them XLA hides fewer transfers behind others; a CPU gets x^T g, for which it transposes less."""

    def products(traced, platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return sorted(re.findall(r"dot_general .*?: (\(.*)", text))

    own, of_jax = losses(equation, *(jnp.zeros(shape) for shape in CASES[equation]))
    assert products(own, "cuda") == products(of_jax, "cuda") != []
    assert products(own, "cpu") != products(of_jax, "cpu")
