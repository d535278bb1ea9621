"""The pictures of docs/how-it-works.md: drawn from the numbers that are on disk, and measured on a tiny model."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from plot_outliers import draw, measure, steps
from tiny_model import make_llama_directory

import jint8

ROOT = Path(__file__).parents[1]
PRODUCTS = ("layers_0/attention/qkv",)


def test_committed_pictures_show_the_committed_numbers():
    measured = json.loads((ROOT / "benchmarks" / "results" / "outlier_pictures.json").read_text())
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    for name, svg in draw(measured).items():
        assert (ROOT / "docs" / "pictures" / name).read_text() == svg
        assert f"pictures/{name}" in page
        assert len(svg) < 60_000


def test_the_page_quotes_the_committed_numbers():
    measured = json.loads((ROOT / "benchmarks" / "results" / "outlier_pictures.json").read_text())
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    zero, one, *_ = measured["steps"]["with"]["shares"]
    found = measured["errors"][measured["product"]]
    error = {row["threshold"]: f"{row['error']:.1%}".replace("%", " %") for row in found["by_threshold"]}
    floor = f"{found['weights_alone']:.1%}".replace("%", " %")
    assert f"reaches {max(measured['largest']):.1f}, while" in page
    assert f"magnitudes is {measured['median_of_token']:.3f}" in page
    assert f"{100 * zero:.0f} % of the token's other values become 0 and {100 * one:.0f} % become 1 or -1" in page
    assert f"from {error[0]} to {error[6]}; int8 weights alone have {floor}" in page


def test_steps_are_those_of_the_whole_token():
    token = np.array([12.7, 0.04, -0.16, 0.34])
    found = steps(token, np.array([False, True, True, True]))
    assert found["step"] == pytest.approx(0.1)
    assert found["shares"][:5] == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3, 0], abs=1e-5)


def test_measures_and_draws_a_tiny_model(tmp_path):
    """Two features of it exceed 6 behind each norm, so that decomposition takes error away there."""
    model = jint8.load(make_llama_directory(tmp_path, seed=0), quantize=False)
    measured = measure(model, model.batches("a short text of a few words")[0], PRODUCTS, (0, 6))
    assert np.flatnonzero(np.array(measured["largest"]) >= 6).tolist() == [3, 17]
    whole, split = measured["errors"][PRODUCTS[0]]["by_threshold"]
    assert (whole["columns"], split["columns"]) == (0, 2)
    assert measured["errors"][PRODUCTS[0]]["weights_alone"] < split["error"] < whole["error"]
    assert measured["steps"]["without"]["step"] < measured["steps"]["with"]["step"]
    for svg in draw(measured).values():
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
