"""Docstrings: their examples run, and no public symbol is without its sections."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import jint8

MODULES = [
    "jint8",
    *(
        module.name
        for module in pkgutil.walk_packages(jint8.__path__, "jint8.")
        if not module.name.endswith("__main__")
    ),
]
OURS = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (jint8, jint8.linen, jint8.nnx)
    for name in dir(package)
    if not name.startswith("_") and getattr(getattr(package, name), "__module__", "").startswith("jint8")
}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder()
    found = {test.name for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples}
    assert {"jint8._core.quantize.quantize", "jint8._ops.matmul.matmul", "jint8._ops.einsum.einsum"} <= found


@pytest.mark.parametrize("name", OURS)
def test_sections(name):
    symbol = OURS[name]
    doc = inspect.getdoc(symbol) or ""
    assert doc, f"{name} has no docstring"
    sections = {line[:-1] for line in doc.splitlines() if line in ("Args:", "Attributes:", "Returns:", "Raises:")}
    if inspect.isclass(symbol):
        assert sections & {"Args", "Attributes"}
        methods = [m for m, value in vars(symbol).items() if not m.startswith("_") and callable(value)]
        assert all(inspect.getdoc(getattr(symbol, m)) for m in methods)
        return
    parameters = inspect.signature(symbol).parameters
    returns = inspect.signature(symbol).return_annotation not in (None, "None")
    assert ({"Args", "Returns"} if returns else {"Args"}) <= sections
    assert all(f"{parameter}:" in doc for parameter in parameters), "a parameter isn't described"
    if "raise " in inspect.getsource(symbol):
        assert "Raises" in sections
    if name not in ("jint8.load", "jint8.load_encoder", "jint8.save"):  # they need a checkpoint
        assert "Examples:" in doc


def test_the_core_does_not_import_flax():
    code = "import sys, jint8; jint8.matmul, jint8.quantize_params; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
