"""Toy models of MaxText, from its own package; as a script, sparse Mixtral on a mesh of eight devices, as JSON."""

import json
import os

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from flax import linen as nn
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.models import models
from maxtext.utils import maxtext_utils, model_creation_utils, sharding

import jint8

SMALL = {
    "run_name": "tiny",
    "enable_checkpointing": False,
    "base_emb_dim": 64,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 16,
    "base_mlp_dim": 128,
    "base_moe_mlp_dim": 128,
    "base_num_decoder_layers": 3,
    "vocab_size": 128,
    "max_target_length": 32,
    "max_prefill_predict_length": 16,
    "per_device_batch_size": 1.0,
    "attention": "dot_product",
    "dtype": "float32",
    "skip_jax_distributed_system": True,
    "log_config": False,
}
EXPERTS = {"decoder_block": "mixtral", "num_experts": 4, "num_experts_per_tok": 2, "megablox": False}
DECODERS = {
    "llama2": {},
    "qwen3": {"decoder_block": "qwen3", "use_qk_norm": True},
    "mixtral, dense": {**EXPERTS, "sparse_matmul": False},
    "mixtral, sparse": {**EXPERTS, "sparse_matmul": True},
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 16)))
INPUTS = TOKENS, jnp.broadcast_to(jnp.arange(16), TOKENS.shape), jnp.ones_like(TOKENS)  # tokens, positions, segments


def config(name, **settings):
    base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    return pyconfig.initialize(["", base], **SMALL, **DECODERS[name], **settings)


def module(name, mode="train", **settings):
    settings = config(name, **settings)
    mesh = maxtext_utils.get_mesh_from_config(settings)
    with mesh, nn.logical_axis_rules(settings.logical_axis_rules):
        return model_creation_utils.from_config(
            settings, mesh=mesh, rngs=nnx.Rngs(params=0, dropout=1), model_mode=mode
        )


def from_config(name, **settings):
    """The model as a function of its parameters and inputs, and these parameters."""
    graphdef, params, rest = nnx.split(module(name, **settings), nnx.Param, ...)

    def run(params, *inputs):
        return nnx.merge(graphdef, params, rest, copy=True)(*inputs, enable_dropout=False)

    return run, params


def with_cache(name, **settings):
    """As `from_config`, for prefill and for decoding; it takes a cache as well, and returns a new one beside logits."""
    graphdef, params, cache, rest = nnx.split(module(name, "prefill", **settings), nnx.Param, nnx.Cache, ...)
    graphdefs = {"prefill": graphdef, "autoregressive": nnx.split(module(name, "autoregressive", **settings))[0]}

    def run(params, cache, tokens, positions, segments, mode):
        model = nnx.merge(graphdefs[mode], params, cache, rest, copy=True)
        logits = model(tokens, positions, decoder_segment_ids=segments, enable_dropout=False, model_mode=mode)
        return logits, nnx.state(model, nnx.Cache)

    return run, params, cache


def as_linen(name, **settings):
    """The model in MaxText's own `ToLinen`, and its variables."""
    settings = config(name, **settings)
    model = models.transformer_as_linen(settings, maxtext_utils.get_mesh_from_config(settings), quant=None)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return model, model.init(keys, *INPUTS, enable_dropout=False)


def main():
    settings = {"scan_layers": True, "ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2}
    cfg = config("mixtral, sparse", **settings)
    mesh = maxtext_utils.get_mesh_from_config(cfg)
    inputs = [jnp.tile(value, (4, 1)) for value in INPUTS]
    with mesh, nn.logical_axis_rules(cfg.logical_axis_rules):
        run, params = from_config("mixtral, sparse", **settings)
        divided = sharding.nnx_construct_named_sharding(params, mesh)
        params = jax.device_put(params, divided)
        want = jax.jit(run)(params, *inputs)
        int8 = jint8.quantize_params(params, plan=jint8.plan(run, params, *inputs))
        int8 = jax.device_put(int8, jint8.shardings(int8, nnx.get_partition_spec(divided), mesh=mesh))
        got = jax.jit(jint8.apply(run))(int8, *inputs)
    wi_0 = int8["decoder"]["layers"]["MoeBlock_0"]["wi_0"].get_value()
    part = wi_0.q.addressable_shards[0].data.shape
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(json.dumps({"devices": len(jax.devices()), "error": float(error), "wi_0": part}))


if __name__ == "__main__":
    main()
