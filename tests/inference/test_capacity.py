"""What a long prompt takes; more is in `tests/cli/test_fit.py`, against a whole model on a mesh."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from family_files import config

import jint8
from jint8._inference.capacity import capacity, layers, measure, model_mesh
from jint8._inference.generate import CHUNK
from jint8.models import model_config


@pytest.mark.slow
def test_the_last_chunk_attends_to_the_whole_prompt():
    model = layers(model_config(config("llama")), 1)
    mesh = model_mesh(model, 1)
    short, long = (measure(model, mesh, context=n, batch=1, quant=jint8.Config()) for n in (CHUNK, 8 * CHUNK))
    more_scores = 4 * model.num_heads * CHUNK * 7 * CHUNK  # float32, of each query and key
    assert long["prefill"] - short["prefill"] >= more_scores
    assert long["cache"] == 8 * short["cache"]


@pytest.mark.first_case
@pytest.mark.parametrize("cache", [None, "int8"])
def test_decode_holds_no_copy_of_the_cache_or_the_head(cache):
    """A copy is of all keys or all values of a layer at least, and is made again with every token."""
    model = layers(model_config({**config("llama"), "head_dim": 128, "vocab_size": 20_000}), 1)
    found = measure(model, model_mesh(model, 1), context=8192, batch=1, quant=jint8.Config(), cache=cache)
    head = 4 * model.vocab_size * model.hidden_size
    assert found["decode"] < min(found["cache"], head) / 2


TABLE = re.compile(
    r"^\| (OPT-175B|BLOOM-176B) \| (.*?) \| (.*?) \| (.*?) \| (.*?): (.*?) \| (.*?): (.*?) \|$", re.MULTILINE
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OPT-175B", "BLOOM-176B"])
def test_the_table_of_the_readme(name):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    _, *numbers = next(row for row in TABLE.findall(readme) if row[0] == name)
    command = [sys.executable, "-m", "jint8", "fit", name.lower(), "--mesh", "8x24GiB", "--json", "--quiet"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    int8, verdict = found["per_device"]["int8"], {True: "fits", False: "doesn't fit"}
    temporaries = max(int8["prefill"], int8["decode"])
    shown = [f"{n / 2**30:.1f}" for n in (int8["weights"], int8["cache"], temporaries, int8["needed"])]
    floats = found["per_device"]["float"]["weights"] / 2**30
    assert numbers == [*shown, verdict[found["fits"]], f"{floats:.1f}", verdict[found["float_fits"]]]


@pytest.mark.slow
def test_int8_cache():
    model = layers(model_config(config("llama")), 2)
    values = 2 * model.num_kv_heads * 256 * model.head_dim  # keys and values of a layer
    scales, shift = 2 * model.num_kv_heads * 256 * 4, model.num_kv_heads * model.head_dim * 4
    found = {
        cache: capacity(model, 1, context=256, batch=3, dtype="bfloat16", quant=jint8.Config(), cache=cache)
        for cache in (None, "int8")
    }
    assert found[None].cache == 2 * 3 * 2 * values
    assert found["int8"].cache == 2 * 3 * (values + scales + shift)
    assert found["int8"].weights == found[None].weights
    assert found["int8"].needed == found["int8"].weights + found["int8"].cache + found["int8"].prefill
