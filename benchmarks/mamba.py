"""int8 on a real Mamba, a bidirectional S6 of 6 layers: jint8's schemes, and rotations that are simulated here.

    pip download --no-deps typeseg==0.2.7 && python benchmarks/mamba.py typeseg-0.2.7-py3-none-any.whl

The model is that of examples/mamba.py. It runs on pieces of 512 bytes of files that come with Python and of data
made from them: `whole` pieces, and `mixed` ones of four quarters from different files, where the model is less sure.
Calibration has other pieces of the same files. For each scheme: the KL divergence from float in nats, its mean over all
positions and the standard error of that mean over pieces; how often both have the same top class; and the error of the
logits relative to their norm.

Simulated are changes of coordinates T of every product, x T and T^-1 w, then vector-wise int8, without jint8's code:

- smoothing: diag(s), s = sqrt(rms(w) / rms(x)) for each feature, over its geometric mean; `maxima` is SmoothQuant's
  s = sqrt(max(w) / max(x)) (arXiv 2211.10438);
- Hadamard in blocks: of a size, or the largest power of two that divides the features up to it; `signs`: each feature
  gets a random sign before, so that what all of them have in common doesn't add up in one;
- KLT: the eigenvectors of the second moments of x. MambaQuant (arXiv 2501.13484) multiplies a Hadamard matrix to it,
  of the whole width, and for the last projection of a layer smooths before it rotates, without KLT.

`kl_above` is how much greater the KL is than with smoothing and Hadamard 64 on the same pieces, and the standard error
of that. For each product alone, on float inputs and without what errors do later: its relative error. Writes
results/mamba_cpu.json.
"""

from __future__ import annotations

import argparse
import base64
import csv
import functools
import hashlib
import io
import json
import platform
import runpy
import sysconfig
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from harness import write

import jint8
from jint8._trees.paths import leaf_paths

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "mamba.py"), run_name="example")
LENGTH = 512
STDLIB = (
    "json/decoder.py",
    "email/architecture.rst",
    "idlelib/ChangeLog",
    "idlelib/config-keys.def",
    "idlelib/help.html",
    "LICENSE.txt",
    "venv/scripts/common/Activate.ps1",
)
PRESETS = typing.get_args(typing.get_type_hints(jint8.Config.preset)["name"])

Transform = Callable[[np.ndarray, np.ndarray], np.ndarray]  # from x [m, k] and w [k, n] to T [k, k], in float64


# --- Texts ---


def texts() -> dict[str, bytes]:
    """Twelve files, of which three pieces each are used."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = {name: (folder / name).read_bytes() for name in STDLIB}
    found["object.h"] = Path(sysconfig.get_path("include"), "object.h").read_bytes()
    code = Path(json.__file__).with_name("encoder.py").read_bytes()
    found["base64"] = base64.encodebytes(code)
    found["hexadecimal"] = code.hex().encode()
    rows = [(number, len(line), line.decode().strip()) for number, line in enumerate(code.splitlines())]
    found["JSON"] = json.dumps([dict(zip(("line", "length", "text"), row, strict=True)) for row in rows]).encode()
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    found["CSV"] = table.getvalue().encode()
    return found


def batches(files: dict[str, bytes]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Tokens [pieces, LENGTH] to measure on, by kind, and pieces [1, LENGTH] to calibrate on."""
    pieces = np.stack([EXAMPLE["tokens_of"](text[: 3 * LENGTH]).reshape(3, LENGTH) for text in files.values()])
    measured = pieces[:, :2]
    quarters = measured.reshape(len(files), 2, 4, LENGTH // 4)
    mixed = np.stack([np.roll(quarters[:, :, part], part * 5, axis=0) for part in range(4)], axis=2)
    flat = lambda x: x.reshape(-1, LENGTH)
    return {"whole": flat(measured), "mixed": flat(mixed)}, list(pieces[:, 2:])


# --- Coordinates ---


def hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return matrix / np.sqrt(size)


def blocks(most: int) -> Transform:
    def rotation(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        size = min(most, len(w) & -len(w))
        return np.kron(np.eye(len(w) // size), hadamard(size))

    return rotation


def signs(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.diag(np.random.default_rng(len(w)).choice([-1.0, 1.0], len(w)))


def smoothing(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return balance(np.sqrt(np.mean(np.square(w), axis=1)), np.sqrt(np.mean(np.square(x), axis=0)))


def maxima(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return balance(np.abs(w).max(axis=1), np.abs(x).max(axis=0))


def balance(of_w: np.ndarray, of_x: np.ndarray) -> np.ndarray:
    s = np.sqrt(of_w / np.maximum(of_x, 1e-2 * np.sqrt(np.mean(np.square(of_x)))))
    return np.diag(s / np.exp(np.mean(np.log(s))))


def klt(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.linalg.eigh(x.T @ x)[1]


def klt_centred(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return klt(x - x.mean(axis=0), w)


def chain(*parts: Transform) -> Transform:
    """One after the other; each sees the activations and weights in the coordinates of those before."""

    def whole(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        result = np.eye(len(w))
        for part in parts:
            result = result @ part(x @ result, np.linalg.solve(result, w))
        return result

    return whole


def mambaquant(path: str) -> Transform:
    return chain(maxima, blocks(256)) if path.endswith("Dense_3") else chain(klt, blocks(256))


COORDINATES: dict[str, Callable[[str], Transform]] = {  # by the path of the layer
    "none": lambda path: lambda x, w: np.eye(len(w)),
    "Hadamard 64": lambda path: blocks(64),
    "Hadamard 256": lambda path: blocks(256),
    "signs, Hadamard 64": lambda path: chain(signs, blocks(64)),
    "smoothing": lambda path: smoothing,
    "smoothing, Hadamard 16": lambda path: chain(smoothing, blocks(16)),
    "smoothing, Hadamard 64": lambda path: chain(smoothing, blocks(64)),
    "smoothing, Hadamard 256": lambda path: chain(smoothing, blocks(256)),
    "smoothing, signs, Hadamard 64": lambda path: chain(smoothing, signs, blocks(64)),
    "smoothing, signs, Hadamard 256": lambda path: chain(smoothing, signs, blocks(256)),
    "smoothing by maxima, Hadamard 64": lambda path: chain(maxima, blocks(64)),
    "KLT": lambda path: klt,
    "KLT, Hadamard 256": lambda path: chain(klt, blocks(256)),
    "KLT (centred), Hadamard 256": lambda path: chain(klt_centred, blocks(256)),
    "smoothing, KLT, Hadamard 256": lambda path: chain(smoothing, klt, blocks(256)),
    "MambaQuant": mambaquant,
}

SMOOTHED_ROTATED = "smoothing, Hadamard 64"  # what the others are compared with


# --- Simulated products ---


def rounded(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale == 0, 1, scale)), scale


def product(x: jax.Array, change: jax.Array, w: jax.Array) -> jax.Array:
    """x T (T^-1 w), both sides vector-wise int8; `w` is in the new coordinates. Sums of 127^2 are exact in float32."""
    (q, scale), (q_w, scale_w) = rounded(x @ change, -1), rounded(w, 0)
    return (q @ q_w) * scale * scale_w


def with_dense(replacement: Callable[[str, nn.Module, jax.Array], jax.Array | None]) -> Any:
    """Runs layers by `replacement`, of path, module and input, where it doesn't return None."""

    def intercept(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
            return run(*args, **kwargs)
        done = replacement("/".join(context.module.path), context.module, args[0])
        return run(*args, **kwargs) if done is None else done

    return nn.intercept_methods(intercept)


def simulated(model: nn.Module) -> Callable[..., jax.Array]:
    @jax.jit
    def run(params: Any, changed: dict[str, tuple[jax.Array, jax.Array]], tokens: jax.Array) -> jax.Array:
        layer = lambda path, module, x: product(x, *changed[path]) + module.get_variable("params", "bias")
        with with_dense(layer):
            return model.apply(params, tokens)

    return run


def inputs_of_layers(model: nn.Module) -> Callable[..., dict[str, jax.Array]]:
    """What each dense layer gets, by its path."""

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        seen: dict[str, jax.Array] = {}
        with with_dense(lambda path, module, x: seen.update({path: x[0]})):
            model.apply(params, tokens)
        return seen

    return run


def gathered(model: nn.Module, params: Any, pieces: list[np.ndarray]) -> dict[str, np.ndarray]:
    run = inputs_of_layers(model)
    all_seen = [run(params, piece) for piece in pieces]
    return {path: np.concatenate([np.float64(seen[path]) for seen in all_seen]) for path in all_seen[0]}


def in_coordinates(transform: Transform, x: np.ndarray, w: np.ndarray) -> tuple[jax.Array, jax.Array]:
    change = transform(x, w)
    return jnp.float32(change), jnp.float32(np.linalg.solve(change, w))


# --- Measuring ---


class Reference:
    """The float model's results, and how far others are from them."""

    def __init__(self, model: nn.Module, params: Any, measured: dict[str, np.ndarray]):
        self.kinds = np.concatenate([[kind] * len(tokens) for kind, tokens in measured.items()])
        self.tokens = np.concatenate(list(measured.values()))
        self.logits = self.run(functools.partial(jax.jit(model.apply), params))

    def run(self, function: Callable[[np.ndarray], jax.Array], at_once: int = 24) -> np.ndarray:
        calls = self.tokens.reshape(-1, at_once, LENGTH)
        return np.concatenate([np.float64(function(tokens)) for tokens in calls])

    def compare(self, function: Callable[[np.ndarray], jax.Array], at_once: int = 24) -> dict[str, Any]:
        got, want = self.run(function, at_once), self.logits
        p, q = EXAMPLE["log_probabilities"](want), EXAMPLE["log_probabilities"](got)
        kl = np.sum(np.exp(p) * (p - q), axis=-1).mean(axis=1)
        return {
            "kl": kl.mean(),
            "kl_standard_error": kl.std(ddof=1) / np.sqrt(len(kl)),
            **{f"kl_{kind}": kl[self.kinds == kind].mean() for kind in dict.fromkeys(self.kinds.tolist())},
            "top1": (got.argmax(-1) == want.argmax(-1)).mean(),
            "logits_error": np.linalg.norm(got - want) / np.linalg.norm(want),
            "kl_by_piece": kl.tolist(),
        }


def of_jint8(model: nn.Module, params: Any, reference: Reference, calibration: list[np.ndarray]) -> dict[str, Any]:
    plan = jint8.plan(model.apply, params, calibration[0])
    find = functools.partial(jint8.calibrate, model.apply, params, calibration, plan=plan)
    by_threshold, few = find(), find(budget=8)
    static, relative = jint8.Config(outliers="static"), jint8.Config(threshold=7.5, relative=True)
    configs: dict[str, tuple[jint8.Config, Any]] = {
        "vector": (jint8.Config(scheme="vector"), None),
        "llm.int8": (jint8.Config(), None),
        "llm.int8, relative threshold of 7.5": (relative, None),
        "llm.int8, columns calibrated by threshold 6": (static, by_threshold),
        "llm.int8, 8 calibrated columns": (static, few),
    }
    for name in PRESETS:
        config = jint8.Config.preset(name)
        calibrated = config.outliers == "static" or getattr(config, "rotate", 0)
        configs[f"preset {name}"] = (config, few if calibrated else None)
    run, rows = jax.jit(jint8.apply(model.apply)), {}
    for name, (config, found) in configs.items():
        int8 = jint8.quantize_params(params, config=config, plan=plan, outliers=found)
        rows[name] = {
            **reference.compare(functools.partial(run, int8), 1 if config.depends_on_batch else 24),
            "bytes": jint8.memory_report(int8).bytes,
        }
        print_row(name, rows[name])
    int8 = jint8.quantize_params(params, config=jint8.Config(scheme="vector"), plan=plan)
    floats = jint8.with_config(int8, jint8.Config(scheme="none"))
    rows["int8 weights, float activations"] = reference.compare(functools.partial(run, floats))
    print_row("int8 weights, float activations", rows["int8 weights, float activations"])
    return rows


def above(kl: list[float], other: list[float]) -> dict[str, float]:
    """How much greater one is on the same pieces, and the standard error of that."""
    difference = np.subtract(kl, other)
    return {"mean": difference.mean(), "standard_error": difference.std(ddof=1) / np.sqrt(len(difference))}


def print_row(name: str, row: dict[str, float]) -> None:
    print(
        f"{name:44} {row['kl']:.5f} +- {row['kl_standard_error']:.5f}  whole {row['kl_whole']:.5f}  "
        f"mixed {row['kl_mixed']:.5f}  top-1 {row['top1']:.4f}  logits {row['logits_error']:.5f}",
        flush=True,
    )


def errors(x: np.ndarray, w: np.ndarray, changed: dict[str, tuple[jax.Array, jax.Array]]) -> dict[str, float]:
    """The relative error of one product on float inputs, by coordinates."""
    exact, run = x @ w, jax.jit(product)
    error = lambda y: float(np.linalg.norm(np.float64(y) - exact) / np.linalg.norm(exact))
    return {name: error(run(jnp.float32(x), *pair)) for name, pair in changed.items()}


def inputs_in_words(seen: dict[str, np.ndarray]) -> dict[str, Any]:
    """How hard they are: for each kind of layer the largest value and the ratio of the channels' variances."""
    result: dict[str, Any] = {}
    for path, x in seen.items():
        variance, kind = x.var(axis=0), path.split("/")[-1] if "/" in path else "head"
        row = result.setdefault(kind, {"largest": 0.0, "variance_ratio": 0.0, "columns_of_6": []})
        row["largest"] = max(row["largest"], float(np.abs(x).max()))
        row["variance_ratio"] = max(row["variance_ratio"], float(variance.max() / variance.min()))
        pieces = np.abs(x).reshape(-1, LENGTH, x.shape[1]).max(axis=1)
        row["columns_of_6"].append(float((pieces >= 6).mean()))
    return {kind: {**row, "columns_of_6": float(np.mean(row["columns_of_6"]))} for kind, row in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    args = parser.parse_args()
    model, params = EXAMPLE["Model"](), EXAMPLE["read_weights"](args.wheel)
    weights = {path.removesuffix("/kernel"): np.float64(w) for path, w in leaf_paths(params) if "Dense" in path}
    files = texts()
    measured, calibration = batches(files)
    reference = Reference(model, params, measured)

    seen = gathered(model, params, calibration)
    run, rows = simulated(model), {}
    by_product: dict[str, dict[str, tuple[jax.Array, jax.Array]]] = {path: {} for path in seen}
    for name, coordinates in COORDINATES.items():
        changed = {path: in_coordinates(coordinates(path), x, weights[path]) for path, x in seen.items()}
        for path, pair in changed.items():
            by_product[path][name] = pair
        rows[name] = reference.compare(lambda tokens, changed=changed: run(params, changed, tokens))
        print_row(f"simulated: {name}", rows[name])

    held_out = gathered(model, params, [piece[None] for piece in measured["mixed"][::2]])
    product_errors = {path: errors(held_out[path], weights[path], changed) for path, changed in by_product.items()}
    for path, found in product_errors.items():
        best = sorted(found, key=found.__getitem__)[:3]
        print(path, *(f"{name} {found[name]:.5f}," for name in ("none", SMOOTHED_ROTATED)), "best:", *best, sep="  ")
    of_library = of_jint8(model, params, reference, calibration)
    for row in (*rows.values(), *of_library.values()):
        row["kl_above"] = above(row["kl_by_piece"], rows[SMOOTHED_ROTATED]["kl_by_piece"])
    for row in (*rows.values(), *of_library.values()):
        del row["kl_by_piece"]

    result = {
        "weights": hashlib.sha256(args.wheel.read_bytes()).hexdigest(),
        "texts": {name: hashlib.sha256(text[: 3 * LENGTH]).hexdigest() for name, text in files.items()},
        "python": platform.python_version(),
        "pieces": {kind: len(tokens) for kind, tokens in measured.items()},
        "inputs": inputs_in_words(held_out),
        "jint8": of_library,
        "simulated": rows,
        "error_by_product": product_errors,
    }
    print(write("mamba_cpu", result))


if __name__ == "__main__":
    main()
