"""SentencePiece's `tokenizer.model`: the tokens that the sentencepiece package gives."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import write_directory

from jint8.checkpoints import open_checkpoint
from jint8.checkpoints._tokenizer.gguf import tokenizer_from_metadata
from jint8.checkpoints._tokenizer.sentencepiece import metadata_of_sentencepiece

FOLDER = Path(__file__).parents[1] / "fixtures" / "sentencepiece"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_tokens(name):
    metadata = metadata_of_sentencepiece(FOLDER / f"{name}.model")
    metadata["tokenizer.ggml.add_bos_token"] = False
    tok = tokenizer_from_metadata(metadata, path=FOLDER)
    expected = EXPECTED["models"][name]
    for text, ids, back in zip(EXPECTED["texts"], expected["ids"], expected["texts"], strict=True):
        assert tok.encode(text) == ids, text
        if "\u2047" not in back:  # how SentencePiece writes the unknown token
            assert tok.decode(ids) == back


def directory(path, **settings):
    config = {"eos_token_id": 2}
    write_directory(path, {"model.safetensors": {"w": np.zeros(2, np.float32)}}, config=config)
    shutil.copy(FOLDER / "bpe.model", path / "tokenizer.model")
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | settings))
    return path


def test_directory_with_it_alone(tmp_path):
    tok = open_checkpoint(directory(tmp_path)).tokenizer()
    ids = EXPECTED["models"]["bpe"]["ids"][0]
    assert tok.encode("Hello world") == [1, *ids]
    assert tok.encode("Hello world", add_special_tokens=False) == ids
    assert (tok.bos_id, tok.eos_ids) == (1, (2,))


def test_settings_of_the_directory(tmp_path):
    size = len(metadata_of_sentencepiece(FOLDER / "bpe.model")["tokenizer.ggml.tokens"])
    added = {str(size): {"content": "<|im_end|>", "special": True}}
    tok = open_checkpoint(directory(tmp_path, add_bos_token=False, added_tokens_decoder=added)).tokenizer()
    assert tok.encode("a<|im_end|>") == [*EXPECTED["models"]["bpe"]["ids"][5], size]


@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_damaged(tmp_path, cut):
    path = directory(tmp_path)
    data = (path / "tokenizer.model").read_bytes()
    (path / "tokenizer.model").write_bytes(data[cut:])
    with pytest.raises(ValueError, match=r"tokenizer\.model: Expected"):
        open_checkpoint(path).tokenizer()


def test_damaged_table_of_characters(tmp_path):
    metadata = metadata_of_sentencepiece(FOLDER / "unigram.model")
    table = metadata["tokenizer.ggml.precompiled_charsmap"]
    assert len(table) > 100
    metadata["tokenizer.ggml.precompiled_charsmap"] = b"\xff" + table[9:]
    with pytest.raises(ValueError, match=r"x\.model: Expected metadata of a tokenizer"):
        tokenizer_from_metadata(metadata, path=tmp_path / "x.model")
