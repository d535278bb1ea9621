"""What only a real file shows; skipped where there is none."""

import numpy as np
import pytest
from checkpoint_files import find_smollm2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jint8.checkpoints import open_checkpoint

FILE = find_smollm2()
pytestmark = pytest.mark.skipif(
    FILE is None, reason="needs SmolLM2-135M-Instruct in the cache or at $JINT8_TEST_SMOLLM2"
)


@pytest.fixture(scope="module")
def ckpt():
    with open_checkpoint(FILE) as ckpt:
        yield ckpt


@pytest.fixture(scope="module")
def tok(ckpt):
    return ckpt.tokenizer()


def test_header(ckpt):
    assert (ckpt.config["model_type"], ckpt.config["vocab_size"], ckpt.config["rope_theta"]) == ("llama", 49152, 1e5)
    assert ckpt.config["tie_word_embeddings"] is True
    assert sum(info.size for info in ckpt.tensors.values()) == 134_515_008
    x = ckpt.read_rows("model.layers.29.self_attn.q_proj.weight", 100, 140)
    np.testing.assert_array_equal(x, ckpt.read("model.layers.29.self_attn.q_proj.weight")[100:140])


def test_chat(tok):
    text = tok.apply_chat_template([{"role": "user", "content": "Hi 123"}])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert (
        text == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi 123<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tok.encode(text) == [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2,
        198, 1, 4093, 198, 26843, 216, 33, 34, 35, 2, 198, 1, 520, 9531, 198,
    ]  # fmt: skip
    assert tok.eos_ids[0] == 2
    assert tok.bos_id == 1


def test_tokens_are_those_of_the_original_pipeline(ckpt, tok):
    """The published tokenizer.json: digits one by one, then GPT-2's byte level."""
    metadata = ckpt.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    alphabet = [*map(chr, range(32, 127)), *"\n\t\r\u00a0\u3000", *"éß½²٣日本🤗", " ", "  ", "'s", "1", "the", "ing"]
    for _ in range(300):
        text = "".join(rng.choice(alphabet, rng.integers(1, 60)))
        ids = tok.encode(text)
        assert ids == backend.encode(text).ids
        assert tok.decode(ids) == text
        stream = tok.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text
