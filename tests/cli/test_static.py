"""Static outliers from a checkpoint to an answer: load, save, generate, and the commands' presets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8

STATIC = jint8.Config.preset("static")
QKV = "layers_0/attention/qkv/weight"
TEXT = "Jackdaws love my big sphinx of quartz. " * 3


@pytest.fixture(scope="session")
def static(llama):
    return jint8.load(llama, config=STATIC, dtype="float32")


def weight(model, path=QKV):
    leaf = model.params
    for key in path.split("/"):
        leaf = leaf[key]
    return leaf


def test_load_calibrates(static, model):
    w = weight(static)
    assert w.outlier_index.reshape(-1).tolist() == [3, 17]  # the planted ones
    assert w.outlier_rows.shape == (64, 2)
    assert static.quant == STATIC
    np.testing.assert_allclose(w.dequantize()[:, 3], weight(model).dequantize()[:, 3], atol=float(w.scale.max()))
    assert model.calibrate()[QKV].tolist() == [3, 17]


def test_given_columns(llama, static):
    found = static.calibrate(TEXT, budget=1)
    assert all(columns.shape == (1,) for columns in found.values())
    loaded = jint8.load(llama, outliers=found, dtype="float32")
    assert loaded.quant == jint8.Config(outliers="static")
    assert weight(loaded).outlier_index.reshape(-1).tolist() == found[QKV].tolist()
    with pytest.raises(ValueError, match="Expected the outliers' paths to be parameters, got layers_9/x"):
        jint8.load(llama, outliers={"layers_9/x": [1]})


def test_saved(static, tmp_path):
    jint8.save(tmp_path / "saved", static)
    loaded = jint8.load(tmp_path / "saved")
    assert loaded.quant == STATIC
    assert jax.tree.structure(loaded.params) == jax.tree.structure(static.params)
    assert all(map(np.array_equal, jax.tree.leaves(loaded.params), jax.tree.leaves(static.params)))
    with pytest.raises(ValueError, match="Expected a checkpoint in floating point"):
        jint8.load(tmp_path / "saved", outliers={})


def test_an_int8_embedding_knows_its_columns(llama):
    plain = jint8.load(llama, include="embedding", dtype="float32")
    both = jint8.load(llama, include="embedding", outliers={"embedding": [4]}, dtype="float32")
    tokens = jnp.arange(12)[None]
    assert weight(both, "embedding").outlier_rows.shape == (259, 1)
    exact = jint8.load(llama, quantize=False, dtype="float32").params["embedding"]
    embed = lambda model: jint8.models._decoder.embed(weight(model, "embedding"), tokens)[0]
    np.testing.assert_array_equal(np.delete(embed(both), 4, 1), np.delete(embed(plain), 4, 1))
    np.testing.assert_allclose(embed(both)[:, 4], exact[:12, 4], rtol=2**-11)


def test_an_answer_does_not_depend_on_neighbours(static):
    alone = static.generate("sphinx", max_tokens=6)
    batch = static.generate(["sphinx", TEXT, "\x00\x7f" * 20], max_tokens=6)  # the first is padded on the left
    assert batch[0] == alone


def test_eval_presets(llama, run_json, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    common = ("eval", llama, "--text", tmp_path / "text.txt", "--seq-len", 16, "--compare")
    found = {name: run_json(*common, "--preset", name) for name in ("paper", "static", "best", "fast")}
    assert [r["preset"] for r in found.values()] == list(found)
    assert [r["scheme"] for r in found.values()] == ["llm.int8", "llm.int8-zp", "llm.int8-zp", "vector-zp"]
    assert found["best"]["kl"] < found["static"]["kl"] < found["fast"]["kl"]
    assert found["best"]["projection_bytes"] == found["static"]["projection_bytes"] > found["fast"]["projection_bytes"]
    token = run_json(*common, "--outliers", "token")
    assert token["scheme"] == "llm.int8"
    calibrated = run_json(*common, "--preset", "static", "--calibrate", tmp_path / "text.txt")
    assert calibrated["projection_bytes"] >= found["fast"]["projection_bytes"]


def test_quantize_with_a_preset(llama, run_json, tmp_path):
    run_json("quantize", llama, tmp_path / "dst", "--preset", "best", "--dtype", "float32")
    loaded = jint8.load(tmp_path / "dst")
    assert loaded.quant == jint8.Config.preset("best")
    assert weight(loaded).outlier_index is not None


def test_outliers(llama, run_json, run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    got = run_json("outliers", llama, "--text", tmp_path / "text.txt", "--seq-len", 32)
    assert got["tokens"] == 96
    assert {f["dimension"] for f in got["features"] if "qkv" in f["projection"]} == {3, 17}
    assert got["projections"]["layers_*/attention/qkv/weight"]["layers"] == 2
    assert got["plots"] == []
    status, out, _ = run("outliers", llama, "--float", "--limit", 1)
    assert status == 0
    assert "layers_*/attention/qkv/weight" in out


def test_outliers_plots(llama, run_json, tmp_path):
    pytest.importorskip("matplotlib")
    files = [str(tmp_path / "map.png"), str(tmp_path / "magnitudes.svg")]
    got = run_json("outliers", llama, "--limit", 1, "--plot", files[0], "--plot-magnitudes", files[1])
    assert got["plots"] == files
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "magnitudes.svg").read_text()


def test_errors(llama, run_error, tmp_path):
    assert "Expected --scheme or --preset, got both" in run_error(
        "eval", llama, "--text", "x", "--scheme", "vector", "--preset", "best"
    )
    assert "Expected a preset among paper, static, best, fast, got 'x'" in run_error(
        "generate", llama, "--prompt", "a", "--preset", "x"
    )
    assert "Expected --calibrate with static outliers" in run_error("eval", llama, "--text", "x", "--calibrate", "x")
    assert "none.txt" in run_error("outliers", llama, "--text", tmp_path / "none.txt")
    assert "Expected --limit" in run_error("outliers", llama, "--limit", 0)
    pytest.importorskip("matplotlib")
    assert "Expected a name that ends in .png, .svg, .pdf" in run_error("outliers", llama, "--plot", "map.gif")
