"""Rotated weights that are read from checkpoints a few rows at a time, against `jint8.quantize` of the whole weight."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.linalg
from family_files import DIRECTORY

import jint8
from jint8._convert import rotate_rows
from jint8._core.calibration import Calibration
from jint8._core.qtensor import is_qtensor
from jint8._trees.paths import leaf_paths

ROTATED = jint8.Config.preset("rotated")
COLUMNS = jint8.Config(outliers="static", rotate=64)
ENCODER = DIRECTORY.parent / "encoders" / "bert"


def leaves(model):
    return dict(leaf_paths(model.params, is_leaf=is_qtensor))


def load(name, **options):
    if name == "bert":
        return jint8.load_encoder(ENCODER, dtype="float32", **options)
    return jint8.load(DIRECTORY / name, dtype="float32", **options)


def known(floats, decomposes):
    """Made-up statistics of each weight: fewer columns for some of the stacked weights."""
    columns, rms = {}, {}
    for path, w in floats.items():
        *stack, _, k = w.shape
        rng = np.random.default_rng(k)
        rms[path] = np.exp(rng.standard_normal((*stack, k))).astype(np.float32)
        columns[path] = np.sort(np.stack([rng.permutation(k)[:2] for _ in range(int(np.prod(stack)))]), -1)
        columns[path] = columns[path].reshape(*stack, 2)
        if stack:
            columns[path][0, 1] = k
    return Calibration(columns if decomposes else {}, rms)


def check(got, w, config, found, path):
    """The arrays are those of `quantize` of the whole weight, and the integers those of NumPy's float64."""
    *stack, _, k = w.shape
    outliers, rms = found.get(path), found.rms.get(path)
    options = {"contract_axes": (w.ndim - 1,), "stack_axes": tuple(range(len(stack)))}
    want = jint8.quantize(w, config=config, outliers=outliers, rms=rms, **options)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for field in ("smooth", "scale"):
        np.testing.assert_allclose(getattr(got, field), getattr(want, field), rtol=3e-6, err_msg=path)
    inside = np.asarray(w, np.float64)
    if outliers is not None:
        np.testing.assert_array_equal(got.outlier_index, want.outlier_index)
        np.testing.assert_allclose(got.outlier_rows, want.outlier_rows, rtol=2**-9, atol=1e-4)
        taken = (np.asarray(outliers)[..., None, :, None] == np.arange(k)).any(-2)
        inside = np.where(taken, 0, inside)
    block = got.config.rotate
    matrix = scipy.linalg.hadamard(block) / np.sqrt(block)
    inside = ((inside / got.smooth).reshape(*w.shape[:-1], -1, block) @ matrix).reshape(w.shape)
    zero = 0 if got.zero is None else np.asarray(got.zero, np.float64)
    quotient = inside / np.float64(got.scale) + zero
    largest = (-128, 127) if got.zero is not None else (-127, 127)
    assert np.abs(np.clip(quotient, *largest) - got.q).max() < 0.5 + 1e-3, path
    sure = np.abs(quotient - np.floor(quotient) - 0.5) > 1e-3
    assert sure.mean() > 0.99
    same_zero = np.broadcast_to(True if got.zero is None else got.zero == want.zero, sure.shape)
    np.testing.assert_array_equal(np.asarray(got.q)[sure & same_zero], np.asarray(want.q)[sure & same_zero], path)


CASES = {
    "fused projections, by weights alone": ("llama", ROTATED, False),
    "fused projections, calibrated": ("llama", ROTATED, True),
    "transposed sources, columns": ("gpt2", COLUMNS, True),
    "experts": ("mixtral", ROTATED, True),
    "experts, columns and zero points": ("mixtral", dataclasses.replace(COLUMNS, scheme="llm.int8-zp"), True),
    "one scale per tensor, columns": ("gpt2", dataclasses.replace(COLUMNS, scheme="row+dec"), True),
    "one scale and zero point per tensor": ("gpt2", jint8.Config(scheme="zeropoint", rotate=8), False),
    "encoder": ("bert", ROTATED, False),
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", CASES)
def test_the_weights_of_quantize(name, monkeypatch):
    monkeypatch.setattr(rotate_rows, "BLOCK", 200)  # a few rows at a time
    source, config, calibrated = CASES[name]
    floats, options = leaves(load(source, quantize=False)), {} if source == "bert" else {"calibrate": False}
    found = Calibration({}, {})
    if calibrated:
        projections = {path: w for path, w in floats.items() if path.endswith("/weight") and "router" not in path}
        found = known({p: w for p, w in projections.items() if p != "lm_head/weight"}, config.decomposes)
        options = {"outliers": found}
    got = leaves(load(source, config=config, **options))
    int8 = {path: w for path, w in got.items() if is_qtensor(w)}
    assert len(int8) >= 8
    for path in list(int8)[:3]:  # of one layer
        check(int8[path], floats[path], config, found, path)
    for path in got.keys() - int8.keys():
        np.testing.assert_array_equal(got[path], floats[path])


def test_included_embeddings_and_heads():
    got = leaves(load("llama", config=ROTATED, calibrate=False, include=("embedding", "lm_head")))
    floats = leaves(load("llama", quantize=False))
    for path in ("embedding", "lm_head/weight"):
        check(got[path], floats[path], ROTATED, Calibration({}, {}), path)


def test_statistics_that_do_not_fit():
    path = "layers_0/mlp/down/weight"
    with pytest.raises(ValueError, match=f"{path}: Expected rms of shape .*48.*, got .*7"):
        load("llama", config=ROTATED, outliers=Calibration({}, {path: np.ones(7, np.float32)}))
    with pytest.raises(ValueError, match="Expected the outliers' paths to be parameters, got layers_9/x"):
        load("llama", config=ROTATED, outliers=Calibration({}, {"layers_9/x": np.ones(7, np.float32)}))


def test_weights_that_are_not_finite(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = safetensors.load_file(DIRECTORY / "llama" / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((DIRECTORY / "llama" / "config.json").read_text())
    with pytest.raises(ValueError, match=f"{name}.*Expected finite weights, got NaN or infinity"):
        jint8.load(tmp_path, config=ROTATED, calibrate=False)


def test_int8_checkpoints_are_refused():
    with pytest.raises(ValueError, match="Expected a config without rotate for weights that are in int8 already"):
        jint8.load(DIRECTORY.parent / "bitsandbytes" / "llama", config=ROTATED)


def test_bitsandbytes_can_not_have_them(tmp_path):
    model = load("llama", config=ROTATED, calibrate=False)
    with pytest.raises(
        ValueError, match=r"weight: Expected a weight as the model has it, got one .* rotated \(rotate="
    ):
        jint8.save(tmp_path / "dst", model, format="bitsandbytes")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("scheme", ["llm.int8", "llm.int8-zp", "row+dec"])
def test_a_calibrated_column_that_is_not_finite(tmp_path, scheme):
    """It is taken out before the rest is rotated, and missed nevertheless."""
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(DIRECTORY / "llama" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.inf
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((DIRECTORY / "llama" / "config.json").read_text())
    config = jint8.Config(scheme=scheme, outliers="static", rotate=64)
    with pytest.raises(ValueError, match=f"{name}.*Expected finite weights, got NaN or infinity"):
        jint8.load(tmp_path, config=config, outliers={"layers_1/mlp/down/weight": [5]})


@pytest.mark.slow
def test_an_embedding_that_is_only_looked_up_is_not_calibrated():
    model = load("llama", config=jint8.Config.preset("rotated"), include="embedding")
    assert is_qtensor(model.params["embedding"])
    assert np.isfinite(model.logits(np.array([[3, 4, 5]]))).all()
