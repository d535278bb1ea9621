"""Reads a checkpoint into weights of four bits that are calibrated: by which tokens, and how many columns are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from jint8._convert.read_params import Progress, check_mesh, read_params, read_targets
from jint8._convert.targets import find_targets, say_what_differs
from jint8._core.calibration import Calibration
from jint8._core.config import Config
from jint8._inference.generation import generate
from jint8._inference.language_model import CALIBRATION_LENGTH, LanguageModel
from jint8._inference.layer_by_layer import quantize_layer_by_layer
from jint8._inference.sampling import Sampling
from jint8._trees.paths import Selection
from jint8.analysis._criteria import Criteria
from jint8.checkpoints import Checkpoint
from jint8.models import Decoder

# Calibrated columns of each weight in four bits: docs/quality.md has what they gain. Large columns of activations are
# not the reason there, so their number does not depend on how large those are.
FOUR_BIT_COLUMNS = 8
OWN_SEQUENCES = 32  # of CALIBRATION_LENGTH tokens, that a model writes itself to be calibrated on
START = 48  # tokens of the text that comes with the package, which it continues


def load_four_bits(
    checkpoint: Checkpoint,
    model: Decoder,
    *,
    config: Config,
    selection: Selection,
    text: str | None,
    mesh: Mesh | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """The parameters of a model in four bits, calibrated layer by layer.

    Args:
      checkpoint: in floating point.
      model: that the checkpoint is for.
      config: how to quantize.
      selection: which weights.
      text: on which it is calibrated. None is the short one that comes with the package, or, for GPTQ, which needs
        more tokens than that has, one that the model writes itself.
      mesh: None: weights of four bits are quantized on one device.
      progress: called with (bytes read so far, bytes in all) of the checkpoint; from 0 again where it is read twice.
    """
    check_mesh(checkpoint, config, mesh)
    targets = find_targets(checkpoint, model, config=config, selection=selection)
    say_what_differs(checkpoint, targets, config)
    if config.rounding == "gptq" and text is None:
        other = config.for_calibration()
        params = read_params(checkpoint, model, config=other, selection=selection, progress=progress)
        calls = own_tokens(LanguageModel(model, params, checkpoint.tokenizer(), model.config, other))
        del params
    else:
        calls = LanguageModel(model, {}, checkpoint.tokenizer(), model.config, config).batches(text)
    floats = {path: target._replace(contract_axes=None, group=None) for path, target in targets.items()}
    total = sum(checkpoint.tensors[name].nbytes for target in targets.values() for name in target.source.tensors)
    done = 0

    def read(part: str, known: Calibration | None) -> dict[str, Any]:
        """Each part is read twice, of which the second time counts."""
        nonlocal done
        chosen = {path: (floats if known is None else targets)[path] for path in targets if _part(path) == part}
        if known is None:
            return read_targets(checkpoint, model, chosen, config=Config(scheme="none"))
        found = read_targets(checkpoint, model, chosen, config=config, outliers=known, progress=_from(done))
        done += sum(checkpoint.tensors[name].nbytes for target in chosen.values() for name in target.source.tensors)
        return found

    def _from(before: int) -> Progress | None:
        return None if progress is None else lambda read, _: progress(before + read, total)

    quantized = {path: len(t.float_leaf.shape) for path, t in targets.items() if t.contract_axes is not None}
    return quantize_layer_by_layer(model, read, quantized, calls, Criteria(budget=FOUR_BIT_COLUMNS))


def _part(path: str) -> str:
    """The layer that a parameter belongs to; `""` for none."""
    first = path.split("/")[0]
    return first if first.startswith("layers_") else ""


def own_tokens(model: LanguageModel) -> list[np.ndarray]:
    """Tokens that a model writes itself, the same each time: int32 `[1, length]` each.

    They begin with some of the short text that comes with the package, of which every kind of text is continued, or,
    where there is no tokenizer, with a random token.

    Source: Liu et al., LLM-QAT: Data-Free Quantization Aware Training for Large Language Models, arXiv 2305.17888,
    section 2.1.
    """
    config = model.config
    length = CALIBRATION_LENGTH if config.learned_positions is None else min(CALIBRATION_LENGTH, config.max_positions)
    if model.tokenizer is None:
        starts = np.random.default_rng(0).integers(config.vocab_size, size=(OWN_SEQUENCES, 1))
    else:
        ids = np.concatenate(model.batches(), axis=1)[0]
        first = np.linspace(0, max(len(ids) - START, 0), OWN_SEQUENCES).astype(int)
        starts = ids[first[:, None] + np.arange(min(START, len(ids), length - 1))]
    options: dict[str, Any] = {"max_tokens": length - starts.shape[1], "every": length, "seed": 0, "kind": None}
    sampling = Sampling.of(temperature=1.0)  # without end tokens: texts go on, or others begin
    found = generate(model.model, {"params": model.params}, starts.tolist(), sampling=sampling, **options)
    return list(np.concatenate([starts, *found], axis=1).astype(np.int32)[:, None])
