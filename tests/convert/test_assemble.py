"""What a process reads of a checkpoint when it has only some of the devices."""

import jax
import numpy as np
import pytest
from family_files import DIRECTORY

import jint8
from jint8._convert import read_params as _read
from jint8._convert.assemble import Assembly
from jint8._convert.read_params import read_params
from jint8._core.qtensor import is_qtensor
from jint8._trees.paths import Selection
from jint8.checkpoints import open_checkpoint
from jint8.models import Decoder, model_config, partition_specs


class HalfOfTheDevices:
    """The sharding of a process that has the second of two devices."""

    def __init__(self, spec):
        self.spec, self.mesh = spec, jax.make_mesh((1,), ("model",))

    def addressable_devices_indices_map(self, shape):
        axes = [*self.spec, *[None] * (len(shape) - len(self.spec))]
        index = tuple(slice(size // 2, size) if axis else slice(None) for axis, size in zip(axes, shape, strict=True))
        return {None: index}

    def half(self, array):
        return array[self.addressable_devices_indices_map(array.shape)[None]]


class Recording:
    """A checkpoint that counts the values that are read of each tensor."""

    def __init__(self, checkpoint):
        self._checkpoint, self.read_values = checkpoint, {}

    def __getattr__(self, name):
        return getattr(self._checkpoint, name)

    def read(self, name):
        return self._count(name, self._checkpoint.read(name))

    def read_rows(self, name, start, stop):
        return self._count(name, self._checkpoint.read_rows(name, start, stop))

    def _count(self, name, values):
        self.read_values[name] = self.read_values.get(name, 0) + values.size
        return values


TWO_DEVICES = jax.sharding.AbstractMesh((2,), ("model",))


def half_shardings(params):
    placed = jint8.shardings(params, partition_specs(params, TWO_DEVICES), mesh=TWO_DEVICES)
    return jax.tree.map(lambda sharding: HalfOfTheDevices(sharding.spec), placed)


def read_half(name, monkeypatch, **options):
    """The parameters of one device and of both, their shardings, and which share was read of each tensor."""
    config = options.pop("config", jint8.Config())
    monkeypatch.setattr(_read, "decoder_shardings", lambda planned, mesh: half_shardings(planned) if mesh else {})
    monkeypatch.setattr(Assembly, "array", lambda self: self._shards[0].values.reshape(self._shards[0].shape))
    with open_checkpoint(DIRECTORY / name) as checkpoint:
        recording = Recording(checkpoint)
        model = Decoder(model_config(checkpoint.config))
        whole = read_params(checkpoint, model, config=config, selection=Selection(), **options)
        half = read_params(recording, model, config=config, selection=Selection(), mesh=TWO_DEVICES, **options)
        expected = half_shardings(whole)
        share = {name: count / checkpoint.tensors[name].size for name, count in recording.read_values.items()}
        return half, whole, expected, share


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("name", "scheme"), [("llama_linear_biases", "row+dec"), ("gpt2", "llm.int8-zp"), ("mixtral", "llm.int8")]
)
def test_values(name, scheme, monkeypatch):
    half, whole, placed, _ = read_half(name, monkeypatch, config=jint8.Config(scheme=scheme))
    jax.tree.map(lambda got, all_, one: np.testing.assert_array_equal(got, one.half(all_)), half, whole, placed)
    assert is_qtensor(half["layers_0"]["mlp"]["down"]["weight"]) or name == "mixtral"


def test_only_rows_of_own_devices_are_read(monkeypatch):
    *_, share = read_half("llama_linear_biases", monkeypatch)
    by_rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    for name, read in share.items():
        assert read == (0.5 if any(kind in name for kind in by_rows) else 1), name


def test_outliers(monkeypatch):
    config, columns = jint8.Config(outliers="static"), {"layers_1/attention/qkv/weight": [3, 8]}
    half, whole, *_ = read_half("llama", monkeypatch, config=config, outliers=columns)
    got, want = (tree["layers_1"]["attention"]["qkv"]["weight"] for tree in (half, whole))
    np.testing.assert_array_equal(got.outlier_rows, want.outlier_rows[32:])
    np.testing.assert_array_equal(got.outlier_index, want.outlier_index)
