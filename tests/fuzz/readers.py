"""Mutates files of every format and reads them: only errors of the library, which name the file, may come out.

`python tests/fuzz/readers.py --cases 20000 --seed 1` prints a line for each kind of fault, with the case that shows it,
and exits with status 1 where there is one. `--case N` runs that one case and shows the traceback. Case `n` of a seed is
the same each time. `--only NAME` mutates files of those sources alone: the checkpoints that are read without a model
(`one`, `shards`, `saved`, `gguf`, `sentencepiece`), `tokens`, and, slower, those of which a model's parameters are made
(`whole`, `bitsandbytes`, `compressed_tensors`, `quark`, `torchao`, `adapter`).
"""

import argparse
import collections
import contextlib
import copy
import functools
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint_files import llama_metadata, llama_tensors, write_gguf
from tiny_model import make_llama_directory

import jint8
from jint8._convert.lora import with_adapter
from jint8.checkpoints import open_checkpoint
from jint8.checkpoints._safetensors import read_arrays
from jint8.cli._eval import read_tokens
from jint8.models.families import model_config

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

SECONDS = 5  # that one case may take
MEMORY = 2**30  # bytes that reading files of 200 kB may ask for on top of the process
NUMBERS = (0, 1, -1, 2, 0.5, 1e999, float("nan"), 2**31, 2**63 - 1, 2**63, 10**400, -(2**63))
VALUES = (*NUMBERS, None, True, "", "x", "\ud800", [], {}, [[]], {"a": 1})


class Hang(BaseException):
    """A case took too long. No reader catches it."""


def write_sources(root):
    """Good checkpoints, one of each format: a directory or a file by name."""
    make_llama_directory(root / "one", seed=0)
    make_llama_directory(root / "shards", seed=0, shards=2)
    config = json.loads((root / "shards" / "config.json").read_text())
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config |= {"rope_scaling": llama3, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (root / "shards" / "config.json").write_text(json.dumps(config))
    added = {"0": {"content": "<s>", "special": True}}
    settings = {"added_tokens_decoder": added, "bos_token": {"content": "<s>"}, "additional_special_tokens": ["<s>"]}
    settings["chat_template"] = [{"name": "default", "template": "{{ messages[0].content }}"}]
    (root / "shards" / "tokenizer_config.json").write_text(json.dumps(settings))
    (root / "shards" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    (root / "shards" / "added_tokens.json").write_text(json.dumps({"<s>": 0}))
    make_llama_directory(root / "saved", seed=0)
    saved = root / "saved"
    (saved / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    # What the reader of saved models looks at; the weights stay in floating point, so no model has to be built.
    described = {"version": 2, "tokenizer": {"bos_id": 0, "eos_ids": [1], "pad_id": 2}, "checksums": {}}
    (saved / "jint8.json").write_text(json.dumps(described))
    (root / "one" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (root / "gguf").mkdir()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "ab", "\u2581a"]
    tokenizer = {"model": "llama", "tokens": tokens, "token_type": [2, 3, 3, *256 * [6], 1, 1, 1, 1, 1]}
    tokenizer |= {"scores": [-float(i) for i in range(len(tokens))], "bos_token_id": 1, "eos_token_id": 2}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    metadata |= {"tokenizer.chat_template": "{{ messages[0].content }}", "llama.vocab_size": 32}
    # Few tensors, so that changes hit the metadata, which are two thirds of the file.
    tensors = {k: v for k, v in llama_tensors(np.random.default_rng(0)).items() if v.size < 3000}
    write_gguf(root / "gguf" / "model.gguf", tensors, llama_metadata(**metadata))
    (root / "sentencepiece").mkdir()
    for file, name in ((FIXTURES / "sentencepiece" / "unigram.model", "tokenizer.model"), *_files("families/llama")):
        shutil.copy(file, root / "sentencepiece" / name)
    (root / "tokens").mkdir()
    np.save(root / "tokens" / "tokens.npy", np.arange(60, dtype=np.int32).reshape(3, 20))
    copies = {"whole": "families/qwen2", "bitsandbytes": "bitsandbytes/llama", "adapter": "adapters/llama"}
    for name, folder in (
        copies | {name: f"int8/{name}" for name in ("compressed_tensors", "quark", "torchao")}
    ).items():
        (root / name).mkdir()
        for file, to in _files(folder):
            shutil.copy(file, root / name / to)
    return [root / name for name in READERS]


def _files(folder):
    """The files of a fixture, but what is expected of it, with their names."""
    return [(file, file.name) for file in sorted((FIXTURES / folder).iterdir()) if file.name != "expected.npz"]


def mutate(rng, raw, name):
    """The bytes of a file with one or a few changes."""
    if name.endswith(".json") and rng.random() < 0.7:
        return _dump(mutate_json(rng, json.loads(raw)))
    if name.endswith(".safetensors") and rng.random() < 0.7:
        length = int.from_bytes(raw[:8], "little")
        header = _dump(mutate_json(rng, json.loads(raw[8 : 8 + length])))
        return struct.pack("<Q", len(header)) + header + raw[8 + length :]
    data = bytearray(raw)
    # Headers are at the start of a file, so half of the changes are made there.
    at = lambda: rng.randrange(min(len(data), rng.choice((64, 4096, len(data)))) or 1)
    for _ in range(rng.choice((1, 1, 2, 8))):
        kind = rng.randrange(6)
        if not data:
            break
        if kind == 0:
            data[at()] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at()] = rng.choice((0, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del data[at() :]
        elif kind == 3:
            first = at()
            del data[first : first + rng.randrange(64)]
        elif kind == 4:  # a part of the file once more, elsewhere
            first = at()
            data[at() : at()] = data[first : first + rng.randrange(256)]
        else:
            fmt = rng.choice("IQ")
            where, size = at(), struct.calcsize(fmt)
            value = rng.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1)) % 256**size
            data[where : where + size] = struct.pack("<" + fmt, value)
    return bytes(data)


def mutate_json(rng, value):
    """A JSON value with one to three nodes changed."""
    for _ in range(rng.choice((1, 1, 1, 3))):
        nodes = []  # (container, key) of every value in the tree

        def walk(node, nodes=nodes):
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, child in items:
                nodes.append((node, key))
                walk(child)

        walk(value)
        if not nodes:
            return rng.choice(VALUES)
        node, key = rng.choice(nodes)
        kind = rng.randrange(6)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(("__metadata__", "", "x" * 10_000, "\ud800", str(key) + "x"))] = node.pop(key)
        elif kind == 2:
            other, its = rng.choice(nodes)
            with contextlib.suppress(LookupError):  # it may have been removed
                node[key] = json.loads(json.dumps(other[its]))
        elif kind == 3:
            node[key] = _Nested(rng.choice((100, 10_000, 100_000)))
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES))  # the next change may be made inside of it
    return value


class _Nested(str):
    """Stands for lists in lists, which `json.dumps` can't write either."""

    def __new__(cls, depth):
        return super().__new__(cls, f"nested lists: {depth}")


def _dump(value):
    text = json.dumps(value)
    for depth in (100, 10_000, 100_000):
        text = text.replace(f'"nested lists: {depth}"', "[" * depth + "]" * depth)
    return text.encode()


def read_all(path):
    """Everything that reading a checkpoint does, without building a model."""
    names = [file for file in path.iterdir() if file.suffix == ".gguf"]
    with open_checkpoint(names[0] if names else path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)
        tokenizer = checkpoint.tokenizer()
        config = checkpoint.config
    for file in path.glob("*.safetensors"):
        collections.deque(read_arrays(file), maxlen=0)
    return config, tokenizer


def load_all(path):
    """What loading a model does; nothing is computed with it."""
    jint8.load(path, dtype="float32")


def load_adapter(path):
    """What loading an adapter does, on top of a model that is loaded once."""
    model = _below_adapters()
    with_adapter(model.params, model.model, path)


@functools.cache
def _below_adapters():
    return jint8.load(FIXTURES / "families" / "llama", dtype="float32", quantize=False)


def load_tokens(path):
    """What `jint8 eval --tokens` does with a file."""
    read_tokens(str(path / "tokens.npy"))


# By the name of a source, what reads it; the first return a configuration and a tokenizer, which are looked at, too.
READERS = dict.fromkeys(("one", "shards", "saved", "gguf", "sentencepiece"), read_all)
READERS |= {"tokens": load_tokens, "adapter": load_adapter}
READERS |= dict.fromkeys(("whole", "bitsandbytes", "compressed_tensors", "quark", "torchao"), load_all)
WITHOUT_MODEL = [name for name, read in READERS.items() if read not in (load_all, load_adapter)]


def run_case(sources, seed, number, work):
    """Runs one case. Returns what it did, and the exception where it is a fault, else None."""
    rng = random.Random(f"{seed} {number}")
    source = rng.choice(sources)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work)
    file = work / rng.choice(sorted(path.name for path in source.iterdir()))
    file.write_bytes(mutate(rng, file.read_bytes(), file.name))
    what = f"{source.name}/{file.name}"
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ours, of heads and weights that aren't as expected
            warnings.simplefilter("error", RuntimeWarning)  # NumPy's: a division by zero, an overflow
            try:
                config, tokenizer = READERS[source.name](work) or (None, None)
            except (ValueError, OSError) as e:
                return what, None if str(work) in str(e) else e
            if config is None:
                return what, None
            # The callers of these name the checkpoint.
            with contextlib.suppress(ValueError):
                model_config(config)
            if tokenizer is not None:
                tokenizer.encode("One two.")
                with contextlib.suppress(ValueError):
                    tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    except (Exception, Hang) as e:
        return what, e
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return what, None


def kind_of(error):
    """What is the same about faults that are one: the type, and the innermost line of the library."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/jint8/" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}"


def fuzz(cases, seed, *, only=WITHOUT_MODEL, seconds=None):
    """Runs cases on some of the sources.

    Returns how many ran, faults by kind as (number, file, error), and the longest case's seconds.
    """
    faults, longest, begin, ran = {}, 0.0, time.monotonic(), 0

    def stop(*_):
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with tempfile.TemporaryDirectory() as root:
            sources = [source for source in write_sources(Path(root)) if source.name in only]
            for number in cases:
                if seconds is not None and time.monotonic() - begin > seconds:
                    break
                started = time.monotonic()
                what, error = run_case(sources, seed, number, Path(root, "case"))
                longest, ran = max(longest, time.monotonic() - started), ran + 1
                if error is not None:
                    faults.setdefault(kind_of(error), (number, what, error))
    finally:
        signal.signal(signal.SIGALRM, before)
    return ran, faults, longest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    parser.add_argument("--only", nargs="+", choices=list(READERS), default=WITHOUT_MODEL)
    args = parser.parse_args()
    if set(args.only) - set(WITHOUT_MODEL):
        jint8.load(FIXTURES / "families" / "llama", dtype="float32")  # what JAX takes once isn't a reader's
        _below_adapters()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    ran, faults, longest = fuzz(range(args.cases) if args.case is None else [args.case], args.seed, only=args.only)
    for kind, (number, what, error) in sorted(faults.items()):
        print(f"{kind}: case {number}, {what}: {str(error)[:200]!r}")
        if args.case is not None:
            traceback.print_exception(error)
    print(f"{ran} cases, {len(faults)} kinds of faults, longest {longest:.2f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
