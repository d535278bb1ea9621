import numpy as np
import pytest
from tiny_model import CHANNELS, OTHERS, WEIGHTS, make_llama_directory

import jint8

TEXT = "Jackdaws love my big sphinx of quartz. " * 3
SEQ = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def log_probs(model, rows):
    """float64[n, s - 1, v], one row per call as `eval` has it."""
    logits = np.concatenate([np.asarray(model.logits(row[None]), np.float64) for row in rows])[:, :-1]
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def perplexity(log_p, rows):
    return np.exp(-np.mean(np.take_along_axis(log_p, rows[:, 1:, None], axis=-1)))


def rows_of(model, text=TEXT):
    ids = model.tokenizer.encode(text)
    return np.array(ids[: len(ids) // SEQ * SEQ]).reshape(-1, SEQ)


def test_text(llama, model, text, run_json):
    rows = rows_of(model)
    got = run_json("eval", llama, "--text", text, "--seq-len", SEQ)
    assert got["perplexity"] == pytest.approx(perplexity(log_probs(model, rows), rows), rel=1e-5)
    assert got["tokens"] == len(rows) * (SEQ - 1)
    assert (got["scheme"], got["threshold"]) == ("llm.int8", 6)
    assert got["seconds"] > 0
    keys = {"perplexity", "tokens", "scheme", "threshold", "seconds", "weight_bytes", "projection_bytes"}
    assert set(got) == keys


def test_compare(llama, model, float_model, text, run_json):
    rows = rows_of(model)
    p, q = log_probs(float_model, rows), log_probs(model, rows)
    got = run_json("eval", llama, "--text", text, "--seq-len", SEQ, "--compare")
    assert got["perplexity"] == pytest.approx(perplexity(q, rows), rel=1e-5)
    assert got["float_perplexity"] == pytest.approx(perplexity(p, rows), rel=1e-5)
    assert got["kl"] == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)), rel=1e-3)
    assert got["kl"] > 1e-6
    assert got["top1"] == np.mean(np.argmax(p, axis=-1) == np.argmax(q, axis=-1))


def test_float_compared_with_itself(llama, float_model, text, run_json):
    rows = rows_of(float_model)
    got = run_json("eval", llama, "--text", text, "--seq-len", SEQ, "--compare", "--scheme", "none")
    assert got["perplexity"] == pytest.approx(perplexity(log_probs(float_model, rows), rows), rel=1e-5)
    assert (got["kl"], got["top1"], got["scheme"], got["threshold"]) == (0, 1, "none", 0)
    assert got["float_perplexity"] == got["perplexity"]


def test_bytes(llama, text, run_json):
    common = ("eval", llama, "--text", text, "--seq-len", SEQ, "--limit", 1)
    int8, plain = run_json(*common), run_json(*common, "--scheme", "none")
    assert int8["projection_bytes"] == WEIGHTS + 4 * CHANNELS
    assert int8["weight_bytes"] == WEIGHTS + 4 * CHANNELS + 4 * OTHERS
    assert plain["projection_bytes"] == 4 * WEIGHTS
    assert plain["weight_bytes"] == 4 * (WEIGHTS + OTHERS)


def test_schemes_differ(llama, text, run_json):
    common = ("eval", llama, "--text", text, "--seq-len", SEQ, "--compare")
    found = {
        "vector": run_json(*common, "--scheme", "vector"),
        "threshold_0": run_json(*common, "--threshold", 0),
        "llm.int8": run_json(*common, "--scheme", "llm.int8", "--threshold", 2),
    }
    assert [r["threshold"] for r in found.values()] == [0, 0, 2]
    assert found["vector"]["kl"] == found["threshold_0"]["kl"] > found["llm.int8"]["kl"]


def test_bos_only_where_the_tokenizer_adds_it(tmp_path, text, run_json):
    directory = make_llama_directory(tmp_path / "bos", seed=0, bos=True)
    model = jint8.load(directory, dtype="float32")
    rows = rows_of(model)
    assert (rows == 0).sum() == 1
    got = run_json("eval", directory, "--text", text, "--seq-len", SEQ)
    assert got["perplexity"] == pytest.approx(perplexity(log_probs(model, rows), rows), rel=1e-5)


def test_tokens(llama, model, tmp_path, run_json):
    rows = np.random.default_rng(0).integers(0, 259, (5, SEQ)).astype(np.uint16)
    np.save(tmp_path / "t.npy", rows)
    common = ("eval", llama, "--tokens", tmp_path / "t.npy")
    got = run_json(*common)
    assert got["tokens"] == 5 * (SEQ - 1)
    rows = rows.astype(np.int32)
    assert got["perplexity"] == pytest.approx(perplexity(log_probs(model, rows), rows), rel=1e-5)
    assert run_json(*common, "--limit", 2)["tokens"] == 2 * (SEQ - 1)
    batched = run_json(*common, "--batch-size", 2)  # a batch of one remains
    assert batched["tokens"] == got["tokens"]
    assert batched["perplexity"] == pytest.approx(got["perplexity"], rel=0.05)


def test_saved_model(llama, text, tmp_path, run_json, run_error):
    run_json("quantize", llama, tmp_path / "dst", "--dtype", "float32")
    common = ("--text", text, "--seq-len", SEQ)
    before, after = run_json("eval", llama, *common), run_json("eval", tmp_path / "dst", *common)
    assert before | {"seconds": 0} == after | {"seconds": 0}
    assert "for --float, got one that jint8 saved" in run_error("outliers", tmp_path / "dst", "--float")


def test_table(llama, text, run):
    status, out, _ = run("eval", llama, "--text", text, "--seq-len", SEQ, "--compare", "--dtype", "bfloat16")
    assert status == 0
    for row in ("perplexity", "perplexity in float", "KL from float", "equal top-1", "tokens", "projections"):
        assert any(line.startswith(row + " ") for line in out.splitlines())


def npy(value):
    def write(file):
        np.save(file, value)

    return write


def huge(file):
    """A header that says 2**40 rows."""
    np.save(file, np.zeros((2, 8), int))
    file.write_bytes(file.read_bytes().replace(b"(2, 8), }" + 12 * b" ", b"(1099511627776, 8), }"))
    assert b"1099511627776" in file.read_bytes()


def null_in_header(file):
    np.save(file, np.zeros((2, 8), int))
    file.write_bytes(file.read_bytes().replace(b"fortran", b"\0ortran"))


def several(file):
    np.savez(file.with_suffix(".npz"), a=np.zeros((2, 8), int))
    file.with_suffix(".npz").rename(file)


TOKENS = {
    "huge": (huge, "Expected a .npy file of token ids, got: mmap length is greater"),
    "null_in_header": (null_in_header, "Expected a .npy file of token ids"),
    "several_arrays": (several, "got several arrays (.npz)"),
    "not_npy": (lambda file: file.write_bytes(b"text"), "npy"),
    "empty_file": (lambda file: file.write_bytes(b""), "npy"),
    "pickle": (npy(np.array([{}], object)), "npy"),
    "float": (npy(np.zeros((2, 3))), "integer"),
    "one_dimension": (npy(np.zeros(8, int)), r"(n, s)"),
    "no_rows": (npy(np.zeros((0, 8), int)), r"(n, s)"),
    "one_token": (npy(np.zeros((3, 1), int)), r"(n, s)"),
    "outside_the_vocabulary": (npy(np.full((1, 3), 259)), "259"),
    "negative": (npy(np.full((1, 3), -1)), "-1"),
}


@pytest.mark.parametrize(("write", "message"), TOKENS.values(), ids=TOKENS)
def test_bad_tokens(write, message, llama, tmp_path, run_error):
    write(tmp_path / "t.npy")
    assert message in run_error("eval", llama, "--tokens", tmp_path / "t.npy")


def test_bad_text(llama, text, tmp_path, run_error):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9" * 99)
    assert "latin1.txt: Expected a text in UTF-8" in run_error("eval", llama, "--text", tmp_path / "latin1.txt")
    assert "none.txt" in run_error("eval", llama, "--text", tmp_path / "none.txt")
    assert "at least 512 tokens, got 117" in run_error("eval", llama, "--text", text)
    assert "--seq-len to be at least 2, got 1" in run_error("eval", llama, "--text", text, "--seq-len", 1)
    assert "--limit" in run_error("eval", llama, "--text", text, "--limit", 0)
    assert "--batch-size" in run_error("eval", llama, "--text", text, "--seq-len", SEQ, "--batch-size", 0)


def test_int8_cache(llama, text, run, run_json):
    common = ("eval", llama, "--text", text, "--seq-len", SEQ, "--limit", 2, "--compare", "--scheme", "none")
    got = run_json(*common, "--cache", "int8")
    assert got["cache"] == "int8"
    assert 0 < got["kl"] < 0.01  # the reference is the same model without a cache
    assert got["float_perplexity"] == run_json(*common)["perplexity"]
    assert "cache                int8" in run(*common, "--cache", "int8")[1].splitlines()
