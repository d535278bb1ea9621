"""Heads in front of the contracted axis, scanned over layers that lie on any axis of the parameters."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jint8

LAYERS = 3


class Block(nn.Module):
    """`[heads, d, size]` and `[heads, size, d]`, as some attention layers have their kernels."""

    heads: int
    size: int

    @nn.compact
    def __call__(self, x, _):
        init = nn.initializers.lecun_normal()
        up = self.param("up", init, (self.heads, x.shape[-1], self.size))
        down = self.param("down", init, (self.heads, self.size, x.shape[-1]))
        y = jnp.einsum("bhk,hkd->bd", jnp.einsum("bd,hdk->bhk", x, up), down)
        return x + y, None


@pytest.mark.first_case
@pytest.mark.parametrize("given", [lambda plan: plan, dict], ids=["plan", "plain_mapping"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize(("d", "heads", "size"), [(4, 4, 4), (8, 2, 6)], ids=["cube", "distinct"])
def test_scan_over_heads(axis, d, heads, size, given):
    scan = nn.scan(Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=LAYERS)
    module, x = scan(heads=heads, size=size), cases.normal(2, d, seed=1)
    params = module.init(jax.random.key(0), x, None)
    plan = jint8.plan(module.apply, params, x, None)
    int8 = jint8.quantize_params(params, plan=given(plan))
    for name in ("up", "down"):
        w = int8["params"][name]
        assert plan.stacked[name] == (axis % 4,)
        assert w.shape == params["params"][name].shape
        assert w.q.shape[axis] == LAYERS
    got = jint8.apply(module.apply)(int8, x, None)[0]
    # the same layers one by one, of the floats that each int8 weight stands for
    want = np.asarray(x, np.float64)
    for layer in range(LAYERS):
        up, down = (
            np.take(np.asarray(int8["params"][name].dequantize(), np.float64), layer, axis) for name in ("up", "down")
        )
        want = want + np.einsum("bd,hdk,hke->be", want, up, down)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.015
