"""No kernel reads or writes beyond its arrays, and no masked lane leaks into a result.

Triton on JAX up to 0.11 checks nothing at an array's edge, and interpret mode hides that. Here every load and store
goes through versions that know the bounds: one unmasked element beyond them turns all that is loaded or stored into
poison. The last tests break the kernels on purpose, to show that this finds it.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.test_kernels import CASES, PATHS, QUICK, THRESHOLD, check

import pallas_kernels as pk
from pallas_kernels.triton import _pallas

POISON = {"f": jnp.nan, "i": 113, "V": jnp.nan}  # bfloat16 has kind V


def inside(ref, index):
    ok = True
    for i, size in zip(index, ref.shape, strict=True):
        ok = ok & (i >= 0) & (i < size)
    return ok


@pytest.fixture
def poisoned(monkeypatch):
    load, store = _pallas.load, _pallas.store

    def checked_load(ref, index, *, mask=None, other=0):
        value = load(ref, index, mask=inside(ref, index))
        mask = jnp.ones(value.shape, bool) if mask is None else jnp.broadcast_to(mask, value.shape)
        poison = jnp.asarray(POISON[np.dtype(ref.dtype).kind], value.dtype)
        value = jnp.where(mask, value, jnp.asarray(other, value.dtype))
        return jnp.where(jnp.any(mask & ~inside(ref, index)), poison, value)

    def checked_store(ref, index, value, *, mask):
        poison = jnp.asarray(POISON[np.dtype(ref.dtype).kind], value.dtype)
        value = jnp.where(jnp.any(mask & ~inside(ref, index)), poison, value)
        store(ref, index, value, mask=mask & inside(ref, index))

    monkeypatch.setattr(_pallas, "load", checked_load)
    monkeypatch.setattr(_pallas, "store", checked_store)
    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()


def run(name, path):
    def product(x, w, w_scale, bias):
        config = PATHS[path]
        return pk.llm_int8_matmul(x, w, w_scale, bias=bias, threshold=THRESHOLD, config=config, interpret=True)

    return jax.jit(product, compiler_options=QUICK)(*CASES[name])


@pytest.mark.first_case
@pytest.mark.parametrize("path", ["few_rows_split", "triton", "triton_panels"])
def test_nothing_beyond_the_bounds(poisoned, path):
    check(run("tails_everywhere", path), CASES["tails_everywhere"], THRESHOLD, "batch")


def drop_clamp(patch):
    patch.setattr(_pallas, "clamped_rows", lambda block, size, limit: _pallas.span(block * size, size))


def drop_load_masks(patch):
    load = _pallas.load
    patch.setattr(_pallas, "load", lambda ref, index, *, mask=None, other=0: load(ref, index))


def drop_store_masks(patch):
    store = _pallas.store
    patch.setattr(
        _pallas, "store", lambda ref, index, value, *, mask: store(ref, index, value, mask=jnp.ones_like(mask))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "break_it"),
    [("few_rows", drop_load_masks), ("few_rows", drop_store_masks)]
    + [("triton", broken) for broken in (drop_clamp, drop_load_masks, drop_store_masks)],
)
def test_a_broken_kernel_is_found(poisoned, path, break_it):
    break_it(poisoned)
    with pytest.raises(AssertionError):
        check(run("tails_everywhere", path), CASES["tails_everywhere"], THRESHOLD, "batch")


def test_only_the_checked_functions_touch_memory():
    for file in Path(pk.__file__).parent.glob("*.py"):
        if file.name != "_pallas.py" and "mosaic" not in file.name:
            assert not re.search(r"\bplt?\.(load|store)\(|_ref\[", file.read_text()), file
