"""A tiny random Llama with a byte-level tokenizer, as a Hugging Face directory."""

import json

import numpy as np
from checkpoint_files import write_directory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
}
SPECIAL = ("<s>", "</s>", "<pad>")
VOCAB = len(SPECIAL) + 256
# Of the projections: weights and output channels; and all other weights (embedding, head, norms).
WEIGHTS, CHANNELS, OTHERS = 2 * ((64 + 32 + 96) * 32 + 32 * 48), 2 * (64 + 32 + 96 + 32), 2 * VOCAB * 32 + 5 * 32
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def make_llama_directory(path, *, seed, tie=False, shards=1, dtype=np.float32, bos=False, scale=1.0, outliers=True):
    """Writes the directory and returns `path`.

    `bos`: the tokenizer adds one to a text. `scale`: of the output head, so that the distribution is more peaked.
    `outliers`: two feature dimensions of the residual stream exceed 6 after each norm.
    """
    tensors = llama_weights(seed, tie=tie, scale=scale, outliers=outliers)
    names = list(tensors)
    tensors = {name: x.astype(dtype) for name, x in tensors.items()}
    if shards == 1:
        files = {"model.safetensors": tensors}
    else:
        part = lambda i: {name: tensors[name] for name in names[i::shards]}
        files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": part(i) for i in range(shards)}
    write_directory(path, files, config=CONFIG | {"vocab_size": VOCAB, "tie_word_embeddings": tie})
    byte_tokenizer(bos=bos).save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def llama_weights(seed, *, tie=False, scale=1.0, outliers=True):
    """float32 weights by their Hugging Face names."""
    rng = np.random.default_rng(seed)
    h, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv = h // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    matrix = lambda n, k: (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
    gain = 1 + rng.standard_normal(h).astype(np.float32) / 10
    if outliers:
        gain[[3, 17]] = 8
    weights = {"model.embed_tokens.weight": matrix(VOCAB, h) * 3}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        weights |= {at + "input_layernorm.weight": gain, at + "post_attention_layernorm.weight": gain}
        shapes = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        weights |= {f"{at}self_attn.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        shapes = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
        weights |= {f"{at}mlp.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    weights["model.norm.weight"] = np.full(h, scale, np.float32)
    if not tie:
        weights["lm_head.weight"] = matrix(VOCAB, h)
    return weights


def byte_tokenizer(*, bos=False):
    """Each byte is a token; `bos`: a text begins with `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer
