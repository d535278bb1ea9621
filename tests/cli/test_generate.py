import io
import json
import shutil

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CHANNELS, OTHERS, WEIGHTS, make_llama_directory

import jint8
from jint8._inference.sampling import Sampling, sample

PROMPT, OTHER = "the quick brown", "fox"
N = 12


def new_tokens(model, *prompts, **options):
    """int[b, n] from the library."""
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    return np.concatenate(list(model.generate_tokens(ids, max_tokens=N, **options)), axis=1)


@pytest.fixture(scope="module")
def token_model(llama):
    """Outliers decided per token, so that nothing depends on what else is in a call."""
    return jint8.load(llama, dtype="float32", config=jint8.Config(outliers="token"))


@pytest.fixture(scope="module")
def answer(token_model):
    return token_model.generate(PROMPT, max_tokens=N)


@pytest.mark.first_case
@pytest.mark.parametrize("kind", ["float_model", "token_model"])
def test_greedy_is_argmax_of_logits(kind, request):
    model = request.getfixturevalue(kind)
    prompt = model.tokenizer.encode(PROMPT)
    (new,) = new_tokens(model, PROMPT)
    logits = model.logits(np.array([[*prompt, *new[:-1]]]))[0, len(prompt) - 1 :]
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), new)


def test_json(llama, model, run_json):
    got = run_json("generate", llama, "--prompt", PROMPT, "--max-tokens", N, "--dtype", "float32")
    assert got["text"] == model.generate(PROMPT, max_tokens=N)
    assert (got["prompt_tokens"], got["new_tokens"]) == (len(PROMPT), N)
    assert got["tokens_per_s"] > 0
    assert got["first_token_s"] > 0
    assert got["weight_bytes"] == {
        "int8": WEIGHTS + 4 * CHANNELS + 4 * OTHERS,
        "float": 4 * (WEIGHTS + OTHERS),
    }


def test_one_token(llama, run_json):
    got = run_json("generate", llama, "--prompt", PROMPT, "--max-tokens", 1)
    assert (got["new_tokens"], got["tokens_per_s"]) == (1, None)


def test_float_scheme(llama, float_model, run_json):
    got = run_json("generate", llama, "--prompt", PROMPT, "--max-tokens", N, "--scheme", "none", "--dtype", "float32")
    assert got["text"] == float_model.generate(PROMPT, max_tokens=N)
    assert got["weight_bytes"]["int8"] == got["weight_bytes"]["float"]


def test_streams_to_standard_output(llama, model, run):
    status, out, err = run("generate", llama, "--prompt", PROMPT, "--max-tokens", N, "--dtype", "float32")
    assert status == 0
    assert out == model.generate(PROMPT, max_tokens=N) + "\n"
    assert f"{N} new tokens" in err
    argv = ("generate", llama, "--prompt", PROMPT, "--max-tokens", N, "--dtype", "float32", "--quiet")
    assert run(*argv) == (0, out, "")


@pytest.mark.slow
def test_batch_equals_single_runs(token_model):
    prompts = [PROMPT, OTHER, "x"]
    together = token_model.generate(prompts, max_tokens=N)
    assert together == [token_model.generate(prompt, max_tokens=N) for prompt in prompts]


def test_batch_of_the_command(llama, model, tmp_path, run, run_json):
    (tmp_path / "prompt.txt").write_text(OTHER)
    common = ("generate", llama, "--prompt", PROMPT, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", N)
    got = run_json(*common, "--dtype", "float32")
    assert got["text"] == model.generate([PROMPT, OTHER], max_tokens=N)
    assert (got["prompt_tokens"], got["new_tokens"]) == (len(PROMPT + OTHER), 2 * N)
    status, out, _ = run(*common, "--dtype", "float32")
    assert (status, out) == (0, "\n\n".join(got["text"]) + "\n")


def test_batches_of_the_command(llama, token_model, run, run_json):
    prompts = [PROMPT, OTHER, "x", "hello", "a b"]
    argv = [word for prompt in prompts for word in ("--prompt", prompt)]
    common = ("generate", llama, *argv, "--max-tokens", N, "--dtype", "float32", "--outliers", "token")
    got = run_json(*common, "--batch-size", 2)
    assert got["text"] == token_model.generate(prompts, max_tokens=N)
    assert (got["prompt_tokens"], got["new_tokens"]) == (sum(map(len, prompts)), len(prompts) * N)
    assert got["tokens_per_s"] > 0
    assert set(got) == set(run_json(*common, "--batch-size", 9))
    for size in (1, 2):  # one at a time are streamed
        status, out, _ = run(*common, "--batch-size", size)
        assert (status, out) == (0, "\n\n".join(got["text"]) + "\n")


def test_batches_draw_for_themselves(llama, run_json):
    common = ("generate", llama, *("--prompt", PROMPT) * 3, "--max-tokens", N, "--temperature", 2.0, "--seed", 7)
    first, second, third = run_json(*common, "--batch-size", 1)["text"]
    assert len({first, second, third}) == 3
    assert run_json(*common, "--batch-size", 1)["text"] == [first, second, third]
    alone = ("generate", llama, "--prompt", PROMPT, "--max-tokens", N, "--temperature", 2.0, "--seed", 7)
    assert run_json(*alone)["text"] == first


def test_one_token_in_batches(llama, run_json):
    got = run_json("generate", llama, "--prompt", "a", "--prompt", "b", "--batch-size", 1, "--max-tokens", 1)
    assert (got["new_tokens"], got["tokens_per_s"]) == (2, None)


def test_prompt_from_standard_input(llama, model, monkeypatch, run_json):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    got = run_json("generate", llama, "--prompt-file", "-", "--max-tokens", N, "--dtype", "float32")
    assert got["text"] == model.generate(PROMPT, max_tokens=N)


def test_pieces_add_up(token_model, answer):
    pieces = list(token_model.generate(PROMPT, max_tokens=N, stream=True))
    assert len(pieces) > 2
    assert "".join(pieces) == answer
    rows = zip(*token_model.generate([PROMPT, OTHER], max_tokens=N, stream=True), strict=True)
    assert ["".join(row) for row in rows] == token_model.generate([PROMPT, OTHER], max_tokens=N)


def test_seeds(token_model, llama, run_json):
    draw = lambda seed: new_tokens(token_model, PROMPT, temperature=1.0, seed=seed).tolist()
    assert draw(1) == draw(1)
    assert len({str(draw(seed)) for seed in range(4)}) == 4
    argv = ("generate", llama, "--prompt", PROMPT, "--max-tokens", N, "--temperature", 1, "--seed", 3)
    assert run_json(*argv)["text"] == run_json(*argv)["text"]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}], ids=["top_k=1", "top_p=1e-6"])
def test_narrow_draws_are_greedy(options, token_model):
    drawn = new_tokens(token_model, PROMPT, temperature=1.0, seed=5, **options)
    np.testing.assert_array_equal(drawn, new_tokens(token_model, PROMPT))


def test_top_k_draws_among_k():
    logits = cases.normal(64, 50)
    drawn = sample(logits, jax.random.key(1), Sampling.of(temperature=5.0, top_k=3))
    rank = jnp.sum(logits > jnp.take_along_axis(logits, drawn[:, None], axis=-1), axis=-1)
    assert set(rank.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("every", [1, 5, 100])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens_is_exact(count, every, token_model):
    ids = [token_model.tokenizer.encode(PROMPT)]
    chunks = list(token_model.generate_tokens(ids, max_tokens=count, every=every))
    assert sum(chunk.shape[1] for chunk in chunks) == count
    assert max(chunk.shape[1] for chunk in chunks) <= every


def test_stop(token_model, answer, llama, model, run_json):
    stop = answer[5:7]
    at = answer.find(stop)
    assert token_model.generate(PROMPT, max_tokens=N, stop=[stop]) == answer[:at]
    assert token_model.generate(PROMPT, max_tokens=N, stop=["none such", stop, answer[6:9]]) == answer[:at]
    assert "".join(token_model.generate(PROMPT, max_tokens=N, stop=[stop], stream=True)) == answer[:at]
    assert token_model.generate(PROMPT, max_tokens=N, stop=[answer[-1] + "more"]) == answer
    other = model.generate(PROMPT, max_tokens=N)
    argv = ("generate", llama, "--prompt", PROMPT, "--max-tokens", N, "--dtype", "float32")
    got = run_json(*argv, "--stop", "none such", "--stop", other[5:7])
    assert got["text"] == other[: other.find(other[5:7])]


def test_end_token(llama, model, tmp_path, run_json):
    """The fifth token ends the answer: it is counted, and has no text."""
    (tokens,) = new_tokens(model, PROMPT)
    end = next(i for i in range(4, N) if tokens[i] not in tokens[:i])
    directory = shutil.copytree(llama, tmp_path / "llama")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, int(tokens[end])]}))
    got = run_json("generate", directory, "--prompt", PROMPT, "--max-tokens", N, "--dtype", "float32")
    assert got["text"] == model.tokenizer.decode(tokens[:end])
    assert got["new_tokens"] == end + 1


def test_chat(tmp_path, run_json):
    """The template has its own special tokens, so that none are added."""
    directory = make_llama_directory(tmp_path / "llama", seed=0, bos=True)
    common = ("generate", directory, "--prompt", "hi", "--max-tokens", 1)
    assert run_json(*common)["prompt_tokens"] == len("hi") + 1
    assert run_json(*common, "--chat")["prompt_tokens"] == len("[user]hi[assistant]")


def test_conversation(tmp_path, monkeypatch, run):
    """Each turn continues the whole conversation before it."""
    directory = make_llama_directory(tmp_path / "llama", seed=0)
    model = jint8.load(directory, dtype="float32")
    first = model.generate("[system]be[user]hi[assistant]", max_tokens=5)
    second = model.generate(f"[system]be[user]hi[assistant]{first}[user]you[assistant]", max_tokens=5)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nyou\n"))
    argv = ("generate", directory, "--chat", "--system", "be", "--max-tokens", 5, "--dtype", "float32", "--quiet")
    assert run(*argv) == (0, f"{first}\n{second}\n", "")


def test_warm(tmp_path, monkeypatch, run):
    """Compiles before the first turn is read."""
    directory = make_llama_directory(tmp_path / "llama", seed=0)
    calls = []
    warm = lambda self, **options: calls.append(("warm", options))
    monkeypatch.setattr(jint8.LanguageModel, "warm", warm)
    monkeypatch.setattr("builtins.input", lambda prompt: calls.append("turn") or exec("raise EOFError"))
    assert run("generate", directory, "--chat", "--warm", "--max-tokens", 7, "--cache", "int8")[0] == 0
    assert calls == [("warm", {"max_tokens": 7, "cache": "int8"}), "turn"]


@pytest.mark.parametrize("option", [[], ["--verify"]])
def test_verify(option, llama, model, tmp_path, run):
    """A part of the tokenizer that is damaged is found when it's asked for."""
    jint8.save(tmp_path / "saved", model)
    file = tmp_path / "saved" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    status, _, err = run("generate", tmp_path / "saved", "--prompt", "a", "--max-tokens", 1, *option)
    assert (status, "tokenizer.json: Expected" in err) == ((2, True) if option else (0, False))


@pytest.mark.parametrize(
    "argv", [("eval", "--tokens", "TOKENS"), ("outliers",), ("generate", "--prompt", "a")], ids=lambda argv: argv[0]
)
def test_verify_needs_sums(argv, llama, tmp_path, run_error):
    np.save(tmp_path / "t.npy", np.ones((1, 4), int))
    command, *rest = (tmp_path / "t.npy" if arg == "TOKENS" else arg for arg in argv)
    assert "SHA256SUMS: Expected this file" in run_error(command, llama, *rest, "--verify")


ERRORS = {
    "empty_prompt": (["--prompt", ""], "empty"),
    "no_prompt": ([], "--prompt"),
    "no_prompt_for_json": (["--chat", "--json"], "--prompt"),
    "system_without_chat": (["--prompt", "a", "--system", "b"], "--chat"),
    "no_tokens": (["--prompt", "a", "--max-tokens", 0], "--max-tokens"),
    "temperature": (["--prompt", "a", "--temperature=-1"], "temperature"),
    "top_k": (["--prompt", "a", "--top-k=-1"], "top_k"),
    "top_p": (["--prompt", "a", "--top-p", 0], "top_p"),
    "empty_stop": (["--prompt", "a", "--stop", ""], "stop"),
    "no_prompt_file": (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
}


@pytest.mark.parametrize(("argv", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input(argv, message, llama, run_error):
    assert message in run_error("generate", llama, *argv)


def test_without_a_tokenizer(llama, tmp_path, run_error):
    directory = shutil.copytree(llama, tmp_path / "llama")
    (directory / "tokenizer.json").unlink()
    assert "tokenizer" in run_error("generate", directory, "--prompt", "a")


def test_without_a_chat_template(llama, tmp_path, run_error):
    directory = shutil.copytree(llama, tmp_path / "llama")
    (directory / "tokenizer_config.json").unlink()
    assert "chat template" in run_error("generate", directory, "--prompt", "a", "--chat")


def test_int8_cache(llama, float_model, run_json, run_error):
    argv = ("generate", llama, "--prompt", PROMPT, "--scheme", "none", "--max-tokens", N, "--dtype", "float32")
    got = run_json(*argv, "--cache", "int8")
    assert got["text"] == float_model.generate(PROMPT, max_tokens=N, cache="int8")
    assert "--cache: invalid choice: 'int4'" in run_error(*argv, "--cache", "int4")
