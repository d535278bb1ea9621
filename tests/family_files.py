"""The fixtures of all families; see tests/fixtures/make_families.py."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

DIRECTORY = Path(__file__).parent / "fixtures" / "families"
NAMES = sorted(path.name for path in DIRECTORY.iterdir())


def expected(name):
    """tokens [1, 20], logits [1, 20, v], greedy [2, 12]."""
    return np.load(DIRECTORY / name / "expected.npz")


def config(name):
    return json.loads((DIRECTORY / name / "config.json").read_text())


def rewrite(name, path, rename=lambda tensor: tensor, **more):
    """A copy of a fixture with other tensor names, and more tensors."""
    tensors = safetensors.numpy.load_file(DIRECTORY / name / "model.safetensors")
    path.mkdir(exist_ok=True)
    safetensors.numpy.save_file({rename(k): v for k, v in tensors.items()} | more, path / "model.safetensors")
    (path / "config.json").write_text((DIRECTORY / name / "config.json").read_text())
    return path
