import dataclasses
import errno
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_model import make_llama_directory

import jint8
from jint8._inference import save as save_module
from jint8.checkpoints import _directory, open_checkpoint
from jint8.checkpoints._directory import _shards
from jint8.checkpoints._jint8 import _is_zero
from jint8.checkpoints._sums import checksum

FILES = ("SHA256SUMS", "chat_template.jinja", "config.json", "jint8.json", "model.safetensors", "tokenizer.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_llama_directory(tmp_path_factory.mktemp("save") / "llama", seed=2)


@pytest.fixture(scope="module")
def model(source):
    return jint8.load(source, dtype="float32")


@pytest.fixture
def saved(model, tmp_path):
    jint8.save(tmp_path / "saved", model)
    return tmp_path / "saved"


def assert_same_bits(got, expected):
    """Every leaf's bits, and (in the tree's structure) every static field of every QTensor."""
    got_leaves, got_structure = jax.tree.flatten(got)
    leaves, structure = jax.tree.flatten(expected)
    assert got_structure == structure
    for a, b in zip(got_leaves, leaves, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


MODELS = {
    "llm.int8": {},
    "config": {"config": jint8.Config(threshold=2.5, outliers="token")},
    "vector": {"config": jint8.Config(scheme="vector")},
    "zero_points": {"config": jint8.Config(scheme="llm.int8-zp")},
    "per_tensor": {"config": jint8.Config(scheme="absmax")},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "float": {"quantize": False},
    "skip": {"skip": "mlp"},
    "int8_embedding_and_head": {"include": ("embedding", "lm_head")},
}


@pytest.mark.first_case
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_same_bits(options, source, tmp_path):
    before = jint8.load(source, **options)
    jint8.save(tmp_path / "saved", before)
    after = jint8.load(tmp_path / "saved", verify=True)
    assert_same_bits(after.params, before.params)
    assert (after.quant, after.model, after.config) == (before.quant, before.model, before.config)
    assert after.hf_config == before.hf_config


def test_floats_are_asked_for(source, tmp_path):
    """Of a model that was saved in floating point, which has them."""
    before = jint8.load(source, quantize=False)
    jint8.save(tmp_path / "saved", before)
    after = jint8.load(tmp_path / "saved", quantize=False, config=jint8.Config())
    assert_same_bits(after.params, before.params)
    assert after.quant == jint8.Config(scheme="none")


def test_saved_again(saved, tmp_path):
    jint8.save(tmp_path / "again", jint8.load(saved))
    for file in saved.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_tied_head(tmp_path):
    before = jint8.load(make_llama_directory(tmp_path / "llama", seed=2, tie=True))
    jint8.save(tmp_path / "saved", before)
    after = jint8.load(tmp_path / "saved")
    assert_same_bits(after.params, before.params)
    assert "lm_head" not in after.params


def test_tokenizer(saved, model):
    after = jint8.load(saved).tokenizer
    before = model.tokenizer
    text = "Grüße <s> 123"
    assert after.encode(text) == before.encode(text)
    names = ("bos_id", "eos_ids", "pad_id", "chat_template", "vocab_size")
    assert all(getattr(after, name) == getattr(before, name) for name in names)


def test_without_a_tokenizer(model, tmp_path):
    jint8.save(tmp_path / "saved", dataclasses.replace(model, tokenizer=None))
    assert jint8.load(tmp_path / "saved", verify=True).tokenizer is None


def test_logits_are_those_of_before(saved, model):
    tokens = np.arange(12)[None]
    np.testing.assert_array_equal(jint8.load(saved).logits(tokens), model.logits(tokens))


def test_other_readers(saved, model):
    """The reference implementation reads the arrays."""
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    w = model.params["layers_0"]["mlp"]["down"]["weight"]
    np.testing.assert_array_equal(tensors["layers_0/mlp/down/weight#q"], w.q)
    np.testing.assert_array_equal(tensors["layers_0/mlp/down/weight#scale"], w.scale)
    assert open_checkpoint(saved).format == "jint8"


def test_shards(model, tmp_path):
    jint8.save(tmp_path / "saved", model, shard_bytes=20_000)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(x.nbytes for x in safetensors.numpy.load_file(file).values()) for file in files]
    assert max(sizes) <= 33_152  # the embedding, larger than a shard, has one to itself
    assert_same_bits(jint8.load(tmp_path / "saved", verify=True).params, model.params)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=files[1].name):
        jint8.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([4, 4, 4], [[0, 1], [2]]), ([9, 1, 9], [[0], [1], [2]]), ([8], [[0]]), ([], [[]]), ([0, 8, 0], [[0, 1, 2]])],
    ids=["full", "too_large", "one", "none", "empty_arrays"],
)
def test_which_shard(sizes, expected):
    arrays = {i: np.zeros(size, np.int8) for i, size in enumerate(sizes)}
    assert _shards(arrays, 8) == expected


def test_dtype_of_the_caller(saved, model):
    after = jint8.load(saved, dtype="bfloat16")
    w, before = (m.params["layers_1"]["mlp"]["down"]["weight"] for m in (after, model))
    assert (after.params["embedding"].dtype, w.dtype, after.model.dtype) == (jnp.bfloat16,) * 3
    np.testing.assert_array_equal(w.q, before.q)
    assert w.scale.dtype == jnp.float32


def test_progress(saved):
    seen = []
    jint8.load(saved, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_config_of_the_caller(saved):
    config = jint8.Config(threshold=3, outliers="token")
    after = jint8.load(saved, config=config)
    assert after.quant == config
    assert after.params["layers_1"]["mlp"]["down"]["weight"].config == config
    with pytest.raises(ValueError, match=r"Expected a scheme that runs on weights quantized by 'llm.int8'"):
        jint8.load(saved, config=jint8.Config(scheme="absmax"))


@pytest.mark.parametrize("options", [{"quantize": False}, {"skip": "mlp"}, {"include": "lm_head"}], ids=str)
def test_weights_stay_as_they_are(options, saved):
    with pytest.raises(ValueError, match="one that jint8 saved"):
        jint8.load(saved, **options)


def test_files_have_usual_permissions(saved):
    (saved / "usual").touch()
    usual = stat.S_IMODE((saved / "usual").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()} == {usual}


@pytest.mark.parametrize("exists", [True, False], ids=["empty_directory", "nothing"])
def test_destination(exists, model, tmp_path):
    path = tmp_path / "new" / "saved"
    if exists:
        path.mkdir(parents=True)
    jint8.save(str(path), model)
    assert sorted(os.listdir(path.parent)) == ["saved"]


def link(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
    "occupy",
    [lambda path: path.touch(), lambda path: (path / "mine").mkdir(parents=True), link],
    ids=["file", "directory", "dangling_link"],
)
def test_occupied_destination(occupy, model, tmp_path):
    occupy(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="saved: Expected nothing or an empty directory"):
        jint8.save(tmp_path / "saved", model)
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize("name", [name for name in FILES if name != "model.safetensors"])
def test_full_disk(name, model, tmp_path, monkeypatch):
    """The tokenizers package would raise a bare Exception; that of arrays is tested with the command line."""
    write_text = Path.write_text

    def full(self, text, **options):
        if self.name == name:
            write_text(self, text[: len(text) // 2], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does it, without a name
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=rf"No space left on device: '.*/new/saved/{name}'"):
        jint8.save(tmp_path / "new" / "saved", model)
    assert os.listdir(tmp_path) == []


def test_space_is_looked_for_first(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(_directory, "_save_arrays", lambda *args: pytest.fail("written nevertheless"))
    with pytest.raises(OSError, match=r"Expected .* MB of free space, got 0\.0 MB: '.*/saved'"):
        jint8.save(tmp_path / "saved", model)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", ["jint8", "bitsandbytes"])
def test_current_directory(format, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jint8.save(".", model, format=format)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    assert_same_bits(jint8.load(".", verify=True).params, jint8.load(tmp_path).params)


def test_nothing_is_converted_for_a_place_that_is_taken(model, tmp_path, monkeypatch):
    monkeypatch.setattr(save_module, "to_arrays", lambda *args, **options: pytest.fail("converted nevertheless"))
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="'mine' is in it"):
        jint8.save(tmp_path, model)


def test_bad_arguments(model, tmp_path):
    with pytest.raises(ValueError, match="shard_bytes"):
        jint8.save(tmp_path / "saved", model, shard_bytes=0)
    with pytest.raises(ValueError, match="hf_config"):
        jint8.save(tmp_path / "saved", dataclasses.replace(model, hf_config=None))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", FILES)
def test_flipped_byte(name, saved):
    assert sorted(os.listdir(saved)) == sorted(FILES)
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"Expected" if name == "SHA256SUMS" else rf"{name}: Expected SHA-256"):
        jint8.load(saved, verify=True)


def test_a_flipped_weight_is_seen_by_its_checksum(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor '.*': Expected checksum [0-9a-f]{16}"):
        jint8.load(saved)
    with pytest.raises(ValueError, match=r"model\.safetensors: Expected SHA-256"):
        jint8.load(saved, verify=True)
    metadata(lambda m: m.pop("checksums"))(saved)  # as 0.1.0 wrote it
    jint8.load(saved)


def test_half_of_a_model_of_0_1_0(saved):
    """It has no checksums. Zeros make its SHA-256 worth the time."""
    file = saved / "model.safetensors"
    metadata(lambda m: m.pop("checksums"))(saved)
    jint8.load(saved)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(ValueError, match=r"model\.safetensors: Expected SHA-256 .* the file is damaged"):
        jint8.load(saved)


def test_zeros_may_be_meant(model, tmp_path):
    """A bias, or a layer that somebody has taken out."""
    zeros = jax.tree.map(jnp.zeros_like, model.params["layers_1"])
    jint8.save(tmp_path / "saved", dataclasses.replace(model, params=model.params | {"layers_1": zeros}))
    for edit in (lambda m: None, lambda m: m.pop("checksums")):
        metadata(edit)(tmp_path / "saved")
        sums = (tmp_path / "saved" / "SHA256SUMS").read_text()
        assert "model.safetensors" in sums
        assert_same_bits(jint8.load(tmp_path / "saved").params["layers_1"], zeros)


def test_every_nan_is_something():
    """Some warn where NumPy takes them for numbers."""
    signalling = np.array([0, 0x7F800001], np.uint32).view(np.float32)
    assert not _is_zero(signalling)
    assert not _is_zero(np.array([0, 0x7F81], np.uint16).view(jnp.bfloat16))
    assert _is_zero(np.zeros((2, 3), jnp.bfloat16))
    assert _is_zero(np.zeros((), np.float32))


@pytest.mark.parametrize("size", [0, 1, 4096, 4096 * 2 + 3])
def test_checksum(size):
    x = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    lost, exchanged, other = x.copy(), np.roll(x, 4096), x.copy()
    lost[size // 2 :] = 0
    other[size // 3 : size // 3 + 1] ^= 1
    different = [y for y in (lost, exchanged, other) if (x != y).any()]
    assert len(different) == {0: 0, 1: 2, 4096: 2}.get(size, 3)
    assert checksum(x) not in [checksum(y) for y in different]
    assert checksum(x) == checksum(x.copy())
    assert len(checksum(x)) == 16


def test_verify_knows_which_files_there_are(saved, source):
    (saved / "extra.safetensors").touch()
    with pytest.raises(ValueError, match=r"extra\.safetensors: Expected only files that SHA256SUMS lists"):
        jint8.load(saved, verify=True)
    (saved / "extra.safetensors").unlink()
    (saved / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        jint8.load(saved, verify=True)
    with pytest.raises(FileNotFoundError, match=r"SHA256SUMS: Expected this file, .* got a directory without"):
        jint8.load(source, verify=True)
    with pytest.raises(FileNotFoundError, match=r"SHA256SUMS: Expected this file, .* got a file without"):
        jint8.load(source / "model.safetensors", verify=True)


DOWN = "layers_0/mlp/down/weight"


def arrays(**changes):
    """A fault in the arrays; None removes one."""

    def fault(path):
        tensors = {name: x.copy() for name, x in safetensors.numpy.load_file(path / "model.safetensors").items()}
        for part, change in changes.items():
            name = "norm/scale" if part == "norm" else "extra" if part == "extra" else f"{DOWN}#{part}"
            tensors[name] = change(tensors.get(name))
            if tensors[name] is None:
                del tensors[name]
        safetensors.numpy.save_file(tensors, path / "model.safetensors")
        metadata(lambda m: m.pop("checksums"))(path)
        (path / "SHA256SUMS").unlink()

    return fault


def metadata(edit):
    def fault(path):
        value = json.loads((path / "jint8.json").read_text())
        edit(value)
        (path / "jint8.json").write_text(json.dumps(value))

    return fault


CONTIGUOUS = np.ascontiguousarray
FAULTS = {
    "truncated": (
        lambda path: os.truncate(path / "model.safetensors", 1000), r"model\.safetensors.*truncated",
    ),
    "no_scale": (arrays(scale=lambda x: None), rf"model\.safetensors: tensor '{DOWN}'"),
    "no_weight": (arrays(q=lambda x: None, scale=lambda x: None), f"a tensor '{DOWN}', got none"),
    "no_norm": (arrays(norm=lambda x: None), "a tensor 'norm/scale', got none"),
    "unknown_array": (arrays(extra=lambda x: np.zeros(1)), "tensor 'extra': Expected only"),
    "unknown_field": (arrays(more=lambda x: np.zeros((1, 1))), f"tensor '{DOWN}'"),
    "wrong_shape": (arrays(q=lambda x: CONTIGUOUS(x[:, 1:])), f"tensor '{DOWN}': Expected shape"),
    "wrong_scale": (arrays(scale=lambda x: CONTIGUOUS(x[1:])), f"tensor '{DOWN}'"),
    "wrong_rank": (arrays(scale=lambda x: x.reshape(-1)), f"tensor '{DOWN}'"),
    "wrong_dtype": (arrays(q=lambda x: x.astype(np.int16)), f"tensor '{DOWN}'"),
    "scale_not_finite": (arrays(scale=lambda x: x * np.inf), f"tensor '{DOWN}': Expected finite values of scale"),
    "negative_scale": (arrays(scale=lambda x: -x), f"tensor '{DOWN}': Expected scales of at least 0"),
    "scales_lost": (arrays(scale=lambda x: 0 * x), f"tensor '{DOWN}': Expected values and scales that are 0 together"),
    "values_lost": (arrays(q=lambda x: 0 * x), f"tensor '{DOWN}': Expected values and scales that are 0 together"),
    "version": (metadata(lambda m: m.update(version=1)), r"jint8\.json: Expected format version 2 .*4, got 1: conv"),
    "no_dtype": (metadata(lambda m: m.pop("dtype")), r"jint8\.json: Expected a str as 'dtype'"),
    "unknown_dtype": (metadata(lambda m: m.update(dtype="float33")), "float33"),
    "no_config": (metadata(lambda m: m.pop("quant")), r"jint8\.json: Expected a dict as 'quant'"),
    "unknown_option": (metadata(lambda m: m["quant"].update(new=1)), r"jint8\.json: Expected a config"),
    "bad_threshold": (metadata(lambda m: m["quant"].update(threshold=-1)), r"jint8\.json: Expected a config"),
    "weight_of_another_model": (metadata(lambda m: m["weights"].update(x={})), "tensor 'x'"),
    "static_field_missing": (metadata(lambda m: m["weights"][DOWN]["fields"].pop("config")), f"tensor '{DOWN}'"),
    "unknown_static_field": (
        metadata(lambda m: m["weights"][DOWN]["fields"].update(new=1)),
        rf"jint8\.json: tensor '{DOWN}': Expected static fields of a QTensor among dtype, .*, got new",
    ),
    "unknown_option_of_a_weight": (
        metadata(lambda m: m["weights"][DOWN]["fields"]["config"].update(new=1)),
        rf"jint8\.json: tensor '{DOWN}': Expected options of a Config among scheme, .*, got new",
    ),
    "array_among_the_fields": (
        metadata(lambda m: m["weights"][DOWN]["fields"].update(zero=1)),
        rf"jint8\.json: tensor '{DOWN}': .*, got zero",
    ),
    "unknown_kind_of_array": (
        metadata(lambda m: m["weights"][DOWN]["arrays"].append("more")),
        rf"jint8\.json: tensor '{DOWN}': Expected arrays among q, .*, got 'more'",
    ),
    "no_description": (
        metadata(lambda m: m["weights"].update({DOWN: {}})),
        rf"jint8\.json: tensor '{DOWN}': Expected arrays and fields",
    ),
    "impossible_order": (
        metadata(lambda m: m["weights"][DOWN]["fields"].update(order=[0, 2])),
        rf"jint8\.json: tensor '{DOWN}': Expected order to be a permutation .*, got \[0, 2\]",
    ),
    "no_checksums": (metadata(lambda m: m.update(checksums=[])), r"jint8\.json: Expected a dict as 'checksums'"),
    "bad_tokenizer_ids": (metadata(lambda m: m.update(tokenizer={"end": 1})), r"jint8\.json"),
    "not_json": (lambda path: (path / "jint8.json").write_text("{"), r"jint8\.json: Expected JSON"),
    "architecture": (
        lambda path: (path / "config.json").write_text('{"model_type": "mamba"}'), "mamba",
    ),
}  # fmt: skip


@pytest.mark.first_case
@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_fault(fault, message, saved):
    fault(saved)
    with pytest.raises(ValueError, match=message):
        jint8.load(saved)
