"""Tokenizers of Hugging Face directories."""

import json

import numpy as np
import pytest
from checkpoint_files import write_directory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jint8.checkpoints import open_checkpoint


@pytest.fixture
def directory(tmp_path):
    """A word-level tokenizer, saved with truncation and padding on as encoders' are."""
    words = ["<s>", "</s>", "<pad>", "<end>", "hi", "you", "there"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    backend.add_special_tokens(words[:4])
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    write_directory(tmp_path, {"model.safetensors": {"w": np.zeros(2, np.float32)}}, config={"eos_token_id": [3]})
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory, **files):
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return open_checkpoint(directory).tokenizer()


def test_no_tokenizer(directory):
    (directory / "tokenizer.json").unlink()
    assert open_checkpoint(directory).tokenizer() is None


def test_no_truncation_nor_padding(directory):
    assert write(directory).encode("hi you there") == [4, 5, 6]


AS_DICT = {"content": "</s>", "special": True}
ENDS = {
    "as_str": ({"tokenizer_config": {"eos_token": "</s>"}}, (1,)),
    "as_dict": ({"tokenizer_config": {"eos_token": AS_DICT}}, (1,)),
    "special_tokens_map": ({"special_tokens_map": {"eos_token": AS_DICT}}, (1,)),
    "generation_config": ({"generation_config": {"eos_token_id": 0}}, (0,)),
    "both": ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [3, 1]}}, (1, 3)),
    "model_config": ({}, (3,)),
    "not_in_vocabulary": ({"tokenizer_config": {"eos_token": "<none>"}}, (3,)),
}


@pytest.mark.parametrize(("files", "expected"), ENDS.values(), ids=ENDS)
def test_ends(directory, files, expected):
    assert write(directory, **files).eos_ids == expected


def test_special_ids(directory):
    tok = write(directory, tokenizer_config={"bos_token": "<s>", "pad_token": {"content": "<pad>"}})
    assert (tok.bos_id, tok.pad_id, tok.vocab_size) == (0, 2, 7)
    assert tok.decode(np.array([0, 4, 1])) == "hi"
    assert tok.decode([0, 4, 1], skip_special_tokens=False) == "<s>hi</s>"


TEMPLATE = "{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}"
TEMPLATES = {
    "tokenizer_config": {"tokenizer_config": {"chat_template": TEMPLATE}},
    "named": {
        "tokenizer_config": {
            "chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        }
    },
    "json": {"chat_template": {"chat_template": TEMPLATE}},
}


@pytest.mark.parametrize("files", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_template(directory, files):
    files = {"special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"}} | files
    tok = write(directory, **files)
    assert tok.apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>hi</s>"


def test_chat_template_file(directory):
    (directory / "chat_template.jinja").write_text("file")
    assert write(directory, tokenizer_config={"chat_template": "other"}).chat_template == "file"


def test_no_chat_template(directory):
    with pytest.raises(ValueError, match="Expected a tokenizer with a chat template"):
        write(directory).apply_chat_template([])


@pytest.mark.parametrize("file", ["tokenizer", "tokenizer_config", "generation_config"])
def test_damaged(directory, file):
    (directory / f"{file}.json").write_text('{"a')
    with pytest.raises(ValueError, match=rf"{file}\.json: Expected"):
        open_checkpoint(directory).tokenizer()


@pytest.mark.parametrize("add_bos", [True, False], ids=["opt", "gpt2"])
def test_vocabulary_and_merges(directory, add_bos):
    """Without tokenizer.json, as OPT has it."""
    (directory / "tokenizer.json").unlink()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "</s>", *alphabet, "hi", "Ġhi"]
    (directory / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\nh i\nĠ hi\n", encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": add_bos, "bos_token": "</s>", "eos_token": "</s>"}
    tok = write(directory, tokenizer_config=settings)
    ids = [tokens.index(t) for t in ("hi", "Ġhi", "Ġ", "1", "</s>")]
    assert tok.encode("hi hi 1</s>") == [1] * add_bos + ids
    assert (tok.bos_id, tok.eos_ids) == (1, (1,))
    assert tok.decode(ids) == "hi hi 1"
