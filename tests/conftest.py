"""Settings that must come before JAX is imported, and how programs are compiled."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

OPTIMIZED = ("core", "kernels")  # whose tests are about numbers, and run what users run


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(request):
    """Whole models of toy size run once: the time of their tests goes into optimizing programs."""
    if request.path.parent.name in OPTIMIZED:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
