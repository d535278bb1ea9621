"""The int8 key-value cache against float64 NumPy: what it holds, and what its products give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_files import config as family_config

from jint8.models import Int8Cache, LayerCache, _cache, make_cache, model_config

B, HEADS, SLOTS = 2, 3, 24
STEP_OF_DIGITS = 32512  # 127 * 255 + 127: what two digits count up to
DIMENSIONS = [8, 24, 64, 80, 96]
BLOCKS = {7: 1, 8: 8, 24: 8, 64: 64, 80: 16, 96: 32, 128: 128}


def hadamard(d):
    """float64 `[d, d]`, by the parity of the bits that row and column have in common."""
    size = BLOCKS[d]
    parity = np.array([[(i & j).bit_count() % 2 for j in range(size)] for i in range(size)])
    return np.kron(np.eye(d // size), (1 - 2 * parity) / np.sqrt(size))


def keys_and_values(s, d, seed=0):
    """Float32 keys `[B, HEADS, s, d]` with a bias and a large channel, as some models have, and values."""
    rng = np.random.default_rng(seed)
    key = rng.standard_normal((B, HEADS, s, d)) + 5 * rng.standard_normal((1, HEADS, 1, d))
    key[..., 1] *= 20
    value = rng.standard_normal((B, HEADS, s, d)) * rng.uniform(0.1, 3, (B, HEADS, s, 1))
    return key.astype(np.float32), value.astype(np.float32)


def own(key, value):
    return LayerCache(jnp.asarray(key).swapaxes(2, 3), jnp.asarray(value))


def empty(d, softcap=0.0):
    config = model_config(family_config("llama"))
    sizes = {"num_kv_heads": HEADS, "head_dim": d, "num_layers": 1, "attention_softcap": softcap}
    return make_cache(config.__class__(**{**vars(config), **sizes}), B, SLOTS, jnp.int8)[0]


@jax.jit
def updated(cache, own, slot=0, first=None):
    return cache.updated(own, slot, first)


@jax.jit
def scores(cache, q):
    """Of `q[b, kv_heads, rows, d]`, each row a group of its own."""
    q, held = cache.prepared(q[:, :, :, None])
    return held.scores(q[:, :, :, 0])


def weighted(cache, weights):
    return jax.jit(lambda cache, weights: cache.weighted(weights, jnp.float32))(cache, weights)  # traced at each call


def floats(x):
    return np.asarray(x, np.float64)


def shifts(turned, slot, first, before):
    """The mean of the first eight real keys of each row that begins in this call, one row and head at a time."""
    after = before.copy()
    for row in range(B):
        begin = first[row] - slot
        if 0 <= begin < turned.shape[2]:
            after[row] = turned[row, :, begin : begin + 8].mean(axis=1)
    return after


# The slots at which calls end, and where each row's padding ends.
CALLS = {
    "at_once": ([20], [0, 0]),
    "left_padding": ([20], [0, 5]),
    "fewer_than_eight": ([20], [0, 17]),
    "a_row_of_one_token": ([16, 17], [15, 0]),
    "a_row_that_begins_later": ([8, 16, 24], [0, 11]),
    "a_row_that_begins_with_a_chunk": ([8, 16], [8, 0]),
    "one_token_at_a_time": ([1, 2, 3, 4], [0, 2]),
}


@pytest.mark.first_case
@pytest.mark.parametrize(("ends", "first"), CALLS.values(), ids=CALLS)
def test_entries(ends, first):
    d = 24
    key, value = keys_and_values(ends[-1], d)
    turned = floats(key) @ hadamard(d)
    cache, shift, slot = empty(d), np.zeros((B, HEADS, d)), 0
    padded = None if first == [0, 0] else jnp.asarray(first, jnp.int32)
    for end in ends:
        cache = updated(cache, own(key[:, :, slot:end], value[:, :, slot:end]), slot, padded)
        shift = shifts(turned[:, :, slot:end], slot, first, shift)
        slot = end
    np.testing.assert_allclose(cache.shift, shift, atol=1e-5 * np.abs(turned).max())
    for row in range(B):
        real = slice(first[row], slot)
        want = turned[row, :, real] - shift[row][:, None]
        scale = floats(cache.key_scale[row, :, real])
        np.testing.assert_allclose(scale, np.abs(want).max(axis=-1) / 127, rtol=1e-4)
        got = floats(cache.key[row, :, real]) * scale[..., None]
        assert np.all(np.abs(got - want) <= (0.5 + 2e-3) * scale[..., None])
        scale = np.abs(value[row, :, real]).max(axis=-1) / np.float32(127)
        np.testing.assert_array_equal(cache.value_scale[row, :, real], scale)
        np.testing.assert_array_equal(cache.value[row, :, real], np.rint(value[row, :, real] / scale[..., None]))
    for left in (cache.key, cache.key_scale, cache.value, cache.value_scale):
        assert not np.any(left[:, :, slot:])


@pytest.mark.parametrize("count", [1, 2, SLOTS])
@pytest.mark.parametrize("axis", [2, 3])
def test_only_the_slots_of_a_call_are_written(count, axis):
    """Also the last one, and in a cache of one slot."""
    for slots in (1, SLOTS):
        before = np.random.default_rng(0).standard_normal((B, HEADS, slots, slots)).astype(np.float32)
        for slot in {0, 7 % slots, slots - 1} if count == 1 else {0, slots - count} if slots == SLOTS else {}:
            new = np.full_like(before, 9).take(range(count), axis)
            want = before.copy()
            want[(slice(None),) * axis + (slice(slot, slot + count),)] = 9
            np.testing.assert_array_equal(jax.jit(_cache.write, static_argnums=3)(before, new, slot, axis), want)


def test_no_shift_under_a_softcap():
    key, value = keys_and_values(20, 64)
    cache = updated(empty(64, softcap=50.0), own(key, value))
    assert cache.shift is None
    want = floats(key) @ hadamard(64)
    scale = floats(cache.key_scale[:, :, :20, None])
    assert np.all(np.abs(floats(cache.key[:, :, :20]) * scale - want) <= (0.5 + 2e-3) * scale)


@pytest.mark.first_case
@pytest.mark.parametrize("d", [7, *DIMENSIONS])
def test_softmax_does_not_see_the_changes_of_coordinates(d):
    rng = np.random.default_rng(1)
    q = rng.standard_normal((B, HEADS, 2, d)).astype(np.float32)
    key, _ = keys_and_values(20, d)
    turned = _cache.turned(jnp.asarray(key))
    shift = _cache.constant_vector(turned, jnp.zeros((B, HEADS, d)), 0, None)
    assert np.all(np.abs(shift) > 0)
    changed = floats(_cache.turned(jnp.asarray(q))) @ floats(turned - shift[:, :, None]).swapaxes(2, 3)
    want = floats(q) @ floats(key).swapaxes(2, 3)
    weights = [np.exp(s - s.max(-1, keepdims=True)) for s in (changed, want)]
    np.testing.assert_allclose(*(w / w.sum(-1, keepdims=True) for w in weights), atol=2e-5)
    np.testing.assert_allclose(_cache.turned(jnp.asarray(q)), floats(q) @ hadamard(d), atol=1e-6 * d)


@pytest.mark.first_case
@pytest.mark.parametrize(("d", "rows"), [(24, 1), (64, 3), (80, 2)])
def test_products_are_those_of_the_entries(d, rows):
    """Within half a step of two digits, which is next to nothing beside the steps of the entries."""
    rng = np.random.default_rng(2)
    cache = updated(empty(d), own(*keys_and_values(SLOTS, d)))
    q = rng.standard_normal((B, HEADS, rows, d)).astype(np.float32)
    entries = floats(cache.key) * floats(cache.key_scale)[..., None]
    half_step = np.abs(q).max(-1, keepdims=True) / STEP_OF_DIGITS / 2
    bound = half_step * np.abs(entries).sum(-1)[:, :, None] + 1e-5
    got = jax.jit(Int8Cache.scores)(cache, q)  # of queries that are in the keys' coordinates
    assert np.all(np.abs(floats(got) - floats(q) @ entries.swapaxes(2, 3)) <= bound)
    weights = rng.dirichlet(np.ones(SLOTS), (B, HEADS, rows)).astype(np.float32)
    scaled = floats(weights) * floats(cache.value_scale)[:, :, None]
    bound = scaled.max(-1, keepdims=True) / STEP_OF_DIGITS / 2 * np.abs(floats(cache.value)).sum(2)[:, :, None] + 1e-6
    got = weighted(cache, weights)
    assert np.all(np.abs(floats(got) - scaled @ floats(cache.value)) <= bound)
    assert jax.eval_shape(lambda: cache.weighted(weights, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.first_case
@pytest.mark.parametrize("d", [24, 64])
def test_nearer_to_float_than_without_the_changes_of_coordinates(d, monkeypatch):
    """Of keys with a bias and a large channel, as Qwen has."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((B, HEADS, 2, d)).astype(np.float32)
    key, value = keys_and_values(SLOTS, d)
    want = floats(q) @ floats(key).swapaxes(2, 3)
    centred = lambda scores: scores - scores.mean(-1, keepdims=True)  # softmax doesn't see their mean

    def error():
        jax.clear_caches()  # of programs with the changes of coordinates
        return np.linalg.norm(centred(floats(scores(updated(empty(d), own(key, value)), q))) - centred(want))

    both = error()
    monkeypatch.setattr(_cache, "turned", lambda x: x)
    shifted = error()
    monkeypatch.setattr(_cache, "constant_vector", lambda key, before, slot, first: before)
    assert both < shifted < error()
    assert both < 0.01 * np.linalg.norm(centred(want))


def test_sums_that_int32_does_not_hold_are_split(monkeypatch):
    assert 127**2 * _cache.LONGEST_SUM < 2**31 <= 127**2 * (_cache.LONGEST_SUM + 1)
    cache = updated(empty(8), own(*keys_and_values(SLOTS, 8)))
    weights = np.random.default_rng(4).dirichlet(np.ones(SLOTS), (B, HEADS, 2)).astype(np.float32)
    want = weighted(cache, weights)
    lengths, product = [], _cache.digit_product
    monkeypatch.setattr(
        _cache, "digit_product", lambda x, *args, **kw: lengths.append(x.shape[-1]) or product(x, *args, **kw)
    )
    monkeypatch.setattr(_cache, "LONGEST_SUM", 10)
    np.testing.assert_allclose(weighted(cache, weights), want, rtol=1e-3, atol=1e-4)
    assert lengths == [10, 10, 4]


def test_a_key_that_is_not_finite_shows():
    key, value = keys_and_values(SLOTS, 8)
    key[0, 1, 12, 3], value[1, 2, 5, 0] = np.nan, np.inf
    cache = updated(empty(8), own(key, value))
    found = scores(cache, jnp.ones((B, HEADS, 1, 8)))
    assert np.argwhere(np.isnan(found)).tolist() == [[0, 1, 0, 12]]
    out = weighted(cache, jnp.ones((B, HEADS, 1, SLOTS)))
    assert np.argwhere(np.isnan(out).any(-1)).tolist() == [[1, 2, 0]]


def test_a_made_cache():
    cache = empty(24)
    assert isinstance(cache, Int8Cache)
    assert (cache.length, cache.key.shape, cache.key_scale.shape) == (SLOTS, (B, HEADS, SLOTS, 24), (B, HEADS, SLOTS))
    assert [leaf.dtype for leaf in jax.tree.leaves(cache)] == [jnp.int8, jnp.float32] * 2 + [jnp.float32]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(cache))
    config = model_config(family_config("llama"))
    assert isinstance(make_cache(config, 1, 16, jnp.bfloat16)[0], LayerCache)
    with pytest.raises(TypeError, match="Expected a cache of floats or int8, got int16"):
        make_cache(config, 1, 16, jnp.int16)


@pytest.mark.slow
def test_many_queries_read_what_few_read():
    """They read it dequantized, few by int8 products."""
    cache = updated(empty(24), own(*keys_and_values(SLOTS, 24)))
    rng = np.random.default_rng(5)
    q = rng.standard_normal((B, HEADS, 2, _cache.FEW_QUERIES + 1, 24)).astype(np.float32)
    turned, held = cache.prepared(q)
    assert isinstance(held, LayerCache)
    few, same = cache.prepared(q[:, :, :, :-1])
    assert same is cache
    rows = lambda x: x.reshape(B, HEADS, -1, x.shape[-1])
    want = cache.scores(rows(few)).reshape(*few.shape[:4], SLOTS)
    got = held.scores(rows(turned)).reshape(*turned.shape[:4], SLOTS)
    np.testing.assert_allclose(got[:, :, :, :-1], want, atol=1e-3 * np.abs(want).max())
    weights = rng.dirichlet(np.ones(SLOTS), (B, HEADS, 2)).astype(np.float32)
    want = weighted(cache, weights)
    np.testing.assert_allclose(weighted(held, weights), want, atol=1e-3 * np.abs(want).max())
    turned, held = cache.prepared(q.astype(jnp.bfloat16))
    assert (turned.dtype, held.key.dtype, held.value.dtype) == (jnp.bfloat16,) * 3


def test_many_small_weights_beside_a_large_one():
    """As attention has them beside a sink: each counts for a hundred-thousandth, and together for a tenth."""
    length = 8192
    value = np.random.default_rng(0).integers(20, 127, (1, 1, length, 8)).astype(np.int8)
    keys, scales = jnp.zeros(value.shape, jnp.int8), jnp.ones((1, 1, length))
    cache = Int8Cache(keys, scales, jnp.asarray(value), scales, None)
    weights = np.full((1, 1, 1, length), 0.1 / (length - 1))
    weights[..., 0] = 0.9
    got = weighted(cache, jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(got, weights @ value.astype(np.float64), rtol=3e-3)  # not a tenth of it
