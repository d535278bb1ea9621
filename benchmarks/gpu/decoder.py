"""Stage "decoder": a Llama of a few layers through jint8, as int8 and as bf16: its prefill, a step, and generation."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu import clock
from gpu.record import Record
from gpu.setting import Setting, compile_all, text_of

import jint8
from jint8.models import Decoder, ModelConfig, Rope

# Two of Llama 3.1 8B's layers, whose weights are several times the L2 cache, and a small vocabulary: the head isn't
# quantized, and its time would hide theirs.
LAYERS, HEAD, VOCABULARY = 2, 128, 4096
ROPE = Rope(frequencies=tuple(5e5 ** (-i / (HEAD // 2)) for i in range(HEAD // 2)))
MODEL = ModelConfig(
    family="llama",
    vocab_size=VOCABULARY,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=LAYERS,
    num_heads=32,
    num_kv_heads=8,
    head_dim=HEAD,
    max_positions=8192,
    rope=ROPE,
)
TOY = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=Rope(frequencies=(1.0, 0.1, 0.01, 0.001)),
)
OUTLIER_FEATURES = 6
BATCHES = (1, 16)
PROMPT, SLOTS, NEW = 512, 128, 64
LARGEST_ERROR = 0.15  # of int8's logits, relative to those of bf16 in the 2-norm; random weights average nothing out


def run(record: Record, setting: Setting) -> None:
    """Prefill and steps of both models by the device's clock, then `generate_tokens` by the host's."""
    record.put(tuned=setting.use_tuned(), clock=setting.clock)
    config = TOY if setting.rehearse else MODEL
    prompt, slots, new = (8, 8, 4) if setting.rehearse else (PROMPT, SLOTS, NEW)
    model = Decoder(config, jnp.bfloat16)
    floats = parameters(model)
    trees = {"bf16": floats, "int8": jint8.quantize_params(floats)}
    record.put(
        layers=config.num_layers, weight_bytes={kind: jint8.memory_report(tree).bytes for kind, tree in trees.items()}
    )
    tokens = jax.random.randint(jax.random.key(1), (1, prompt), 0, config.vocab_size)

    batches = (2,) if setting.rehearse else BATCHES
    compiled = _compiled(record, programs(model, trees, tokens, batches, slots))
    for batch in batches:
        if times := _times(compiled, batch, setting.clock):
            record.add("steps", {"batch": batch, **times})
    if times := _times(compiled, "prefill", setting.clock):
        _compare(record, {kind: np.asarray(compiled[kind, "prefill"][0](tree, tokens)) for kind, tree in trees.items()})
        record.put(prefill={"tokens": prompt, **times})
    for batch in batches:
        row: dict[str, Any] = {"batch": batch, "prompt": prompt, "new_tokens": new}
        for kind, tree in trees.items():
            language_model = jint8.LanguageModel(model, tree["params"], None, config, jint8.Config())
            row[kind] = _generation(language_model, batch, prompt, new)
            if "error" in row[kind]:
                record.fail(f"{kind}, batch {batch}: {row[kind]['error']}")
        record.add("generation", row)


def programs(
    model: Decoder, trees: dict[str, Any], tokens: jax.Array, batches: tuple[int, ...], slots: int
) -> dict[Any, tuple[Any, tuple]]:
    """(kind, batch) -> a step at the last slot of the cache, and (kind, "prefill"): functions and their arguments."""

    def prefill(params, tokens):
        return model.apply(params, tokens, last=True)[0]

    def step(params, tokens, cache):
        return model.apply(params, tokens, jint8.models.context(tokens, jnp.int32(slots - 1)), cache)[0]

    found: dict[Any, tuple[Any, tuple]] = {}
    for kind, tree in trees.items():
        for batch in batches:
            cache = jint8.models.make_cache(model.config, batch, slots, jnp.bfloat16)
            found[kind, batch] = step, (tree, jnp.ones((batch, 1), jnp.int32), cache)
        found[kind, "prefill"] = prefill, (tree, tokens)
    return found


def parameters(model: Decoder) -> dict[str, Any]:
    """Random bfloat16 weights, and gains of norms that make a few features of every layer's input outliers."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    width = model.config.hidden_size
    gain = jnp.ones(width, jnp.bfloat16).at[jnp.arange(OUTLIER_FEATURES) * (width // 7)].set(30)
    tree = dict(params["params"])
    for i in range(model.config.num_layers):
        norms = {name: {"scale": gain} for name in ("attention_norm", "mlp_norm")}
        tree[f"layers_{i}"] = {**tree[f"layers_{i}"], **norms}
    return {"params": tree}


def _compiled(record: Record, programs: dict[Any, tuple[Any, tuple]]) -> dict[Any, tuple[Any, tuple, int]]:
    """Each for itself, because XLA times several algorithms of its own products as it compiles them."""
    made = {key: compile_all({key: program})[key] for key, program in programs.items()}
    for key, program in made.items():
        if isinstance(program, str):
            record.fail(f"{key} doesn't compile: {program}")
    return {key: (program, programs[key][1], 1) for key, program in made.items() if not isinstance(program, str)}


def _compare(record: Record, logits: dict[str, np.ndarray]) -> None:
    error = float(np.linalg.norm(logits["int8"] - logits["bf16"]) / np.linalg.norm(logits["bf16"]))
    record.put(logits_error=error)
    if not error < LARGEST_ERROR:
        record.fail(f"int8's logits are off by {error} from bf16's, more than {LARGEST_ERROR}")


def _times(compiled: dict[Any, tuple[Any, tuple, int]], what: Any, clock_kind: str) -> dict[str, Any]:
    """Times of the program of both models, and their ratios; empty if one is missing."""
    programs = {kind: program for (kind, name), program in compiled.items() if name == what}
    if len(programs) < 2:
        return {}
    times = clock.measure(programs, clock_kind)
    ratio = {"times_bf16": times["bf16"]["us"] / times["int8"]["us"]}
    return {**times, **ratio, "times_bf16_wall": times["bf16"]["wall_us"] / times["int8"]["wall_us"]}


def _generation(model: jint8.LanguageModel, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Seconds to the first token and tokens per second from there on, as a user has them; the second of two runs."""
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    found: dict[str, Any] = {}
    try:
        for label in ("first_run_seconds", "seconds"):
            start = time.perf_counter()
            blocks = model.generate_tokens(prompts, max_tokens=new + 1, every=new)
            next(blocks)
            first = time.perf_counter()
            count = sum(block.size for block in blocks)
            end = time.perf_counter()
            found[label] = end - start
    except Exception as error:
        return {"error": text_of(error)}
    return {**found, "first_token_s": first - start, "tokens_per_s": count / (end - first)}
