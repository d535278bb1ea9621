"""Static outliers from a checkpoint to an answer: load, save, generate, and the commands' presets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8
from jint8.models._attention import context
from jint8.models._decoder import embed

STATIC = jint8.Config.preset("static")
QKV = "layers_0/attention/qkv/weight"
TEXT = "Jackdaws love my big sphinx of quartz. " * 3


@pytest.fixture(scope="module")
def static(llama):
    return jint8.load(llama, config=STATIC, dtype="float32")


def weight(model, path=QKV):
    leaf = model.params
    for key in path.split("/"):
        leaf = leaf[key]
    return leaf


@pytest.mark.slow
def test_load_calibrates(static, model):
    w = weight(static)
    assert w.outlier_index.reshape(-1).tolist() == [3, 17]  # the planted ones
    assert w.outlier_rows.shape == (64, 2)
    assert static.quant == STATIC
    np.testing.assert_allclose(w.dequantize()[:, 3], weight(model).dequantize()[:, 3], atol=float(w.scale.max()))


@pytest.mark.slow
def test_given_columns(llama, static):
    found = static.calibrate(TEXT, budget=1)
    assert all(columns.shape == (1,) for columns in found.values())
    loaded = jint8.load(llama, outliers=found | {"layers_1/mlp/down/weight": []}, dtype="float32")
    assert weight(loaded, "layers_1/mlp/down/weight").outlier_rows is None
    assert loaded.quant == jint8.Config(outliers="static")
    assert weight(loaded).outlier_index.reshape(-1).tolist() == found[QKV].tolist()
    with pytest.raises(ValueError, match="Expected the outliers' paths to be parameters, got layers_9/x"):
        jint8.load(llama, outliers={"layers_9/x": [1]})


def test_quantize_with_a_preset_and_load(llama, static, run_json, tmp_path):
    run_json("quantize", llama, tmp_path / "dst", "--preset", "static", "--dtype", "float32")
    loaded = jint8.load(tmp_path / "dst")
    assert loaded.quant == STATIC
    assert jax.tree.structure(loaded.params) == jax.tree.structure(static.params)
    assert all(map(np.array_equal, jax.tree.leaves(loaded.params), jax.tree.leaves(static.params)))
    with pytest.raises(ValueError, match="Expected a checkpoint in floating point"):
        jint8.load(tmp_path / "dst", outliers={})


def test_an_int8_embedding_knows_its_columns(llama):
    plain = jint8.load(llama, include="embedding", dtype="float32")
    both = jint8.load(llama, include="embedding", outliers={"embedding": [4]}, dtype="float32")
    tokens = jnp.arange(12)[None]
    assert weight(both, "embedding").outlier_rows.shape == (259, 1)
    exact = jint8.load(llama, quantize=False, dtype="float32").params["embedding"]
    rows = lambda model: embed(weight(model, "embedding"), tokens)[0]
    np.testing.assert_array_equal(np.delete(rows(both), 4, 1), np.delete(rows(plain), 4, 1))
    np.testing.assert_allclose(rows(both)[:, 4], exact[:12, 4], rtol=2**-11)


def test_a_padded_prompt_does_not_depend_on_neighbours(static):
    first = jnp.array([5, 0])
    apply = jax.jit(lambda tokens: static.model.apply({"params": static.params}, tokens, context(tokens, 0, first))[0])
    prompt = np.arange(40, 60)
    prompt[:5] = 0
    neighbours = [np.full(20, 7), np.arange(20) % 2 * 200 + 3, np.random.default_rng(0).integers(0, 259, 20)]
    logits = [np.asarray(apply(np.stack([prompt, neighbour])))[0, 5:] for neighbour in neighbours]
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


@pytest.mark.slow
def test_eval_with_a_preset(llama, run_json, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    common = ("eval", llama, "--text", tmp_path / "text.txt", "--seq-len", 16, "--limit", 1)
    best = run_json(*common, "--preset", "best", "--calibrate", tmp_path / "text.txt")
    assert (best["preset"], best["scheme"], best["threshold"]) == ("best", "vector", 0)
    static = run_json(*common, "--preset", "static")
    assert (static["preset"], static["scheme"], static["threshold"]) == ("static", "llm.int8-zp", 6)
    fast = run_json(*common, "--preset", "fast")
    assert (fast["preset"], fast["scheme"], fast["threshold"]) == ("fast", "vector-zp", 0)
    assert static["projection_bytes"] > fast["projection_bytes"]


def test_outliers(llama, run_json, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "text.txt").write_text(TEXT)
    files = [str(tmp_path / "map.png"), str(tmp_path / "magnitudes.svg")]
    plots = ("--plot", files[0], "--plot-magnitudes", files[1], "--html", tmp_path / "page.html")
    got = run_json("outliers", llama, "--text", tmp_path / "text.txt", "--seq-len", 32, *plots)
    assert got["tokens"] == 96
    assert {f["dimension"] for f in got["features"] if "qkv" in f["projection"]} == {3, 17}
    assert got["projections"]["layers_*/attention/qkv/weight"]["layers"] == 2
    assert got["plots"] == files
    assert got["html"] == str(tmp_path / "page.html")
    assert "Outlier features of llama" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "magnitudes.svg").read_text()


@pytest.mark.slow
def test_outliers_in_batches(llama, run_json, tmp_path):
    """What is counted doesn't depend on how many sequences a call has; the last one has fewer."""
    (tmp_path / "text.txt").write_text(TEXT)
    common = ("outliers", llama, "--float", "--text", tmp_path / "text.txt", "--seq-len", 20)
    one, three = run_json(*common), run_json(*common, "--batch-size", 3)
    assert one["tokens"] == three["tokens"] == 100
    found = [{(f["projection"], f["dimension"], f["position_share"]) for f in got["features"]} for got in (one, three)]
    assert found[0] == found[1] != set()
    qkv = "layers_*/attention/qkv/weight"
    assert one["projections"][qkv]["outlier_values"] == three["projections"][qkv]["outlier_values"]


def test_outliers_as_a_table(llama, run):
    status, out, _ = run("outliers", llama, "--float", "--limit", 1)
    assert status == 0
    assert "layers_*/attention/qkv/weight" in out


def test_errors(llama, run_error, tmp_path):
    assert "Expected --scheme or --preset, got both" in run_error(
        "eval", llama, "--text", "x", "--scheme", "vector", "--preset", "best"
    )
    assert "--preset: invalid choice: 'x'" in run_error("generate", llama, "--prompt", "a", "--preset", "x")
    assert "Expected --calibrate with what is calibrated" in run_error("eval", llama, "--text", "x", "--calibrate", "x")
    assert "none.txt" in run_error("outliers", llama, "--text", tmp_path / "none.txt")
    assert "Expected --limit" in run_error("outliers", llama, "--limit", 0)
    pytest.importorskip("matplotlib")
    assert "Expected a name that ends in .png, .svg, .pdf" in run_error("outliers", llama, "--plot", "map.gif")
