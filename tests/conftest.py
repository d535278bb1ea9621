"""Settings that must come before JAX is imported, and how programs are compiled."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import settings

# Of properties, a few examples, the same ones each time; `--hypothesis-profile=nightly` has many, other ones.
settings.register_profile("few", max_examples=10, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=10_000, deadline=None)
settings.load_profile("few")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `first_case`, all cases but the first are slow."""
    seen = set()
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if "first_case" not in marks or marks & {"slow", "nightly"}:
            continue
        test = item.nodeid.partition("[")[0]
        if test in seen:
            item.add_marker("slow")
        seen.add(test)


# Tests of numbers, which run what users run.
OPTIMIZED = (
    "core/test_quantize.py",
    "models/test_cache.py",
    "ops/test_activations.py",
    "ops/test_batch_independence.py",
    "ops/test_matmul.py",
    "tests/test_properties.py",
)

# Programs of toy size run once: the time of most tests goes into optimizing them.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def compile_as_users_do(request):
    """Optimizes the programs of the files in `OPTIMIZED`."""
    jax.config.update("jax_disable_most_optimizations", not request.path.as_posix().endswith(OPTIMIZED))
    yield
    jax.config.update("jax_disable_most_optimizations", True)
