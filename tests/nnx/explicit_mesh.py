"""nnx models with `out_sharding=` on a mesh with explicit axes: how results are divided, and their errors, as JSON."""

import json

import cases
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import jint8

P = PartitionSpec


def divided(*names):
    return {"out_sharding": names}


class Layers(nnx.Module):
    """Columns divided, then rows, as Megatron does; then heads by two kinds of layers."""

    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs, kernel_metadata=divided(None, "model"), bias_metadata=divided("model"))
        self.down = nnx.Linear(128, 64, rngs=rngs, kernel_metadata=divided("model", None))
        self.lora = nnx.LoRALinear(64, 64, lora_rank=2, rngs=rngs)
        heads = divided(None, "model", None)
        self.einsum = nnx.Einsum("bsd,dnh->bsnh", (64, 8, 4), rngs=rngs, kernel_metadata=heads)
        self.general = nnx.LinearGeneral(64, (8, 4), rngs=rngs, kernel_metadata=heads)

    def __call__(self, x):
        x = self.up(x, out_sharding=P("data", None, "model"))
        x = self.down(jax.nn.relu(x), out_sharding=P("data", None, None))
        x = self.lora(x, out_sharding=P("data", None, None))
        heads = P("data", None, "model", None)
        return self.einsum(x, out_sharding=heads) + self.general(x, out_sharding=heads)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(40, 64, rngs=rngs, embedding_metadata=divided("model", None))
        self.dense = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens, out_sharding=P("data", None, None))
        return self.embed.attend(self.dense(x), out_sharding=P("data", None, "model"))


class Own(nnx.Module):
    """Code of its own, that says how products are divided where it has to, and a head that follows from its weight."""

    def __init__(self, rngs):
        normal = lambda *shape: jax.random.normal(rngs.params(), shape) / 8
        self.up = nnx.Param(normal(64, 128), out_sharding=(None, "model"))
        self.bias = nnx.Param(jnp.ones(128), out_sharding=("model",))
        self.down = nnx.Param(normal(128, 64), out_sharding=("model", None))
        self.heads = nnx.Param(normal(64, 8, 4), out_sharding=(None, "model", None))

    def __call__(self, x):
        x = jnp.dot(x, self.up[...], out_sharding=P("data", None, "model")) + self.bias[...]
        x = jnp.dot(jax.nn.relu(x), self.down[...], out_sharding=P("data", None, None))
        return jnp.einsum("bsd,dnh->bsnh", x, self.heads[...])


def summary(y):
    return [str(entry) for entry in jax.typeof(y).sharding.spec]


def distance(got, want):
    whole = lambda y: jax.sharding.reshard(y, P())
    return float(jnp.linalg.norm(whole(got) - whole(want)) / jnp.linalg.norm(whole(want)))


found = {}
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
x = cases.normal(4, 6, 64)
tokens = jnp.arange(24).reshape(4, 6)
with jax.set_mesh(mesh):
    for make, inputs in ((Layers, x), (Tied, tokens), (Own, x)):
        inputs = jax.device_put(inputs, P("data"))
        model = make(nnx.Rngs(0))
        int8 = jint8.nnx.quantize(model, inputs, include="embed")
        want = model(inputs)
        graphdef, state = nnx.split(int8)
        run = jax.jit(lambda state, inputs, graphdef=graphdef: nnx.merge(graphdef, state)(inputs))
        found[make.__name__] = {
            "weights": {
                "/".join(path): summary(w.get_value().q)
                for path, w in nnx.to_flat_state(nnx.state(int8, jint8.nnx.Quantized))
            },
            "float": summary(want),
            "results": [[summary(got), distance(got, want)] for got in (int8(inputs), run(state, inputs))],
        }
    model = Layers(nnx.Rngs(0))
    loss = lambda model: jnp.sin(model(jax.device_put(x, P("data")))).sum()
    of_lora = nnx.DiffState(0, nnx.LoRAParam)
    got, want = (
        nnx.grad(loss, argnums=of_lora)(m)["lora"]["lora"]["lora_b"] for m in (jint8.nnx.quantize(model), model)
    )
    found["gradient"] = distance(got.get_value(), want.get_value())
print(json.dumps(found))
