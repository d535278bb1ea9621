"""GGUF files that llama.cpp's own converter and quantizers made; see tests/fixtures/make_gguf.py."""

import jax.numpy as jnp
import numpy as np
import pytest
from family_files import DIRECTORY, expected

import jint8
from jint8.checkpoints import open_checkpoint
from jint8.checkpoints._gguf.architectures import ARCHITECTURES

MADE = DIRECTORY.parent / "gguf"
BLOCKS = sorted(path.stem for path in MADE.glob("blocks_*.gguf"))
TYPES = {
    "blocks_iq": {
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4", "Q8_0"),
    },
    "blocks_k": {
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16"),
    },
}
FAMILIES = sorted(path.stem for path in MADE.glob("*.gguf") if path.stem not in BLOCKS)


def logits(model, tokens):
    return np.asarray(model.model.apply({"params": model.params}, jnp.asarray(tokens))[0])


def test_every_architecture_was_converted():
    found = set()
    for name in FAMILIES:
        with open_checkpoint(MADE / f"{name}.gguf") as checkpoint:
            found.add(checkpoint.metadata["general.architecture"])
    assert found == set(ARCHITECTURES)


@pytest.mark.first_case
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_a_converted_model_are_those_of_transformers(name):
    own = MADE / f"{name}.npz"
    want = np.load(own) if own.exists() else expected(name)
    model = jint8.load(MADE / f"{name}.gguf", quantize=False, dtype="float32")
    got = logits(model, want["tokens"])
    np.testing.assert_allclose(got, want["logits"], rtol=0, atol=1e-4 * np.abs(want["logits"]).max())


PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def by_rows(sums):
    """In an order that doesn't depend on that of the rows, which the converter permutes of queries and keys."""
    return sums[np.lexsort(sums.T)]


@pytest.mark.parametrize("name", BLOCKS)
def test_values_of_blocks_are_those_of_ggml(name):
    want, compared = np.load(MADE / f"{name}.npz"), set()
    with open_checkpoint(MADE / f"{name}.gguf") as checkpoint:
        for layer in range(2):
            for stem, module in PROJECTIONS.items():
                tensor = f"model.layers.{layer}.{module}.weight"
                values = checkpoint.read(tensor).astype(np.float64)
                got = np.stack([values.sum(1), abs(values).sum(1)], axis=1)
                sums = want[f"sums.blk.{layer}.{stem}.weight"]
                np.testing.assert_allclose(by_rows(got), by_rows(sums), rtol=0, atol=1e-6 * sums.max(), err_msg=tensor)
                compared.add(checkpoint.tensors[tensor].dtype)
    assert compared == TYPES[name]


@pytest.mark.parametrize("name", BLOCKS)
def test_logits_of_blocks_are_those_of_llama_cpp(name):
    """Which rounds activations to int8 in blocks, and keys and values to float16: it is 2 to 3 % off itself."""
    want = np.load(MADE / f"{name}.npz")
    model = jint8.load(MADE / f"{name}.gguf", quantize=False, dtype="float32")
    got = logits(model, want["tokens"][None])[0]
    assert np.linalg.norm(got - want["logits"]) < 0.05 * np.linalg.norm(want["logits"])
