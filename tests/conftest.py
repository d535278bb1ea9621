"""Settings that must come before JAX is imported, and how programs are compiled."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# Tests of numbers, which run what users run.
OPTIMIZED = ("test_matmul.py", "test_activations.py", "test_quantize.py", "test_batch_independence.py", "test_cache.py")


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(request):
    """Programs of toy size run once: the time of most tests goes into optimizing them."""
    if request.path.name in OPTIMIZED:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
