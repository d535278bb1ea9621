"""Whether a model fits on several devices, without its weights.

MODEL is a directory of a checkpoint, its config.json, a GGUF file, or the name of a known size. The model is sharded
over the devices as `jint8.load(mesh=)` does it, and its programs are compiled for as many virtual CPU devices, with one
and with two layers; the numbers of more layers are extrapolated from both. Weights, cache and collectives follow from
shapes and shardings. Temporaries are those of XLA's CPU backend, with float32 activations; those of experts hold copies
of all their weights, which its grouped products make.

JSON: model, source (of a known size), layers, devices, memory, reserve, context, batch, dtype, scheme, cache (int8, or
null for the dtype); per_device {int8 {projections, scales, embeddings, others, weights, cache, prefill, decode,
needed}, float {weights}}, in bytes, with int8 for a scheme of four bits, too; fits, float_fits (its weights and the
cache alone), collectives [{kind, count, bytes, per}], longest_context (null where nothing fits), longest_by (memory or
positions).
"""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jint8.cli import _common, _generate
from jint8.cli._hints import did_you_mean, did_you_mean_path

if TYPE_CHECKING:
    from jint8._inference.capacity import Capacity

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
RESERVE = "1GiB"
MOST_DEVICES = 1024
LONGEST = 2**24  # the longest context that is looked at, of a model whose positions don't end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, a config.json, or a known size: opt-175b, ...")
    parser.add_argument("--mesh", required=True, metavar="NxMEMORY", help="devices and the memory of each: 8x24GiB")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens of prompt and answer (2048)")
    parser.add_argument("--batch-size", "--batch", type=int, default=1, metavar="N", help="sequences at a time (1)")
    parser.add_argument(
        "--reserve", default=RESERVE, metavar="MEMORY", help=f"of each device, for drivers and fragments ({RESERVE})"
    )
    _generate.add_kv_cache_argument(parser)
    _common.add_model_arguments(parser)
    _common.add_output_arguments(parser)
    parser.set_defaults(dtype="bfloat16")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    devices, memory = parse_mesh(args.mesh)
    reserve = parse_bytes(args.reserve, "--reserve")
    _common.check_least(args, context=1, batch_size=1)
    _common.quant_config(args)
    source, config = find_config(args.model)
    use_cpu_devices(devices)
    result = fit(args, source, config, devices, memory, reserve)
    if args.json:
        _common.report(args, result)
    else:
        print_table(result)


def parse_mesh(text: str) -> tuple[int, int]:
    """`"8x24GiB"` to 8 and the bytes of 24 GiB. Raises ValueError for another form."""
    devices, _, memory = text.partition("x")
    if not devices.isdecimal() or not 1 <= int(devices) <= MOST_DEVICES:
        raise ValueError(f"Expected --mesh to be like 8x24GiB, of 1 to {MOST_DEVICES} devices, got {text!r}")
    return int(devices), parse_bytes(memory, f"the memory in --mesh {text}")


def parse_bytes(text: str, name: str) -> int:
    """`"24GiB"` to bytes. Raises ValueError for another form, with the `name` of what was to be read."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(UNITS)})", text)
    if not found:
        raise ValueError(f"Expected {name} to be like 24GiB ({', '.join(UNITS)}), got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def find_config(model: str) -> tuple[str | None, dict[str, Any]]:
    """Where a known size was published (None for a path), and the content of config.json.

    Raises:
      ValueError: neither a path nor a known size; the message lists those.
    """
    from jint8._inference.capacity import known_models
    from jint8.checkpoints import open_checkpoint
    from jint8.checkpoints._json import read_json

    path, known = Path(model), known_models()
    if model in known:
        return known[model]["source"], known[model]["config"]
    if not path.exists():
        hint = did_you_mean(model, known) or did_you_mean_path(path)
        raise ValueError(f"Expected a path or one of {', '.join(known)}, got {model!r}{hint}")
    if path.suffix == ".json":
        return None, read_json(path)
    if (path / "config.json").exists():
        return None, read_json(path / "config.json")
    with open_checkpoint(path) as checkpoint:
        return None, checkpoint.config


def use_cpu_devices(count: int) -> None:
    """Have JAX start with `count` virtual CPU devices, and without others.

    Raises:
      ValueError: JAX has started already, with fewer.
    """
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if len(jax.devices("cpu")) < count:
            raise ValueError(f"Expected a process in which JAX hasn't started, got: {error}") from None


def fit(
    args: argparse.Namespace, source: str | None, config: dict[str, Any], devices: int, memory: int, reserve: int
) -> dict[str, Any]:
    """Whether the model fits: what `--json` prints."""
    from jint8 import Config
    from jint8._inference.capacity import capacity, in_slots, longest_context, model_mesh
    from jint8.models import model_config

    decoder, quant = model_config(config), _common.quant_config(args) or Config()
    dtype = _common.float_dtype(args.dtype)
    positions = decoder.max_positions if decoder.learned_positions is not None else None
    if positions is not None and args.context > positions:
        raise ValueError(
            f"Expected --context of at most {positions}, which the model has positions for, got {args.context}"
        )
    model_mesh(decoder, devices)  # raises before anything is compiled

    @functools.cache
    def at(context: int) -> Capacity:
        _common.say(args, f"compiling one and two layers for {devices} devices at context {context:,}")
        return capacity(
            decoder,
            devices,
            context=context,
            batch=args.batch_size,
            dtype=dtype,
            quant=quant,
            cache=args.cache,
        )

    found, room = at(in_slots(args.context)), memory - reserve
    longest = longest_context(lambda context: at(context).needed, room, positions or LONGEST, args.context)
    return {
        "model": args.model,
        "source": source,
        "layers": decoder.num_layers,
        "devices": devices,
        "memory": memory,
        "reserve": reserve,
        "context": args.context,
        "batch": args.batch_size,
        "dtype": dtype.name,
        "scheme": quant.scheme,
        "cache": args.cache,
        "per_device": {
            "int8": {
                "projections": found.projections,
                "scales": found.scales,
                "embeddings": found.embeddings,
                "others": found.others,
                "weights": found.weights,
                "cache": found.cache,
                "prefill": found.prefill,
                "decode": found.decode,
                "needed": found.needed,
            },
            "float": {"weights": found.float_weights},
        },
        "fits": found.needed <= room,
        "float_fits": found.float_weights + found.cache <= room,
        "collectives": [
            {"kind": kind, "count": count, "bytes": nbytes, "per": per}
            for per, kinds in (("token", found.collectives), ("block of outlier columns", found.gathers))
            for kind, (count, nbytes) in kinds.items()
        ],
        "longest_context": longest or None,
        "longest_by": "positions" if longest and longest == (positions or 0) else "memory",
    }


def print_table(result: dict[str, Any]) -> None:
    """The same for people."""
    from jint8 import SCHEMES

    bits = "4 bits" if SCHEMES[result["scheme"]].weights == "group" else "int8"

    def row(name: str, number: str, note: str = "") -> None:
        print(f"{name:24} {number:>8}  {note}".rstrip())

    int8, room = result["per_device"]["int8"], result["memory"] - result["reserve"]
    verdict = {True: "fits", False: "doesn't fit"}
    print(
        f"{result['model']} on {result['devices']} devices of {gib(result['memory'])} GiB, "
        f"context {result['context']:,}, batch {result['batch']}, {result['dtype']}\n"
    )
    rows = {
        "weights": int8["weights"],
        f"  projections, {bits}": int8["projections"],
        "  their scales": int8["scales"],
        "  embeddings and head": int8["embeddings"],
        "  norms, biases, ...": int8["others"],
        f"keys and values{', int8' if result['cache'] else ''}": int8["cache"],
        "temporaries of prefill": int8["prefill"],
        "temporaries of decode": int8["decode"],
        "needed": int8["needed"],
        "there are": room,
        "weights in 16 bits": result["per_device"]["float"]["weights"],
    }
    notes = {
        "needed": verdict[result["fits"]],
        "there are": f"without the reserve of {gib(result['reserve'])}",
        "weights in 16 bits": f"{verdict[result['float_fits']]} (with keys and values, without temporaries)",
    }
    row("per device", "GiB")
    for name, nbytes in rows.items():
        row(name, gib(nbytes), notes.get(name, ""))
    print()
    for one in result["collectives"]:
        row(one["kind"], f"{one['count']:,}", f"of {_common.megabytes(one['bytes'])} in all, per {one['per']}")
    longest = result["longest_context"]
    by = "all positions that the model has" if result["longest_by"] == "positions" else "what memory holds"
    row("longest context", *((f"{longest:,}", by) if longest else ("none",)))


def gib(count: int) -> str:
    """Bytes as GiB, with three decimals below 10."""
    return f"{count / 2**30:.{3 if count < 10 * 2**30 else 1}f}"
