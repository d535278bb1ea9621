"""The examples in docstrings give what they say, every public name has a docstring, and type checkers see the types."""

import doctest
import importlib
import pkgutil
from importlib import resources

import jax
import pytest

import pallas_kernels as pk

MODULES = [module.name for module in pkgutil.iter_modules(pk.__path__, "pallas_kernels.")]


@pytest.mark.first_case
@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(("mosaic", "nogpu"))])
def test_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS, extraglobs={"jax": jax}).failed == 0


@pytest.mark.parametrize("name", [name for name in dir(pk) if not name.startswith("_")])
def test_public_names_are_documented(name):
    assert getattr(pk, name).__doc__


def test_types_are_for_users_too():
    assert (resources.files(pk) / "py.typed").is_file()
