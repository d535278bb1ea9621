"""A decoder's layer as one call of the CPU's library, for one token of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jint8._ops.cpu.decode import ACTIVATIONS, LayerArrays, LayerShape, Normed, Projection
from jint8._ops.fused import decode_layer, fits_decode_layer, multiplied
from jint8.models._attention import Context, alibi_slopes
from jint8.models._cache import Cache, LayerCache
from jint8.models._config import ModelConfig
from jint8.models._fused import gate_blocks
from jint8.models._rope import Rotary


def fits(config: ModelConfig, mesh: Mesh | None, params: Any, x: jax.Array, at: Context, cache: Cache | None) -> bool:
    """Whether `decode` may be asked."""
    if mesh is not None or x.shape[1] != 1 or at.slot is None or at.valid is not None or type(cache) is not LayerCache:
        return False
    c = config
    known = c.norm_place in ("before", "around") and not c.experts and c.activation in ACTIVATIONS
    if not known or not c.causal:
        return False
    names = {"attention": _names(c, "qkv", "out"), "mlp": {"gate_up" if c.gated else "up", "down"}}
    if any({*params.get(part, {})} != inner for part, inner in names.items()):
        return False
    projections = [params["attention"]["qkv"], params["attention"]["out"], *params["mlp"].values()]
    if any({*projection} - {"weight", "bias"} for projection in projections):  # such as an adapter's factors
        return False
    return fits_decode_layer(x[:, 0], cache, [projection["weight"] for projection in projections])


def _names(config: ModelConfig, *names: str) -> set[str]:
    return {*names, *(("q_norm", "k_norm") if config.qk_norm else ())}


def decode(
    config: ModelConfig,
    window: int,
    params: Any,
    x: jax.Array,
    at: Context,
    angles: Rotary | None,
    cache: LayerCache,
    *,
    by_parts: Callable[..., list[jax.Array]],
) -> tuple[jax.Array, LayerCache]:
    """What comes out of a layer for `x[b, 1, d]`, and its cache.

    Args:
      config: of the model.
      window: of the layer.
      params: of the layer.
      x: what comes in.
      at: where the tokens stand.
      angles: of rotary positions.
      cache: of the layer.
      by_parts: the same of `(config, window)` and the operands of `decode_layer`, for programs without the library.
    """
    assert at.slot is not None
    c = config
    turned = None if angles is None else (angles.sin.reshape(len(x), -1), angles.cos.reshape(len(x), -1))
    shape = LayerShape(
        groups=c.num_heads // c.num_kv_heads,
        window=window,
        rotated=0 if turned is None else turned[0].shape[1],
        hidden=c.intermediate_size,
        blocks=gate_blocks(c.intermediate_size) if c.gated else 0,
        activation=ACTIVATIONS.index(c.activation),
        parallel=c.parallel,
        centered=c.norm == "layer",
        eps=float(c.norm_eps),
        offset=float(c.norm_offset),
        query_scale=float(c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale),
        softcap=float(c.attention_softcap),
        slopes=tuple(map(float, alibi_slopes(c.num_heads))) if c.alibi else (),
    )
    y, *arrays = decode_layer(
        x[:, 0],
        params,
        at.slot,
        at.first,
        turned,
        (cache.key, cache.value),
        shape=shape,
        config=params["attention"]["qkv"]["weight"].config,
        arrays_of=_arrays,
        by_xla=by_parts,
        static=(c, window),
    )
    return y[:, None], LayerCache(*arrays)


def _arrays(params: Any) -> LayerArrays:
    attention, mlp = params["attention"], params["mlp"]
    norm = lambda part: Normed(part.get("scale"), part.get("bias"))
    projection = lambda part: Projection(multiplied(part["weight"]), part.get("bias"))
    return LayerArrays(
        attention_norm=norm(params["attention_norm"]),
        qkv=projection(attention["qkv"]),
        q_norm=norm(attention.get("q_norm", {})),
        k_norm=norm(attention.get("k_norm", {})),
        out=projection(attention["out"]),
        attention_out_norm=norm(params.get("attention_out_norm", {})),
        mlp_norm=norm(params["mlp_norm"]),
        up=projection(mlp["gate_up"] if "gate_up" in mlp else mlp["up"]),
        down=projection(mlp["down"]),
        mlp_out_norm=norm(params.get("mlp_out_norm", {})),
    )
