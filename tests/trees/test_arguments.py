"""Arguments of `quantize` and `quantize_params` that can't be meant, also where nothing would be quantized."""

import jax.numpy as jnp
import pytest

import jint8

PARAMS = {"dense": {"kernel": jnp.ones((4, 3))}}
NONE = jint8.Config(scheme="none")


@pytest.mark.parametrize("config", [jint8.Config(), NONE], ids=["int8", "none"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plan": 5}, TypeError, "plan"),
        ({"skip": 5}, TypeError, "Expected a path pattern, an iterable of them or a predicate, got 5"),
        ({"skip": {"kernel": False}}, TypeError, "Expected a path pattern, .*, got {'kernel': False}"),
        ({"include": [1]}, TypeError, "Expected path patterns to be strings, got 1"),
        ({"outliers": {"nope": [1]}}, ValueError, "Expected the outliers's paths to be in the parameters, got nope"),
        ({"plan": {"nope": (0,)}}, ValueError, "Expected the plan's paths to be in the parameters, got nope"),
    ],
)
def test_quantize_params(options, error, message, config):
    with pytest.raises(error, match=message):
        jint8.quantize_params(PARAMS, config=config, **options)


def test_axes_that_are_contracted_and_stacked():
    with pytest.raises(ValueError, match=r"Expected contracted and stacked axes to differ, got \[0\] in both"):
        jint8.quantize(jnp.ones((4, 3)), contract_axes=(0,), stack_axes=(0,))


def test_a_plan_names_the_leaf_whose_axes_are_wrong():
    with pytest.raises(ValueError, match="dense/kernel: Expected at least one contracted axis, got none"):
        jint8.quantize_params(PARAMS, plan={"dense/kernel": ()})
