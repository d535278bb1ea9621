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

# Tests of numbers, which run what users run.
OPTIMIZED = ("test_matmul.py", "test_activations.py", "test_quantize.py", "test_batch_independence.py", "test_cache.py")
OPTIMIZED += ("test_properties.py",)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(request):
    """Programs of toy size run once: the time of most tests goes into optimizing them."""
    if request.path.name in OPTIMIZED:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
