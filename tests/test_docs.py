"""The Python examples of README.md and docs/ run, in a folder in which `path/to/checkpoint` and
`path/to/model.gguf` are small models.
"""

import importlib.util
import re
import shutil
import warnings
from pathlib import Path

import pytest
from tiny_model import make_llama_directory

import jint8

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, page.name, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs")
    checkpoint = path / "path" / "to" / "checkpoint"
    checkpoint.mkdir(parents=True)
    make_llama_directory(checkpoint, seed=0)
    shutil.copy(ROOT / "tests" / "fixtures" / "gguf" / "blocks_k.gguf", checkpoint.parent / "model.gguf")
    return path


@pytest.mark.parametrize(("block", "page"), BLOCKS)
def test_example(block, page, folder, monkeypatch, capsys):
    """Those of README, which are tried first, show something, and run again in the same folder."""
    if "maxtext" in block:
        pytest.importorskip("maxtext", reason="needs MaxText, which takes Python 3.12")
        warnings.simplefilter("ignore")  # theirs; pytest puts the filters back
    monkeypatch.chdir(folder)
    for _ in range(2 if page == "README.md" else 1):
        exec(compile(block, "example", "exec"), {"__name__": "example"})
        assert page != "README.md" or capsys.readouterr().out


def test_reference_has_each_public_name():
    """What `dir(jint8)` offers, and the public parts, whose docstrings the page shows."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.reference()
    names = {name for name in dir(jint8) if not name.startswith("_")}
    modules = {name.removeprefix("jint8.") for name in hooks.MODULES} - {"jint8"}
    headings = set(re.findall(r"^#+ (jint8\S*)$", page, re.MULTILINE))
    missing = {name for name in names - {"cli"} if f"jint8.{name}" not in headings}
    assert missing == set()
    assert modules <= names
    assert "Exact for any number of outliers" in page
