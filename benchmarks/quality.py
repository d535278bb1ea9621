"""Quality of int8 on SmolLM2-135M: perplexity, KL divergence from float32, equal top tokens, bytes.

    jint8 demo && python benchmarks/quality.py              # or: quality.py SOURCE, for another model
    python benchmarks/quality.py --sweep --sequences 8      # thresholds
    python benchmarks/quality.py --encoder MINILM           # vectors of texts, by an encoder's directory
    python benchmarks/quality.py --rows bitsandbytes torchao --torch PYTHON    # that has peers/requirements-torch.txt
    python benchmarks/quality.py --report                   # quality.md and quality.svg from quality.json

The text is the language reference that every Python carries (`pydoc_data.topics`), or any file; its SHA-256 is in the
result, results/quality.json. Sequences of 512 tokens, one to a call. Static outliers are calibrated on the text that
comes with the package. What is measured is added to the rows of the same text that are there already.

Variants of the model compute the same function in floating point: see variants.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import numpy as np
from harness import RESULTS, write

import jint8
from jint8._inference.evaluate import evaluate
from jint8._inference.layer_by_layer import quantize_layer_by_layer
from jint8._inference.load_four_bits import FOUR_BIT_COLUMNS, own_tokens
from jint8._trees.memory import projection_bytes
from jint8._trees.params import projections, quantized, with_config
from jint8._trees.paths import Selection
from jint8.analysis import outlier_statistics
from jint8.analysis._criteria import Criteria
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE

sys.path.append(str(Path(__file__).with_name("peers")))
from measure import Missing, Worker
from prepare import dequantize
from variants import VARIANTS, planted, planted_by_names

THRESHOLDS = (0.0, 2.0, 3.0, 4.5, 6.0, 8.0, 12.0)
SCHEMES = ("llm.int8", "llm.int8-zp", "vector-zp", "vector", "row+dec", "row", "zeropoint", "absmax")
ENCODED = 256  # texts, to each encoder
PEERS: dict[str, dict[str, Any]] = {  # of peers/with_torch.py
    "bitsandbytes": {"quantization": "bitsandbytes"},
    "torchao": {"quantization": "torchao", "int8_head": False},  # as everywhere here
    "NF4, bitsandbytes": {"quantization": "nf4"},
}


class Row(NamedTuple):
    """How to quantize and how to multiply, and criteria of calibration (None: without)."""

    config: jint8.Config
    criteria: dict[str, Any] | None = None
    run: jint8.Config | None = None


def _rows() -> dict[str, Row]:
    config = jint8.Config
    rows = {scheme: Row(config(scheme=scheme)) for scheme in SCHEMES}
    rows["weights only"] = Row(config(), run=config(scheme="none"))  # int8 weights and float activations
    for name in ("static", "rotated", "best"):
        rows[name] = Row(config.preset(name), {})
    rows["rotated, without data"] = Row(config.preset("rotated"))
    for block in (16, 32):
        rows[f"rotated, blocks of {block}"] = Row(config(scheme="vector", rotate=block), {})
    rows["rotated, zero points"] = Row(config(scheme="vector-zp", rotate=64), {})
    rows["rotated, 8 columns"] = Row(config(outliers="static", rotate=64), {"budget": 8})
    rows["best, 8 columns"] = Row(config(outliers="static", rotate=64, digits=2), {"budget": 8})
    rows["rotated, weights only"] = Row(config.preset("rotated"), {}, run=config(scheme="none"))
    digits = {"scheme": "llm.int8-zp", "outliers": "static", "digits": 2}
    rows["two digits, static"] = Row(config(**digits), {})  # the preset best before rotation
    rows["fast"] = Row(config.preset("fast"))
    rows["llm.int8, token"] = Row(config(outliers="token"))
    rows["llm.int8, static"] = Row(config(outliers="static"), {})
    relative = {"threshold": 7.5, "relative": True}
    rows["llm.int8, relative"] = Row(config(**relative))
    rows["static, relative"] = Row(dataclasses.replace(config.preset("static"), **relative), relative)
    for budget in (0.005, 0.01, 0.02):
        rows[f"static, budget {budget:g}"] = Row(config.preset("static"), {"budget": budget})
    for grouping in ("oc", "ic", "ada"):
        rows[f"int4, {grouping}"] = Row(config(scheme="int4", grouping=grouping), {})
    rows["int4, 16 columns"] = Row(config(scheme="int4", outliers="static"), {"budget": 16})
    rows["int4, smoothed, 8 columns"] = Row(config(scheme="int4", rotate=1, outliers="static"), {"budget": 8})
    rows["int4, rotated"] = Row(config(scheme="int4", rotate=64), {})
    for group in (32, 128):
        four = dataclasses.replace(config.preset("w4"), group=group)
        rows[f"w4, group {group}"] = Row(four, {"budget": FOUR_BIT_COLUMNS})
    for name in ("w4", "w4-best"):
        rows[name] = Row(config.preset(name), {"budget": FOUR_BIT_COLUMNS})
        in_int8 = dataclasses.replace(config.preset(name), scheme="int4-a8")
        rows[f"{name}, int8 activations"] = Row(in_int8, {"budget": FOUR_BIT_COLUMNS})
    rows["int4, gptq"] = Row(config(scheme="int4", rounding="gptq"), {})
    rows["int4, gptq, 16 columns"] = Row(config(scheme="int4", rounding="gptq", outliers="static"), {"budget": 16})
    rows["two digits"] = Row(config(scheme="vector", digits=2))
    return rows


class Computed:
    """A model whose logits are known, `[n, s, vocabulary]`, for these tokens `[n, s]`."""

    def __init__(self, tokens: np.ndarray, logits: np.ndarray, config: Any):
        self.config = config  # of the model
        self._logits = logits
        self._row = {ids.tobytes(): row for row, ids in enumerate(tokens)}

    @classmethod
    def of(cls, model: jint8.LanguageModel, tokens: np.ndarray) -> Computed:
        """Computes them once, and keeps them in a file."""
        with tempfile.NamedTemporaryFile() as file:  # it stays while it is mapped
            logits = np.memmap(file.name, np.float32, "w+", shape=(*tokens.shape, model.config.vocab_size))
        for row, ids in enumerate(tokens):
            logits[row] = np.asarray(model.logits(ids[None]))[0]
        return cls(tokens, logits, model.config)

    def logits(self, tokens: np.ndarray, cache: str | None = None) -> np.ndarray:
        return np.stack([self._logits[self._row[ids.tobytes()]] for ids in tokens])


class Bench:
    """The float model, its variants and the tokens."""

    def __init__(self, source: Path, text: str, sequences: int, length: int):
        self.source = source
        self.model = jint8.load(source, quantize=False, dtype="float32")
        ids = self.model.require_tokenizer().encode(text)[: sequences * length]
        self.tokens = np.array(ids).reshape(sequences, length)
        self.reference: Any = Computed.of(self.model, self.tokens)

    def measure(self, variant: str, row: Row) -> dict[str, Any]:
        floats = planted(self.model.params, variant, self.model.config)
        outliers = None
        start = time.perf_counter()
        if row.config.four_bits:
            params = self._four_bits(floats, row)
        elif row.criteria is not None:
            other = row.config.for_calibration()
            int8 = dataclasses.replace(self.model, params=jint8.quantize_params(floats, config=other), quant=other)
            outliers = int8.calibrate(**row.criteria)
        if not row.config.four_bits:
            params = jint8.quantize_params(floats, config=row.config, outliers=outliers)
        quantizing = time.perf_counter() - start
        params = params if row.run is None else with_config(params, row.run)
        model = dataclasses.replace(self.model, params=params)
        start = time.perf_counter()
        result = {**self._compare(model), "projection_bytes": projection_bytes(params)}
        result["bits"] = 8 * result["projection_bytes"] / projection_size(params)
        result["seconds"] = time.perf_counter() - start
        result["quantizing_seconds"] = quantizing
        if outliers is not None and row.config.uses_calibrated_columns:
            columns = sum(len(found) for found in outliers.values())
            result["calibrated_columns"] = columns / sum(self._inputs().values())
        return result

    def _four_bits(self, floats: Any, row: Row) -> Any:
        """The parameters in four bits, as `jint8.load` calibrates them: layer by layer."""
        selected = projections(floats, None, Selection())

        def read(part: str, known: Any) -> Any:
            tree = {name: of for name, of in floats.items() if (name if name.startswith("layers_") else "") == part}
            return tree if known is None else quantized(tree, config=row.config, outliers=known)

        calls = self.own_tokens if row.config.rounding == "gptq" else self.model.batches()
        dimensions = dict.fromkeys(selected, 2)
        return quantize_layer_by_layer(self.model.model, read, dimensions, calls, Criteria(**(row.criteria or {})))

    @functools.cached_property
    def own_tokens(self) -> list[np.ndarray]:
        """What GPTQ is calibrated on, by the plain model: all variants are the same function."""
        other = jint8.Config(outliers="token")
        params = jint8.quantize_params(self.model.params, config=other)
        return own_tokens(dataclasses.replace(self.model, params=params, quant=other))

    def measure_peer(self, variant: str, name: str, python: str) -> dict[str, Any]:
        """Of another library, in its own Python. Raises Missing where that lacks it."""
        with tempfile.TemporaryDirectory() as directory:
            huggingface = Path(directory, "huggingface")
            if variant == "plain" and self.source.is_dir():
                huggingface.symlink_to(self.source.resolve())
            else:
                dequantize(
                    self.source, huggingface, lambda arrays: planted_by_names(arrays, variant, self.model.config)
                )
            with contextlib.closing(Worker(python, "torch", Path(directory), PEERS[name], os.environ)) as worker:
                file = Path(directory, "logits.npy")
                start = time.perf_counter()
                answer = worker.ask(what="logits", tokens=self.tokens.tolist(), file=str(file))
                answer |= {"seconds": time.perf_counter() - start, "versions": worker.versions}
                return {
                    **self._compare(Computed(self.tokens, np.load(file, mmap_mode="r"), self.model.config)),
                    **answer,
                }

    def _compare(self, model: Any) -> dict[str, Any]:
        found = evaluate(model, self.tokens, reference=self.reference)
        assert found.reference_perplexity is not None
        return {
            "perplexity": found.perplexity,
            "over_float": found.perplexity / found.reference_perplexity - 1,
            "kl": found.kl,
            "top1": found.top1,
        }

    def share_in_16_bits(self, variant: str, threshold: float) -> dict[str, float]:
        """Of the inputs' columns, of which any value in a call reaches the threshold, and of their values."""
        if threshold == 0:
            return {"columns": 0.0, "values": 0.0}
        params = {"params": planted(self.model.params, variant, self.model.config)}
        columns, values = [], []
        for ids in self.tokens[:2]:
            found = outlier_statistics(self.model.run, params, [ids[None]], threshold=threshold).projections.values()
            columns.append(sum((p.outliers > 0).sum() for p in found) / sum(p.outliers.size for p in found))
            values.append(sum(p.outliers.sum() for p in found) / sum(p.positions.sum() for p in found))
        return {"columns": float(np.mean(columns)), "values": float(np.mean(values))}

    def _inputs(self) -> dict[str, int]:
        """Sizes of the projections' inputs, by path."""
        abstract = jax.eval_shape(jint8.quantize_params, self.model.params)
        leaves = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=lambda x: isinstance(x, jint8.QTensor))
        return {str(path): leaf.shape[-1] for path, leaf in leaves if isinstance(leaf, jint8.QTensor)}


def projection_size(params: Any) -> int:
    """How many weights the projections have."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, jint8.QTensor))
    return sum(leaf.size for leaf in leaves if isinstance(leaf, jint8.QTensor))


def embeddings(source: Path, text: str) -> dict[str, dict[str, Any]]:
    """Vectors of the text's paragraphs by each scheme, against those of the float32 encoder, one to a call."""
    texts = [paragraph for paragraph in text.split("\n\n") if len(paragraph.split()) >= 8][:ENCODED]

    def vectors(scheme: str) -> tuple[np.ndarray, int]:
        encoder = jint8.load_encoder(source, config=jint8.Config(scheme=scheme), dtype="float32")
        return np.stack([encoder.embed(text) for text in texts]), projection_bytes(encoder.params)

    def nearest(x: np.ndarray) -> np.ndarray:
        return np.argmax(x @ x.T - 2 * np.eye(len(x)), axis=1)

    expected, _ = vectors("none")
    rows = {}
    for scheme in SCHEMES:
        found, nbytes = vectors(scheme)
        cosine = np.sum(expected * found, axis=1)
        rows[scheme] = {
            "cosine": float(np.mean(cosine)),
            "lowest_cosine": float(np.min(cosine)),
            "nearest": float(np.mean(nearest(expected) == nearest(found))),
            "projection_bytes": nbytes,
        }
    return rows


def main() -> None:
    rows = _rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=cache_directory() / FILE)
    parser.add_argument("--text", type=Path, help="another text")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--variants", nargs="+", default=["plain"], choices=VARIANTS)
    parser.add_argument("--rows", nargs="+", default=[*rows, *PEERS], choices=[*rows, *PEERS])
    parser.add_argument("--torch", metavar="PYTHON", default=sys.executable, help="that has bitsandbytes and torchao")
    parser.add_argument("--sweep", action="store_true", help="thresholds instead of rows")
    parser.add_argument("--encoder", type=Path, help="measure the vectors of this encoder instead")
    parser.add_argument("--report", action="store_true", help="only write quality.md and quality.svg")
    parser.add_argument("--name", default="quality", help="of the files in results/")
    args = parser.parse_args()
    if args.report:
        print(*report(args.name), sep="\n")
        return
    text = args.text.read_text() if args.text else "\n\n".join(topics[name] for name in sorted(topics))
    about = {
        "text": str(args.text) if args.text else f"pydoc_data.topics of Python {sys.version.split()[0]}",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    if args.encoder:
        for name, result in embeddings(args.encoder, text).items():
            keep(args.name, about, f"{ENCODED} texts", "encoder", name, result)
        return
    bench = Bench(args.source, text, args.sequences, args.seq_len)
    size = f"{args.sequences}x{args.seq_len} tokens"
    for variant in args.variants:
        if args.sweep:
            for threshold in THRESHOLDS:
                result = bench.measure(variant, Row(jint8.Config(threshold=threshold)))
                result |= bench.share_in_16_bits(variant, threshold)
                keep(args.name, about, size, f"{variant}, thresholds", f"{threshold:g}", result)
        else:
            for name in args.rows:
                try:
                    found = (
                        bench.measure(variant, rows[name])
                        if name in rows
                        else bench.measure_peer(variant, name, args.torch)
                    )
                except Missing as missing:
                    print(f"{variant:18} {name:20} left out: {missing}", flush=True)
                else:
                    keep(args.name, about, size, variant, name, found)


def keep(name: str, about: dict[str, str], size: str, table: str, row: str, result: dict[str, Any]) -> None:
    """Adds a row to the result that is on disk, unless that is of another text."""
    shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}
    print(f"{table:18} {row:20}", shown, flush=True)
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    tables = before.get("tables", {}) if before.get("sha256") == about["sha256"] else {}
    tables.setdefault(table, {}).setdefault(size, {})[row] = result
    write(name, {**about, "tables": tables})


def report(name: str) -> list[Path]:
    """The tables as Markdown, and the sweeps of thresholds, if there are any, as a plot."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [f"Text: {result['text']}, SHA-256 `{result['sha256']}`."]
    sweeps = {}
    for table, sizes in result["tables"].items():
        for size, rows in sizes.items():
            lines += ["", f"{table}, {size}", "", *markdown(rows)]
            if table.endswith(", thresholds"):
                sweeps[table.removesuffix(", thresholds")] = rows
    files = [RESULTS / f"{name}.md"]
    files[0].write_text("\n".join(lines) + "\n")
    if sweeps:
        files.append(RESULTS / f"{name}.svg")
        plot(sweeps).savefig(files[1], metadata={"Date": None})
    return files


def plot(sweeps: dict[str, dict[str, dict[str, Any]]]) -> Any:
    """KL and share of columns in 16 bits by threshold, a line for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    titles = {"kl": "KL from float32, nats per token", "columns": "share of columns in 16 bits"}
    for ax, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for variant, rows in sweeps.items():
            found = {float(threshold): row[key] for threshold, row in rows.items() if float(threshold)}
            ax.plot(list(found), list(found.values()), marker="o", label=variant)
        ax.set(xlabel="threshold", ylabel=title, yscale="log")
        ax.legend()
    return figure


def markdown(rows: dict[str, dict[str, Any]]) -> list[str]:
    """One table; columns that no row has are left out."""
    columns = {
        "perplexity": ("perplexity", "{:.3f}"),
        "over_float": ("over float", "{:+.2%}"),
        "kl": ("KL, nats", "{:.4f}"),
        "top1": ("top-1 equal", "{:.3f}"),
        "cosine": ("cosine", "{:.5f}"),
        "lowest_cosine": ("lowest", "{:.4f}"),
        "nearest": ("nearest text equal", "{:.3f}"),
        "projection_bytes": ("projections, MB", "{:.2f}"),
        "bits": ("bits a weight", "{:.2f}"),
        "calibrated_columns": ("calibrated columns", "{:.2%}"),
        "columns": ("columns in 16 bits", "{:.2%}"),
        "values": ("values in 16 bits", "{:.3%}"),
    }
    shown = {key: value for key, value in columns.items() if any(key in row for row in rows.values())}

    def cell(row: dict[str, Any], key: str) -> str:
        if key not in row:
            return ""
        return shown[key][1].format(row[key] / 1e6 if key == "projection_bytes" else row[key])

    header = ["", *(title for title, _ in shown.values())]
    body = [[name, *(cell(row, key) for key in shown)] for name, row in rows.items()]
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)]


if __name__ == "__main__":
    main()
