"""Presets and schemes for a model that jint8 saved: which run on its values, and what the refusal of others says."""

import functools
import json
import shutil

import numpy as np
import pytest

import jint8
from jint8._core.config import PRESETS

RUNS = {  # by the preset that a model was saved with
    "paper": ["paper"],
    "static": ["static", "fast"],
    "rotated": ["rotated", "best"],
    "best": ["rotated", "best"],
    "fast": ["fast"],
    "w4": ["w4"],
    "w4-best": ["w4-best"],
}
OTHERS = [(own, other) for own in RUNS for other in RUNS[own] if other != own]
REFUSED = [(own, other) for own in RUNS for other in RUNS if other not in RUNS[own]]
IDS = np.random.default_rng(0).integers(3, 259, (2, 12))


def test_every_preset_is_here():
    assert set(RUNS) == set(PRESETS)


def made_by(preset, llama):
    """A model quantized by a preset; smoothed by its weights alone, since calibration differs by preset."""
    config = jint8.Config.preset(preset)
    by_weights_alone = config.rotate > 0 and not config.uses_calibrated_columns
    text = "How quickly daft jumping zebras vex. " * 8 if config.rounding == "gptq" else None
    return jint8.load(llama, dtype="float32", config=config, calibrate=False if by_weights_alone else text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, llama):
    """The directory of a model by its preset: a function, since not every run of the tests needs them all."""
    place = tmp_path_factory.mktemp("presets")

    @functools.cache
    def directory(name):
        jint8.save(place / name, made_by(name, llama))
        return place / name

    return directory


@pytest.mark.first_case
@pytest.mark.parametrize(("own", "other"), OTHERS, ids=["-".join(pair) for pair in OTHERS])
def test_as_if_quantized_by_the_other(own, other, saved, llama):
    got = jint8.load(saved(own), config=jint8.Config.preset(other)).logits(IDS)
    np.testing.assert_array_equal(got, made_by(other, llama).logits(IDS))
    assert not np.array_equal(got, jint8.load(saved(own)).logits(IDS))


@pytest.mark.first_case
@pytest.mark.parametrize(("own", "other"), REFUSED, ids=["-".join(pair) for pair in REFUSED])
def test_refusal_says_which_run(own, other, saved, run_error):
    error = run_error("generate", saved(own), "--prompt", "a", "--preset", other)
    assert f"(presets: {', '.join(RUNS[own])}; schemes: " in error
    assert "quantize the original checkpoint instead" in error
    named = error.partition("presets: ")[2].partition(";")[0].split(", ")
    assert set(named) <= set(PRESETS)


def test_a_scheme_that_no_preset_has(llama, tmp_path, run_error):
    jint8.save(tmp_path / "row", jint8.load(llama, config=jint8.Config(scheme="row")))
    error = run_error("generate", tmp_path / "row", "--prompt", "a", "--preset", "paper")
    assert "quantized by 'row' (schemes: absmax, row, row+dec), got 'llm.int8'" in error


def evaluated(run_json, directory, tmp_path, *argv):
    np.save(tmp_path / "t.npy", IDS)
    return run_json("eval", directory, "--tokens", tmp_path / "t.npy", "--dtype", "float32", *argv)


@pytest.mark.slow
def test_options_change_the_saved_config(saved, llama, tmp_path, run_json):
    got = evaluated(run_json, saved("static"), tmp_path, "--threshold", 3)
    assert (got["scheme"], got["threshold"]) == ("llm.int8-zp", 3)
    config = jint8.Config(scheme="llm.int8-zp", outliers="static", threshold=3)
    want = jint8.evaluate(jint8.load(saved("static"), config=config), IDS)
    assert got["perplexity"] == want.perplexity
    rotated = evaluated(run_json, saved("best"), tmp_path, "--scheme", "vector")
    assert rotated["perplexity"] == evaluated(run_json, saved("best"), tmp_path)["perplexity"]


def test_an_option_without_effect(saved, run_error):
    error = run_error("generate", saved("fast"), "--prompt", "a", "--outliers", "token")
    assert "Expected no --outliers for a model that was saved with the scheme 'vector-zp'" in error
    error = run_error("generate", saved("rotated"), "--prompt", "a", "--scheme", "llm.int8")
    assert str(saved("rotated")) in error
    assert "Expected rotate with calibrated outlier columns" in error


def test_calibrated_columns_that_the_weights_do_not_hold(saved, run_error):
    error = run_error("generate", saved("paper"), "--prompt", "a", "--outliers", "static")
    assert "weights that hold no calibrated columns (presets: paper; schemes: vector, llm.int8)" in error


def test_a_damaged_config(saved, tmp_path, run_error):
    shutil.copytree(saved("paper"), tmp_path / "damaged")
    file = tmp_path / "damaged" / "jint8.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quant": 3}))
    error = run_error("generate", tmp_path / "damaged", "--prompt", "a", "--threshold", 3)
    assert "jint8.json: Expected a dict as 'quant', got 3" in error
