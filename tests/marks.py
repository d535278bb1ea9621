"""Marks of tests."""

import pytest


def slow_but(names, *fast):
    """`names`, of which all but `fast` are slow: other tests, or other cases, run most of the same code."""
    assert set(fast) <= set(names)
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
