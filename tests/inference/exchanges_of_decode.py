"""What the compiled decode loop exchanges between eight devices, as JSON; see `test_mesh.py`."""

import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jint8
from jint8._inference.generate import State, decode, empty_cache
from jint8._inference.sampling import Sampling
from jint8.models import Decoder, model_config, partition_specs

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
# devices by batch and by model, rows, who decides on outliers. Rows of one device are few (digits) or many (gathered).
CASES = {
    "one_row": ((1, 8), 1, "batch"),
    "rows_on_two_axes": ((2, 4), 8, "token"),
    "experts": ((1, 8), 1, "batch"),
    "int8_cache": ((1, 8), 1, "batch"),
}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SLOTS = 128
OPERATION = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def program(config, kind, devices, rows, outliers):
    """The compiled loop, from shapes alone."""
    mesh = jax.make_mesh(devices, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    whole = NamedSharding(mesh, P())
    model = Decoder(model_config(config), mesh=mesh)

    def int8_params():
        params = model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
        return jint8.quantize_params(params, config=jint8.Config(outliers=outliers), skip=["embedding"])

    def placed(tree, shardings):
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
        )

    def state(params):
        cache = empty_cache(model, params, rows, SLOTS, kind)
        ended = jnp.zeros(rows, bool)
        return State(jnp.zeros((rows, SLOTS), jnp.int32), jnp.int32(1), None, ended, cache, jax.random.key(0))

    params = jax.eval_shape(int8_params)
    params = placed(params, jint8.shardings(params, partition_specs(params, mesh), mesh=mesh))
    abstract = jax.eval_shape(state, params)
    cache = empty_cache(model, params, rows, SLOTS, kind)
    shardings = jax.tree.map(lambda _: whole, abstract._replace(cache=[]))
    shardings = shardings._replace(cache=jax.tree.map(lambda leaf: leaf.sharding, cache))
    sampling = Sampling.of(end_tokens=(3,)).known()
    begin = placed(abstract, shardings)
    return decode.lower(model, {"params": params}, begin, jnp.int32(SLOTS), sampling).compile().as_text()


def exchanges(text):
    """Of everything but the entry computation: where, operation, reduction, dtypes and shapes."""
    bodies = dict(re.findall(r"^(?:ENTRY )?(%\S+) .*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    entry = re.search(r"^ENTRY (%\S+)", text, re.MULTILINE)[1]
    found = []
    for name, body in bodies.items():
        for line in body.splitlines() if name != entry else ():
            if match := OPERATION.search(line):
                to_apply = re.search(r"to_apply=(%[^\s,]+)", line)
                reduction = re.search(r"ROOT .* (\w+)\(", bodies[to_apply[1]])[1] if to_apply else None
                shapes = [[kind, json.loads(f"[{size}]")] for kind, size in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]
                found.append([place(line), match[2], reduction, shapes])
    return found


def place(line):
    name = re.search(r'op_name="([^"]*)"', line)[1]
    if layer := re.search(r"layers_\d+/\w+/\w+", name):
        return layer[0]
    return "embedding" if "Decoder" in name else "sampling"


def donated_cache(text):
    """How many results take over the memory of an argument of the cache's size."""
    header = text.splitlines()[0]
    parameters = re.search(r"entry_computation_layout=\{\((.*?)\)->", header)[1]
    parameters = re.findall(r"\w+\[[\d,]*\]", parameters)
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", header)[1]
    donated = [parameters[int(i)] for i in re.findall(r"\((\d+), ", aliases)]
    return sum(f",{SLOTS}" in parameter and parameter.count(",") == 3 for parameter in donated)


found = {}
for name, case in CASES.items():
    kind = "int8" if name == "int8_cache" else None
    text = program(CONFIG | (EXPERTS if name == "experts" else {}), kind, *case)
    found[name] = {"loop": exchanges(text), "donated_cache": donated_cache(text)}
print(json.dumps(found))
