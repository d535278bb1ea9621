"""`Plan` as a mapping: printed, edited, made of other mappings."""

import jax.numpy as jnp
import pytest

import jint8

X = jnp.ones((2, 3, 4))  # (b, s, d)
TOKENS = jnp.zeros((2, 3), jnp.int32)


@pytest.fixture
def found():
    params = {
        "embed": jnp.ones((7, 4)),
        "layers": [{"up": jnp.ones((4, 8)), "bias": jnp.ones(8)} for _ in range(2)],
        "experts": jnp.ones((3, 8, 5)),
    }

    def apply(params, tokens):
        x = params["embed"][tokens]
        y = sum(x @ layer["up"] + layer["bias"] for layer in params["layers"])
        return jnp.einsum("bsd,edf->bsef", y, params["experts"]), [y @ expert for expert in params["experts"]]

    return jint8.plan(apply, params, TOKENS)


def test_mapping(found):
    assert dict(found) == {"experts": (1,), "layers/0/up": (0,), "layers/1/up": (0,)}
    assert found.shapes["experts"] == (3, 8, 5)
    assert found.get("embed") is None
    with pytest.raises(KeyError):
        found["embed"]


def test_printed_table_is_aligned(found):
    assert (
        str(found)
        == """\
contracted   shape      axes  stacked
experts      (3, 8, 5)  (1,)
layers/0/up  (4, 8)     (0,)
layers/1/up  (4, 8)     (0,)

skipped        shape   reason
embed          (7, 4)  embedding lookup
layers/0/bias  (8,)    elementwise (add)
layers/1/bias  (8,)    elementwise (add)"""
    )
    assert repr(found) == "Plan(3 contracted, 3 skipped)"


def test_without(found):
    edited = found.without("layers/1", lambda path: path == "experts")
    assert dict(edited) == {"layers/0/up": (0,)}
    assert edited.skipped["experts"] == edited.skipped["layers/1/up"] == "left out"
    assert set(edited.stacked) == {"layers/0/up"}
    assert len(found) == 3
    assert found.without("lm_head") == found


def test_with_adds_and_corrects(found):
    edited = found.with_({"embed": (-1,), "up": [1]})
    assert dict(edited) == {"embed": (1,), "experts": (1,), "layers/0/up": (1,), "layers/1/up": (1,)}
    assert set(edited.skipped) == {"layers/0/bias", "layers/1/bias"}
    assert "embed" not in found


def test_with_takes_an_axis_out_of_the_stacked_ones():
    plan = jint8.plan(lambda p, x: x @ p["w"][0], {"w": jnp.ones((5, 4, 8))}, X)
    assert plan.stacked == {"w": (0,)}
    assert plan.with_({"w": (0, 1)}).stacked == {"w": ()}


def test_with_other_axes_forgets_the_stacked_ones():
    plan = jint8.plan(lambda p, x: x @ p["w"][0], {"w": jnp.ones((5, 4, 8))}, X)
    assert plan.with_({"w": (1,)}).stacked == {"w": (0,)}
    changed = plan.with_({"w": (2,)})
    assert changed.stack_axes("w", 3) is None
    params = {"w": jnp.ones((5, 4, 8))}
    with pytest.raises(ValueError, match="Expected a plan that says which axes are stacked"):
        jint8.quantize_params(params, plan=changed, config=jint8.Config(scheme="absmax"))


def test_with_claims_nothing_about_stacked_axes():
    plan = jint8.Plan({}, shapes={"w": (5, 4, 8)}).with_({"w": (1,)})
    assert plan.stack_axes("w", 3) is None


def test_of_any_mapping(found):
    assert jint8.Plan.of(found) is found
    plain = jint8.Plan.of({"experts": [-2], "up": 0})
    assert dict(plain) == {"experts": (-2,), "up": (0,)}
    assert found.stack_axes("experts", 3) == plain.stack_axes("up", 2) == ()
    assert plain.stack_axes("experts", 3) is None
    with pytest.raises(TypeError, match="Expected a plan to be a mapping from path to contracted axes, got list"):
        jint8.Plan.of(["up"])


def test_with_quantizes_a_tied_embedding():
    plan = jint8.plan(lambda p, i: p["embed"][i] @ p["embed"].T, {"embed": jnp.ones((7, 4))}, TOKENS)
    edited = plan.with_(plan.tied)
    assert edited == {"embed": (1,)}
    assert (edited.tied, edited.skipped) == ({}, {})


def test_with_takes_a_path_before_a_pattern():
    plan = jint8.Plan({}, shapes={"embed/w": (7, 4), "decoder/embed/w": (7, 4)})
    assert plan.with_({"embed/w": (1,)}) == {"embed/w": (1,)}
    assert plan.with_({"embed": (1,)}) == {"embed/w": (1,), "decoder/embed/w": (1,)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"lm_head": (0,)}, "'lm_head'"),
        ({"embed": (2,)}, "'embed' with shape"),
        ({"embed": (0, -2, 1)}, "'embed' with shape"),
        ({"embed": ()}, "'embed' with shape"),
        ({"bias": (0,)}, "'layers/0/bias' with shape"),
    ],
    ids=["no such leaf", "no such axis", "all axes", "no axis", "vector"],
)
def test_with_rejects(found, edit, message):
    with pytest.raises(ValueError, match=message):
        found.with_(edit)


def test_equality(found):
    same = jint8.Plan(dict(found), found.stacked, found.skipped, found.tied, found.shapes)
    assert found == same
    assert found == dict(found)
    assert found != found.without("experts")
    assert found.without("experts") != jint8.Plan(dict(found.without("experts")))
    with pytest.raises(TypeError, match="unhashable"):
        hash(found)
