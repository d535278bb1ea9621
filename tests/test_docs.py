"""The Python examples of README.md and docs/ run, in a folder in which `path/to/checkpoint` and
`path/to/model.gguf` are small models.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import shutil
import warnings
from pathlib import Path

import pytest
from tiny_model import make_llama_directory

import jint8
from jint8.cli._main import build_parser

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


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exported(module):
    """What the package's `__init__` imports under its own name, `import name as name`, which makes it public."""
    lines = ast.walk(ast.parse(inspect.getsource(module)))
    names = [name for line in lines if isinstance(line, ast.ImportFrom) for name in line.names]
    return {name.name for name in names if name.asname == name.name and not name.name.startswith("_")}


def test_reference_has_each_public_name(hooks):
    """What `dir(jint8)` offers, and what each public package does, whose docstrings the page shows."""
    page = hooks.reference()
    headings = set(re.findall(r"^#+ (jint8\S*)$", page, re.MULTILINE))
    names = {f"jint8.{name}" for name in dir(jint8) if not name.startswith("_")}
    for found in pkgutil.iter_modules(jint8.__path__):
        if not found.name.startswith("_"):
            own = exported(importlib.import_module(f"jint8.{found.name}"))
            assert own
            names |= {f"jint8.{found.name}", *(f"jint8.{found.name}.{name}" for name in own)}
    assert names - headings == set()
    assert "Exact for any number of outliers" in page


def test_page_of_the_commands_has_each_with_its_options(hooks):
    page = hooks.command_line()
    offered = re.findall(r"^    (\w+)(?: \(\w+\))?(?: |$)", build_parser().format_help(), re.MULTILINE)
    assert "generate" in offered
    assert re.findall(r"^## jint8 (\w+)$", page, re.MULTILINE) == offered
    assert "--calibrate FILE" in page


def test_page_of_the_tables_names_each_result():
    page = (ROOT / "docs" / "measured.md").read_text()
    results = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert {name for name in results if f"benchmarks/results/{name}" not in page} == set()


QUALITY = {
    "float32 (`none`)": "float32",
    "LLM.int8() (`Config()`)": "llm.int8",
    "without decomposition (`vector`)": "vector",
    "preset `rotated`: features smoothed and rotated, no decomposition": "rotated",
    "preset `best`: two int8 digits per activation as well": "best",
    "bitsandbytes, `load_in_8bit`": "bitsandbytes",
    "torchao, dynamic int8": "torchao",
}


def test_table_of_the_presets_is_the_result():
    tables = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["tables"]
    plain, permuted = tables["plain"]["32x512 tokens"], tables["permuted"]["8x512 tokens"]
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "presets.md").read_text().splitlines()]
    shown = {row[0].split("`")[1]: row[2:5] for row in rows if len(row) == 7 and "`" in row[0]}
    measured = {"paper": plain["llm.int8"], **{name: plain[name] for name in ("static", "rotated", "best", "fast")}}
    measured |= {name: permuted[name] for name in ("w4", "w4-best")}
    assert set(shown) == {*measured}
    for name, row in measured.items():
        kl, top1, memory = shown[name]
        assert kl.startswith(f"{row['kl']:.{3 if name.startswith('w4') else 4}f}")
        assert (top1, memory) == (f"{row['top1']:.3f}", f"{row['projection_bytes'] / 1e6:.1f} MB")


def test_tables_of_the_readme_are_the_results():
    """Quality's numbers, and how many times as fast as float32 each engine is."""
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines()]
    results = ROOT / "benchmarks" / "results"
    measured = json.loads((results / "quality.json").read_text())["tables"]["plain"]["32x512 tokens"]
    shown = {name: numbers for name, *numbers in rows if name in QUALITY and len(numbers) == 3}
    expected = {name: measured[key] for name, key in QUALITY.items()}
    assert shown == {
        name: [f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.3f}"] for name, row in expected.items()
    }
    ratios = lambda text: tuple(re.findall(r"\(([\d.]+)\)", text))
    engines = {ratios(line)[:4] for line in (results / "peers_cpu.md").read_text().splitlines()}
    shown = [ratios(" ".join(numbers)) for _, *numbers in rows if len(numbers) == 4 and "(" in numbers[0]]
    assert len(shown) == 8
    assert set(shown) <= engines
