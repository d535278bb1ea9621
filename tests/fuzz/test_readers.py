"""A short run of the fuzzer, and the kinds of damage that it found, one by one."""

import json
import struct
import sys
from pathlib import Path

import pytest
from tiny_model import make_llama_directory

from jint8.checkpoints import open_checkpoint
from jint8.models.families import model_config

sys.path.insert(0, str(Path(__file__).parent))
import readers

CASES = 150  # about a second
CASES_OF_MODELS = 40  # of which parameters are made: the first ones take a second
OF_MODELS = sorted(set(readers.READERS) - set(readers.WITHOUT_MODEL))


@pytest.mark.parametrize(
    ("only", "cases"), [(readers.WITHOUT_MODEL, CASES), (OF_MODELS, CASES_OF_MODELS)], ids=["files", "models"]
)
def test_mutated_files_give_errors_that_name_them(only, cases):
    ran, faults, longest = readers.fuzz(range(cases), seed=7, only=only)
    assert not faults, faults
    assert ran == cases
    assert longest < readers.SECONDS


def test_it_finds_an_error_without_the_name(monkeypatch):
    def fail(path):
        raise ValueError("Expected another file")

    monkeypatch.setattr(readers, "READERS", dict.fromkeys(readers.READERS, fail))
    _, faults, _ = readers.fuzz(range(3), seed=0)
    assert len(faults) == 1


def safetensors(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


def entry(**changes):
    return json.dumps({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}).encode()


HEADERS = {
    "nested_offsets": entry(data_offsets="@").replace(b'"@"', b"[" * 100_000 + b"]" * 100_000),
    "nested_dtype": entry(dtype="@").replace(b'"@"', b"[" * 100_000 + b"]" * 100_000),
    "infinite_size": entry(shape=[float("inf")]),
    "shape_is_text": entry(shape="1"),
    "negative_sizes": entry(shape=[-1, -1]),
    "size_beyond_numpy": entry(shape=[0, 2**70], data_offsets=[0, 0]),
    "empty_beyond_numpy": entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "too_many_axes": entry(shape=[1] * 70),
    "one_offset": entry(data_offsets=[0]),
    "true_as_size": entry(shape=[True]),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_header(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors(header, b"\0" * 4))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Expected") as e:
        open_checkpoint(tmp_path)
    assert str(file) in str(e.value)


FILES = {
    "template_not_utf8": ("chat_template.jinja", b"{{ messages }}\xff"),
    "config_nested": ("config.json", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "config_not_utf8": ("config.json", b'{"a": "\xff"}'),
    "token_is_number": ("tokenizer_config.json", b'{"eos_token": 5}'),
    "token_is_surrogate": ("tokenizer_config.json", rb'{"eos_token": "\ud800"}'),
    "template_is_number": ("tokenizer_config.json", b'{"chat_template": 5}'),
    "templates_without_names": ("tokenizer_config.json", b'{"chat_template": [[]]}'),
    "end_is_text": ("generation_config.json", b'{"eos_token_id": "</s>"}'),
}


@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES)
def test_file(tmp_path, name, content):
    make_llama_directory(tmp_path, seed=0)
    (tmp_path / name).write_bytes(content)

    def read():
        with open_checkpoint(tmp_path) as checkpoint:
            checkpoint.tokenizer()

    with pytest.raises(ValueError, match="Expected") as e:
        read()
    # Where values of several files are at odds, the directory is named.
    assert str(tmp_path / name if "utf8" in name or "nested" in name else tmp_path) in str(e.value)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "factor_0": {"rope_scaling": LLAMA3 | {"factor": 0}},
    "equal_bounds": {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
    "scaling_is_text": {"rope_scaling": "linear"},
    "theta_0": {"rope_theta": 0.0},
    "theta_too_large": {"rope_theta": 10**400},
    "huge_heads": {"head_dim": 2**31},
    "huge_size": {"hidden_size": 2**40},
    "huge_layers": {"num_hidden_layers": 10**9},
    "huge_layers_with_windows": {"model_type": "mistral", "sliding_window": 4, "num_hidden_layers": 2**62},
    "huge_experts": {"model_type": "mixtral", "num_local_experts": 10**9},
    "type_is_list": {"model_type": ["llama"]},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_config(changes):
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = {"model_type": "llama", "num_attention_heads": 2, **sizes}
    assert model_config(config).head_dim == 4
    with pytest.raises(ValueError, match="Expected"):
        model_config(config | changes)
