"""`--preset rotated` from the command line: quantized, saved, generated from; what is refused."""

import jax
import numpy as np
import pytest

import jint8

ROTATED = jint8.Config.preset("rotated")
TEXT = "Jackdaws love my big sphinx of quartz. " * 3


def test_quantize_by_the_weights_alone_and_generate(llama, run_json, tmp_path):
    run_json("quantize", llama, tmp_path / "dst", "--preset", "rotated", "--calibrate", "none", "--dtype", "float32")
    got = jint8.load(tmp_path / "dst", verify=True)
    want = jint8.load(llama, config=ROTATED, calibrate=False, dtype="float32")
    assert got.quant == ROTATED
    assert jax.tree.structure(got.params) == jax.tree.structure(want.params)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    made = run_json("generate", tmp_path / "dst", "--prompt", "a", "--max-tokens", 3, "--temperature", 0)
    assert made["text"] == want.generate("a", max_tokens=3)


@pytest.mark.slow
def test_calibrated_on_a_file(llama, run_json, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    run_json(
        *("quantize", llama, tmp_path / "dst", "--preset", "rotated", "--dtype", "float32"),
        *("--calibrate", tmp_path / "text.txt"),
    )
    want = jint8.load(llama, config=ROTATED, calibrate=TEXT, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, jint8.load(tmp_path / "dst").params, want.params)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--preset", "rotated", "--format", "bitsandbytes", "--calibrate", "none"),
            "smoothed and rotated (rotate=32)",
        ),
        (("--preset", "static", "--calibrate", "none"), "without calibration, got calibrate=False"),
        (("--preset", "fast", "--calibrate", "none"), "Expected --calibrate with what is calibrated"),
        (("--preset", "rotated", "--scheme", "vector"), "Expected --scheme or --preset, got both"),
        (("--preset", "rotated", "--calibrate", "nowhere.txt"), "nowhere.txt"),
    ],
    ids=["bitsandbytes", "static", "fast", "scheme", "file"],
)
def test_refused(argv, message, llama, run_error, tmp_path):
    assert message in run_error("quantize", llama, tmp_path / "dst", *argv)
    assert not (tmp_path / "dst").exists()


def test_a_saved_model_is_not_rotated_otherwise(llama, run_json, run_error, tmp_path):
    run_json("quantize", llama, tmp_path / "dst", "--preset", "rotated", "--calibrate", "none")
    error = run_error("generate", tmp_path / "dst", "--prompt", "a", "--threshold", 3)
    assert "Expected no --threshold for a model that was saved with the scheme 'vector'" in error
    error = run_error("generate", tmp_path / "dst", "--prompt", "a", "--preset", "paper")
    assert "rotate=64, as the model was saved with (presets: rotated, best; schemes: vector), got rotate=0" in error
