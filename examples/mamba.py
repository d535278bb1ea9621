"""A bidirectional S6 (Mamba) in int8 without a changed line, and what each way to quantize it costs.

The model is a real one: typeseg (PyPI, Apache-2.0) tells for each byte of a text in which of 35 languages or formats it
is written. Its wheel has the weights, and is read as it is:

    pip download --no-deps typeseg==0.2.7
    python examples/mamba.py typeseg-0.2.7-py3-none-any.whl

Mamba is hard to quantize: what reaches the last projection of a layer is a product of a sum over all positions and a
gate, with values up to a hundred thousand beside small ones.
"""

import argparse
import sysconfig
import typing
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

import jint8

WEIGHTS = "typeseg/data/mamba_al.npz"  # in the wheel
OTHER = 128  # the token of all bytes that aren't ASCII text

# What the model is run on unless other texts are named: files that come with Python.
TEXTS = (
    "json/decoder.py",
    "email/architecture.rst",
    "idlelib/ChangeLog",
    "idlelib/config-keys.def",
    "idlelib/help.html",
    "LICENSE.txt",
    "venv/scripts/common/activate",
    "venv/scripts/common/Activate.ps1",
)
PRESETS = typing.get_args(typing.get_type_hints(jint8.Config.preset)["name"])  # all that this version of jint8 has
CONFIGS = {
    "vector": jint8.Config(scheme="vector"),
    "llm.int8": jint8.Config(),
    "llm.int8, calibrated columns": jint8.Config(outliers="static"),
    **{f"preset {name}": jint8.Config.preset(name) for name in PRESETS},
}


def recurrence(u, step, b, c, a, *, reverse):
    """The selective scan: h_t = exp(step_t a) h_(t-1) + step_t u_t b_t, of which the result is h_t . c_t.

    Args:
      u, step: [batch, time, inner], a channel's input and how far it moves the state.
      b, c: [batch, time, state], what writes to the state and what reads it; these depend on the input, too.
      a: [inner, state], negative: how fast the state is forgotten.
      reverse: from the last position to the first.

    Returns:
      [batch, time, inner].
    """

    def advance(h, now):
        u, step, b, c = now
        h = jnp.exp(step[:, None] * a.T) * h + b[..., None] * (step * u)[:, None]
        return h, jnp.sum(h * c[..., None], axis=1)

    time_first = [jnp.swapaxes(x, 0, 1) for x in (u, step, b, c)]
    start = jnp.zeros((u.shape[0], *a.T.shape), u.dtype)  # channels last: the sum over the state is then one of vectors
    _, y = jax.lax.scan(advance, start, time_first, reverse=reverse)
    return jnp.swapaxes(y, 0, 1)


class Block(nn.Module):
    """One layer. Its parameters have the names that Flax gives them by itself, as those in the wheel do."""

    inner: int
    state: int
    rank: int

    @nn.compact
    def __call__(self, x):  # [batch, time, width]
        h = nn.LayerNorm(use_fast_variance=False)(x)
        u, gate = jnp.split(nn.Dense(2 * self.inner)(h), 2, axis=-1)
        u = nn.silu(nn.Conv(self.inner, (4,), feature_group_count=self.inner)(u))
        selected = nn.Dense(self.rank + 2 * self.state)(u)
        step, b, c = jnp.split(selected, [self.rank, self.rank + self.state], axis=-1)
        step = nn.softplus(nn.Dense(self.inner)(step)) + 1e-4
        log = lambda key, shape: jnp.broadcast_to(jnp.log1p(jnp.arange(shape[1], dtype=jnp.float32)), shape)
        a = -jnp.exp(self.param("A_log", log, (self.inner, self.state)))
        skip = self.param("D", nn.initializers.ones, (self.inner,))
        y = recurrence(u, step, b, c, a, reverse=False) + recurrence(u, step, b, c, a, reverse=True) + 2 * skip * u
        return x + nn.Dense(x.shape[-1])(y * nn.silu(gate))


class Model(nn.Module):
    """Tokens [batch, time] to logits [batch, time, classes]. The sizes are those of the weights in the wheel."""

    layers: int = 6
    width: int = 256
    state: int = 16
    rank: int = 16
    classes: int = 35

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(OTHER + 2, self.width)(tokens)
        for layer in range(self.layers):
            x = Block(self.width, self.state, self.rank, name=f"CheckpointMambaBlock1D_{layer}")(x)
        return nn.Dense(self.classes)(nn.LayerNorm(use_fast_variance=False)(x))


def read_weights(wheel):
    """The parameters out of the wheel, as `Model().init` would return them."""
    with zipfile.ZipFile(wheel) as archive, archive.open(WEIGHTS) as file, np.load(file) as arrays:
        return {"params": unflatten_dict({tuple(name.split("__")): arrays[name] for name in arrays.files})}


def tokens_of(text):
    """int32 [bytes]: printable ASCII, tabs and line ends are themselves, all other bytes are one token."""
    codes = np.frombuffer(text, np.uint8).astype(np.int32)
    known = (codes >= 0x20) & (codes <= 0x7E) | np.isin(codes, (0x09, 0x0A, 0x0D))
    return np.where(known, codes, OTHER)


def pieces(files, length):
    """Two tokenized pieces [1, length] of each file: the first to measure on, the next one to calibrate on."""
    tokens = [tokens_of(Path(file).read_bytes()) for file in files]
    return [x[None, :length] for x in tokens], [x[None, length : 2 * length] for x in tokens]


def measure(model, params, inputs, calibration, configs):
    """KL from float in nats, share of equal top classes and bytes, by the config's name; averages over positions."""
    plan = jint8.plan(model.apply, params, inputs[0])
    # The outlier columns by their mean square. The paper's criterion, a magnitude of 6, would take nearly all of them.
    found = jint8.calibrate(model.apply, params, calibration, plan=plan, budget=8)
    run_float, run = jax.jit(model.apply), jax.jit(jint8.apply(model.apply))
    wanted = [log_probabilities(run_float(params, x)) for x in inputs]
    results = {}
    for name, config in configs.items():
        calibrated = config.outliers == "static" or getattr(config, "rotate", 0)
        int8 = jint8.quantize_params(params, config=config, plan=plan, outliers=found if calibrated else None)
        run_it = run_float if config.scheme == "none" else run
        got = [log_probabilities(run_it(int8, x)) for x in inputs]
        results[name] = {**compare(wanted, got), "bytes": jint8.memory_report(int8).bytes}
    return results


def log_probabilities(logits):
    """float64 log softmax of logits [1, time, classes], which is small beside one in the differences of two."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def compare(wanted, got):
    """Over all positions: mean KL divergence of `got` from `wanted`, and how often both have the same top class."""
    wanted, got = (np.concatenate(texts, axis=1) for texts in (wanted, got))
    kl = np.sum(np.exp(wanted) * (wanted - got), axis=-1).mean()
    return {"kl": float(kl), "top1": float((wanted.argmax(-1) == got.argmax(-1)).mean())}


def main(arguments=None):
    """Prints a table of all schemes and presets, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("texts", type=Path, nargs="*", help="files to run on; default: eight that come with Python")
    parser.add_argument("--length", type=int, default=1024, help="bytes of each text, and as many to calibrate on")
    args = parser.parse_args(arguments)
    model, params = Model(), read_weights(args.wheel)
    files = args.texts or [Path(sysconfig.get_path("stdlib"), name) for name in TEXTS]
    results = measure(model, params, *pieces(files, args.length), CONFIGS)
    print(f"{'':30} {'KL':>9} {'top-1':>7} {'bytes':>10}")
    print(f"{'float32':30} {0:9.5f} {1:7.4f} {jint8.memory_report(params).bytes:10,}")
    for name, row in results.items():
        print(f"{name:30} {row['kl']:9.5f} {row['top1']:7.4f} {row['bytes']:10,}")
    return results


if __name__ == "__main__":
    main()
