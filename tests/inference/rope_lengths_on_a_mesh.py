"""Whether rows divided over both axes of a mesh continue as `test_rope_lengths.py` expects, as JSON by scaling."""

import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import test_rope_lengths as cases
from checkpoint_files import write_directory

import jint8
from jint8._inference import generate as at_once

NEW = 5
PROMPTS = [cases.PROMPTS[i] for i in (0, 1, 1, 2)]
MESH = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])


def same(kind: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        config = cases.CONFIG | {"vocab_size": cases.VOCAB, "tie_word_embeddings": False} | cases.SCALINGS[kind]
        path = write_directory(Path(folder) / "model", {"model.safetensors": cases.WEIGHTS}, config=config)
        model = jint8.load(path, quantize=False, dtype="float32", mesh=MESH)
    rows = [list(prompt) for prompt in PROMPTS]
    for row in rows:
        for _ in range(NEW):
            row.append(int(cases.oracle(kind, row).argmax()))
    got = np.concatenate(list(model.generate_tokens(PROMPTS, max_tokens=NEW)), axis=1)
    return got.tolist() == [row[-NEW:] for row in rows]


at_once.CHUNK = 16  # so that the first prompt goes through in several
print(json.dumps({kind: same(kind) for kind in cases.SCALINGS}))
