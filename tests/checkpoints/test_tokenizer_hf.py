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


def test_template_for_tools(directory):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    tok = write(directory, tokenizer_config={"chat_template": named})
    assert tok.apply_chat_template([]) == tok.apply_chat_template([], tools=None) == "plain"
    assert tok.apply_chat_template([], tools=[{"type": "function"}]) == "1 tools"
    asks = "{% if tools is not none or documents is not none %}given{% else %}nothing{% endif %}"
    tok = write(directory, tokenizer_config={"chat_template": asks})
    assert tok.apply_chat_template([]) == "nothing"
    assert tok.apply_chat_template([], documents=[]) == "given"


NEW = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
BESIDE = {  # files beside tokenizer.json that name the tokens 7 and 8
    "added_tokens_decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {"8": NEW | {"content": "<b>"}, "7": NEW | {"content": "<a>"}}, "eos_token": "<b>"
        }
    },
    "added_tokens": {"added_tokens": {"<b>": 8, "<a>": 7}, "tokenizer_config": {"eos_token": "<b>"}},
    "special_tokens_map": {
        "special_tokens_map": {"additional_special_tokens": ["<s>", {"content": "<b>"}], "bos_token": "<a>"},
        "tokenizer_config": {"eos_token": "<b>"},
    },
}  # fmt: skip


@pytest.mark.parametrize("files", BESIDE.values(), ids=BESIDE)
def test_tokens_of_other_files(directory, files):
    tok = write(directory, config={"vocab_size": 9}, **files)
    assert tok.encode("<a>hi<b>") == [7, tok.backend.token_to_id("hi"), 8]
    assert tok.eos_ids == (8,)


def test_added_token_of_another_number(directory):
    with pytest.raises(ValueError, match=r"added token '<a>' to have the number 9, got 7"):
        write(directory, added_tokens={"<a>": 9})


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<a>": "seven"}},
        {"tokenizer_config": {"added_tokens_decoder": {"7": {"special": True}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<a>", "other": 1}}}},
        {"tokenizer_config": {"added_tokens_decoder": ["<a>"]}},
        {"special_tokens_map": {"additional_special_tokens": [3]}},
    ],
)
def test_damaged_tokens(directory, files):
    with pytest.raises(ValueError, match="Expected added tokens with a text and a number each"):
        write(directory, **files)


def test_ends_of_the_configuration(directory):
    """Beside the tokenizer's own, which they name too; a configuration that contradicts it is an older one."""
    settings = {"tokenizer_config": {"eos_token": "</s>"}}
    assert write(directory, config={"eos_token_id": [1, 3, 5]}, **settings).eos_ids == (1, 3, 5)
    assert write(directory, config={"eos_token_id": [3, 5]}, **settings).eos_ids == (1,)


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
