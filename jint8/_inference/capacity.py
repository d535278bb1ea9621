"""Whether a model fits on devices: its programs compiled for them without weights.

Nothing is allocated: parameters are shapes with shardings, and XLA says what the compiled programs take. All layers
have the same shapes, so that each number grows by the same amount with each layer: models of one and of two layers are
compiled, and the numbers of more layers extrapolated.

Programs are compiled in float32, whatever the dtype: XLA's CPU backend would make float32 copies of 16-bit weights,
which GPUs multiply as they are. So temporaries come out larger than they are with 16-bit activations, never smaller.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from jint8._convert.targets import abstract_quantized_params
from jint8._core.config import Config
from jint8._core.qtensor import is_qtensor
from jint8._inference.collectives import KINDS, collectives
from jint8._inference.generate import CHUNK, SLOTS, bucket, cache_sharding, decode, prefill_at_once
from jint8._inference.sampling import Sampling
from jint8._trees.sharding import shardings
from jint8.models import Decoder, ModelConfig, make_cache, partition_specs

EMBEDDINGS = ("embedding", "positions", "lm_head")

Numbers = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What one device holds, and exchanges with the others. Bytes, unless said otherwise.

    Attributes:
      projections: int8 values.
      scales: of those.
      embeddings: tables and the output head, as they are.
      others: norms, biases, routers.
      float_weights: all of them in 16 bits.
      cache: keys and values of the whole context.
      prefill, decode: temporaries of a prompt's last chunk, and of a token, with float32 activations.
      collectives: by kind, (how many, bytes of their results) per decoded token.
      gathers: the same, of those in the loop over blocks of outlier columns: once per block, none without outliers.
    """

    projections: int
    scales: int
    embeddings: int
    others: int
    float_weights: int
    cache: int
    prefill: int
    decode: int
    collectives: Mapping[str, tuple[int, int]]
    gathers: Mapping[str, tuple[int, int]]

    @property
    def weights(self) -> int:
        """All parameters."""
        return self.projections + self.scales + self.embeddings + self.others

    @property
    def needed(self) -> int:
        """Weights, cache and the larger of the temporaries."""
        return self.weights + self.cache + max(self.prefill, self.decode)


def known_models() -> dict[str, dict[str, Any]]:
    """Configurations by name: `{"source": where it was published, "config": as in config.json}`."""
    return json.loads(resources.files("jint8").joinpath("data/models.json").read_text(encoding="utf-8"))


def capacity(
    config: ModelConfig,
    devices: int,
    *,
    context: int,
    batch: int,
    dtype: DTypeLike,
    quant: Config,
    cache: str | None = None,
) -> Capacity:
    """What each of `devices` holds of a model that is sharded over them as `jint8.load` does it.

    Args:
      config: of the model.
      devices: how many; JAX must have as many CPU devices, real or virtual.
      context: tokens of a prompt and its answer; rounded up to `SLOTS`.
      batch: sequences.
      dtype: of activations, and of the parameters that aren't quantized.
      quant: how to quantize.
      cache: of keys and values: `"int8"`, or None for `dtype`.

    Returns:
      A `Capacity`.

    Raises:
      ValueError: the number of heads isn't a multiple of the devices', or there are fewer CPU devices.
    """
    mesh = model_mesh(config, devices)
    weights, floats = _weights(config, mesh, dtype, quant)
    one, two = (
        measure(layers(config, n), mesh, context=context, batch=batch, quant=quant, cache=cache) for n in (1, 2)
    )
    total = {name: at_layers(one.get(name, 0), two.get(name, 0), config.num_layers) for name in {**one, **two}}

    def per(unit: str) -> dict[str, tuple[int, int]]:
        found = {kind: (total.get(f"{unit} {kind}", 0), total.get(f"{unit} {kind} bytes", 0)) for kind in KINDS}
        return {kind: numbers for kind, numbers in found.items() if numbers[0]}

    return Capacity(
        **weights,
        float_weights=floats,
        cache=total["cache"] if cache else total["cache"] // 4 * jnp.dtype(dtype).itemsize,  # compiled in float32
        prefill=total["prefill"],
        decode=total["decode"],
        collectives=per("token"),
        gathers=per("block"),
    )


def at_layers(one: int, two: int, layers: int) -> int:
    """A number for `layers` layers, extrapolated from its values for one and for two."""
    return one + (layers - 1) * (two - one)


def longest_context(needed: Callable[[int], int], room: int, limit: int, first: int) -> int:
    """The longest context, in steps of `SLOTS`, whose `needed` bytes are at most `room`; 0 where there is none.

    `needed` compiles programs, so it is called as rarely as can be. It is nearly linear: instead of halving the
    interval, the next context to try is where a straight line from the shortest through the latest reaches `room`.

    Args:
      needed: bytes at a context.
      room: bytes that are available.
      limit: the longest to look at.
      first: the one to try first.

    Returns:
      A multiple of `SLOTS`, `limit`, or 0.
    """
    low, high = SLOTS, in_slots(limit)
    if needed(low) > room:
        return 0
    fits, fails = low, high + SLOTS  # the answer is at least `fits`, and below `fails`
    candidate = in_slots(first)
    while fails - fits > SLOTS:
        candidate = min(max(candidate, fits + SLOTS), fails - SLOTS)
        bytes_of_candidate = needed(candidate)
        if bytes_of_candidate <= room:
            fits = candidate
        else:
            fails = candidate
        slope = (bytes_of_candidate - needed(low)) / (candidate - low)
        if slope <= 0:  # no line to follow: from the upper end down
            candidate = fails - SLOTS
            continue
        candidate = low + int((room - needed(low)) / slope) // SLOTS * SLOTS
    return min(fits, limit)


def in_slots(context: int) -> int:
    """The slots of a cache for so many tokens."""
    return -(-context // SLOTS) * SLOTS


def layers(config: ModelConfig, count: int) -> ModelConfig:
    """The same model with so many layers."""
    return dataclasses.replace(config, num_layers=count, windows=config.windows[:count])


def model_mesh(config: ModelConfig, devices: int) -> Mesh:
    """CPU devices to shard a model over.

    Raises:
      ValueError: the model's heads can't be distributed evenly over them, or JAX has fewer.
    """
    if config.num_heads % devices:
        raise ValueError(
            f"Expected a number of devices that divides the model's {config.num_heads} heads, got {devices}."
        )
    cpus = jax.devices("cpu")
    if len(cpus) < devices:
        raise ValueError(f"Expected {devices} CPU devices, got {len(cpus)}: set jax_num_cpu_devices before JAX starts.")
    return jax.make_mesh((devices,), ("model",), axis_types=(AxisType.Auto,), devices=cpus[:devices])


def _sharded(params: Any, mesh: Mesh) -> Any:
    """The same shapes with the shardings that `jint8.load` gives them."""
    placed = shardings(params, partition_specs(params, mesh), mesh=mesh)
    return jax.tree.map(_with_sharding, params, placed)


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _weights(config: ModelConfig, mesh: Mesh, dtype: DTypeLike, quant: Config) -> tuple[dict[str, int], int]:
    """Bytes of the parameters on a device, by what they are, and of all of them in 16 bits."""
    model = Decoder(config, dtype)
    groups = dict.fromkeys(("projections", "scales", "embeddings", "others"), 0)
    params = _sharded(abstract_quantized_params(model, quant, mesh), mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            values = _bytes_per_device(leaf.q)
            groups["projections"] += values
            groups["scales"] += _bytes_per_device(leaf) - values
        else:
            group = "embeddings" if path[0].key in EMBEDDINGS else "others"
            groups[group] += _bytes_per_device(leaf)
    plain = _sharded(abstract_quantized_params(Decoder(config, jnp.bfloat16), Config(scheme="none")), mesh)
    return groups, _bytes_per_device(plain)


def measure(
    config: ModelConfig, mesh: Mesh, *, context: int, batch: int, quant: Config, cache: str | None = None
) -> Numbers:
    """What XLA says of prefill and decode of all layers, compiled for the devices of `mesh`: bytes on each, and counts.

    `cache` is the kind of keys and values: `"int8"`, or None, which is float32 here as all activations are. Of a long
    prompt, its last chunk is compiled: it attends to the most keys, so it takes the most memory.
    """
    model, slots = Decoder(config, mesh=mesh), in_slots(context)
    params = {"params": _sharded(abstract_quantized_params(model, quant, mesh), mesh)}
    prompt = jax.ShapeDtypeStruct((batch, min(bucket(context), slots - 1)), jnp.int32)
    before = None
    if prompt.shape[1] > CHUNK:  # the last chunk attends to all of them
        sharding = cache_sharding(model, params, batch)
        before = jax.eval_shape(lambda: make_cache(config, batch, slots, cache or model.dtype))
        before = jax.tree.map(lambda leaf: _with_sharding(leaf, sharding), before)
    key = jax.eval_shape(lambda: jax.random.key(0))
    sampling = Sampling.of().known()
    lowered = prefill_at_once.lower(model, params, prompt, None, key, before, slots, sampling, cache)
    begin = lowered.compile(_QUICKLY)
    state = jax.tree.map(_with_sharding, lowered.out_info, begin.output_shardings)
    step = decode.lower(model, params, state, jax.ShapeDtypeStruct((), jnp.int32), sampling).compile(_QUICKLY)
    of_prefill: Any = begin.memory_analysis()
    of_decode: Any = step.memory_analysis()
    return {
        "arguments": of_decode.argument_size_in_bytes,
        "outputs": of_decode.output_size_in_bytes,
        "prefill": of_prefill.temp_size_in_bytes,
        "decode": of_decode.temp_size_in_bytes,
        "cache": _bytes_per_device(state.cache),
        **_collective_numbers(str(step.as_text())),
    }


# Compiles faster: LLVM doesn't optimize machine code that never runs. XLA has chosen buffers and collectives before.
_QUICKLY: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _collective_numbers(text: str) -> dict[str, int]:
    """Counts and bytes of the collectives of each decoded token, and of each block of outlier columns in it."""
    numbers: dict[str, int] = {}
    for kind, nbytes, depth in collectives(text):
        if depth == 0:  # outside of the loop over tokens: once per call
            continue
        name = f"{'token' if depth == 1 else 'block'} {kind}"
        numbers[name] = numbers.get(name, 0) + 1
        numbers[f"{name} bytes"] = numbers.get(f"{name} bytes", 0) + nbytes
    return numbers
