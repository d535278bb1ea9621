"""GGUF's blocks of four bits in a model: codes bit for bit, and what becomes of them where they can't be kept."""

import warnings

import checkpoint_files
import four_bit_oracle
import jax
import numpy as np
import pytest
from checkpoint_files import find_smollm2, llama_tensors, write_gguf
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from gguf_oracle import FOUR_BITS, ORACLES

import jint8
from jint8.checkpoints import open_checkpoint

Q = GGMLQuantizationType
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
INT4 = jint8.Config(scheme="int4")
TOKENS = np.arange(20)[None] % 32


def random_blocks(rng, shape, kind):
    """Bytes of a tensor of this type, with scales that give values of about 0.1."""
    block, size = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    largest = 0.02 / 63 if kind == Q.Q4_K else 0.02
    for at in ORACLES[kind][1]:
        raw[..., at : at + 2] = rng.uniform(-largest, largest, (*raw.shape[:2], 1)).astype(np.float16).view(np.uint8)
    return raw


def write(path, rng, kinds):
    """A model whose projections have these types, and their blocks by llama.cpp's name."""
    tensors, raw = llama_tensors(rng), {}
    for part in PARTS:
        kind = kinds.get(part, kinds["all"])
        if kind is not None:
            name = f"blk.0.{part}.weight"
            raw[name] = random_blocks(rng, tensors.pop(name).shape, kind), kind
    as_rows = {name: (blocks.reshape(len(blocks), -1), kind) for name, (blocks, kind) in raw.items()}
    return write_gguf(path, tensors, raw=as_rows), raw


@pytest.fixture(params=["Q4_0", "Q4_1", "Q4_K", "mixed"])
def file(request, tmp_path, monkeypatch):
    if request.param in ("Q4_K", "mixed"):  # whose blocks have 256 values
        monkeypatch.setitem(checkpoint_files.LLAMA, "hidden_size", 256)
        monkeypatch.setitem(checkpoint_files.LLAMA, "intermediate_size", 256 if request.param == "Q4_K" else 96)
    kinds = {"all": Q.Q4_0, "attn_k": Q.Q4_1, "ffn_up": Q.Q4_K, "attn_v": Q.Q8_0, "attn_output": Q.Q8_0}
    if request.param != "mixed":
        kinds = {"all": Q[request.param]}
    return write(tmp_path / "m.gguf", np.random.default_rng(0), kinds)


def projections(params):
    """The weights of the one layer, by their name."""
    layer = params["layers_0"]
    return {f"{a}/{b}": layer[a][b]["weight"] for a, b in (("attention", "qkv"), ("attention", "out"))} | {
        f"mlp/{b}": layer["mlp"][b]["weight"] for b in ("gate_up", "down")
    }


def load(path, **options):
    return jint8.load(path, dtype="float32", **options)


OF = {"attention/qkv": PARTS[:3], "attention/out": PARTS[3:4], "mlp/gate_up": PARTS[4:6], "mlp/down": PARTS[6:]}


def of_rows(oracle, blocks):
    return np.array([[value for block in row for value in oracle(block)] for row in blocks])


def order_of(floats, values):
    """Which rows of the tensors, above each other, the rows of a parameter are."""
    order = np.array([abs(values - row).max(axis=1).argmin() for row in np.asarray(floats)])
    assert sorted(order) == list(range(len(values)))
    return order


@pytest.mark.first_case
def test_codes_bit_for_bit(file):
    path, raw = file
    model, floats = load(path, config=INT4, calibrate=False), projections(load(path, quantize=False).params)
    for name, w in projections(model.params).items():
        parts = [raw[f"blk.0.{part}.weight"] for part in OF[name]]
        if not any(kind in FOUR_BITS for _, kind in parts):
            assert (w.config.group, w.features) == (64, w.shape[1])
            continue
        assert (w.config.group, w.config.grouping, w.q.dtype) == (32, "oc", np.uint8)
        values = np.concatenate([of_rows(ORACLES[kind][0], blocks) for blocks, kind in parts])
        order, start = order_of(floats[name], values), 0
        steps, lows = (
            abs(np.repeat(np.asarray(a, np.float32), 32, 1) * np.asarray(w.scale)) for a in (w.group_scale, w.group_min)
        )
        for blocks, kind in parts:
            end = start + len(blocks)
            at = np.flatnonzero((order >= start) & (order < end))
            of_file = order[at] - start
            # Steps of Q4_K are products of 17 bits, which float16 rounds.
            error = {Q.Q4_0: 0, Q.Q4_1: 0, Q.Q4_K: 2**-11 * (15 * steps + lows)[at]}.get(kind, 0.52 * steps[at])
            assert (abs(w.dequantize()[at] - values[order[at]]) <= error + 1e-8).all()
            if kind in FOUR_BITS:
                codes = of_rows(FOUR_BITS[kind], blocks)[of_file]
                np.testing.assert_array_equal(w.q[at], four_bit_oracle.pack(codes.T, 32).T)
            start = end


@pytest.mark.first_case
def test_logits_and_what_is_saved(file, tmp_path):
    path, _ = file
    model = load(path, config=INT4, calibrate=False)
    want = model.model.apply({"params": jint8.dequantize_params(model.params)}, TOKENS)[0]
    np.testing.assert_allclose(model.logits(TOKENS), want, rtol=1e-3, atol=1e-3 * abs(want).max())
    jint8.save(tmp_path / "saved", model)
    after = jint8.load(tmp_path / "saved")
    for got, expected in zip(jax.tree.leaves(after.params), jax.tree.leaves(model.params), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes()


def test_nothing_is_calibrated_where_all_codes_are_kept(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("calibrated")

    monkeypatch.setattr("jint8._inference.load.load_four_bits", fail)
    path, _ = write(tmp_path / "m.gguf", np.random.default_rng(0), {"all": Q.Q4_0})
    load(path, config=INT4)
    path, _ = write(tmp_path / "float.gguf", np.random.default_rng(0), {"all": Q.Q4_0, "ffn_down": None})
    with pytest.raises(AssertionError, match="calibrated"):
        load(path, config=INT4)


@pytest.mark.parametrize("options", [{"rotate": 32}, {"grouping": "ic"}], ids=["rotated", "ic"])
def test_what_cannot_keep_them_says_so(tmp_path, options):
    path, _ = write(tmp_path / "m.gguf", np.random.default_rng(0), {"all": Q.Q4_1, "ffn_down": Q.Q8_0})
    config = jint8.Config(scheme="int4", **options)
    name, value = next(iter(options.items()))
    with pytest.warns(UserWarning, match=rf"m\.gguf: 6 weights .* in four bits are rounded .*{name}={value!r}"):
        model = load(path, config=config, **({"calibrate": False} if config.is_calibrated else {}))
    assert {w.config.group for w in projections(model.params).values()} == {64}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path, config=jint8.Config())  # int8 holds them as they are but for its own rounding


def test_calibrated_columns_beside_kept_codes(tmp_path):
    path, _ = write(tmp_path / "m.gguf", np.random.default_rng(0), {"all": Q.Q4_1})
    alone, columns = load(path, config=INT4), np.array([3, 40])
    model = load(path, config=INT4, outliers={"layers_0/mlp/down/weight": columns})
    w, same = (projections(m.params)["mlp/down"] for m in (model, alone))
    np.testing.assert_array_equal(w.q, same.q)
    np.testing.assert_array_equal(np.asarray(w.outlier_index).reshape(-1), columns)
    np.testing.assert_allclose(w.dequantize(), same.dequantize(), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(model.logits(TOKENS), alone.logits(TOKENS), rtol=2e-2, atol=2e-2)


def test_a_damaged_scale_names_the_tensor(tmp_path):
    rng = np.random.default_rng(0)
    tensors = llama_tensors(rng)
    blocks = random_blocks(rng, tensors.pop("blk.0.ffn_down.weight").shape, Q.Q4_1)
    blocks[3, 1, :2] = np.array([np.inf], np.float16).view(np.uint8)
    raw = {"blk.0.ffn_down.weight": (blocks.reshape(len(blocks), -1), Q.Q4_1)}
    path = write_gguf(tmp_path / "m.gguf", tensors, raw=raw)
    with pytest.raises(ValueError, match=r"down_proj\.weight': Expected finite weights"):
        load(path, config=INT4, calibrate=False)


@pytest.mark.slow
@pytest.mark.skipif(find_smollm2() is None, reason="the demo's model isn't there")
def test_smollm2_in_its_own_four_bits():
    """Every value of every projection is that of the file, and so are the logits."""
    path = find_smollm2()
    model = load(path, config=INT4)
    tokens = np.arange(12)[None] * 31 % 5000
    assert model.params["layers_7"]["mlp"]["down"]["weight"].config.group == 32
    with open_checkpoint(path) as checkpoint:
        for layer in (0, 29):
            got = model.params[f"layers_{layer}"]["mlp"]["down"]["weight"].dequantize()
            np.testing.assert_array_equal(got, checkpoint.read(f"model.layers.{layer}.mlp.down_proj.weight"))
    floats = load(path, quantize=False)
    np.testing.assert_allclose(model.logits(tokens), floats.logits(tokens), atol=2e-3)


def test_the_reference_quantizer(tmp_path):
    """What the gguf package makes of a weight, and takes apart again."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((64, 96), np.float32)
    for kind in (Q.Q4_0, Q.Q4_1):
        tensors = llama_tensors(rng) | {"blk.0.ffn_down.weight": w}
        path = write_gguf(tmp_path / f"{kind.name}.gguf", tensors, types={"blk.0.ffn_down.weight": kind})
        got = projections(load(path, config=INT4, calibrate=False).params)["mlp/down"].dequantize()
        np.testing.assert_allclose(got, quants.dequantize(quants.quantize(w, kind), kind), rtol=1e-6, atol=1e-7)
