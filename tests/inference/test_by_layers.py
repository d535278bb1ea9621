"""Generation by programs of a few layers: the tokens of the whole sequence, whatever the sizes; and few programs."""

import random

import numpy as np
import pytest
from family_files import DIRECTORY
from tiny_model import make_llama_directory

import jint8
from jint8._inference import by_layers, generation, sizes
from jint8._inference.programs import Programs
from jint8._ops.cpu import native

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, 96, n).tolist() for n in (21, 4, 9)]
NEW = 6


@pytest.fixture
def programs(monkeypatch):
    """Of this test alone."""
    own = Programs()
    for module in (by_layers, generation):
        monkeypatch.setattr(module, "PROGRAMS", own)
    return own


@pytest.fixture
def small(monkeypatch):
    """Pieces and caches of a few tokens, so that short prompts go through all cases."""
    monkeypatch.setattr(sizes, "PIECES", (2, 8))
    monkeypatch.setattr(sizes, "SLOTS", 6)


def generated(model, prompts, every=4, **options):
    return np.concatenate(list(model.generate_tokens(prompts, max_tokens=NEW, every=every, **options)), axis=1)


def most_likely_after(model, prompt, new):
    """The most likely tokens given the prompt and those before, without a cache."""
    logits = model.logits([[*prompt, *new]])[0]
    return np.argmax(logits[len(prompt) - 1 : -1], axis=-1)


SLOW_FAMILIES = ("bloom", "opt_350m")


# rotary positions and a window; layers with a window between others; ALiBi; a table of positions and more projections
@pytest.mark.first_case
@pytest.mark.parametrize(
    "family", ["mistral", "gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW_FAMILIES)]
)
def test_tokens_of_the_whole_sequence(family, small, programs):
    model = jint8.load(DIRECTORY / family, quantize=False, dtype="float32")
    rows = generated(model, PROMPTS)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        np.testing.assert_array_equal(row, most_likely_after(model, prompt, row))
    for prompt, row in zip(PROMPTS[:2], rows, strict=False):
        np.testing.assert_array_equal(generated(model, [prompt]), [row])


@pytest.mark.first_case
@pytest.mark.parametrize("several", [False, True], ids=["alone", "several"])
def test_no_token_is_written_behind_the_cache(several, small, programs):
    """Where a cache is full to its last column: an update there would be moved forward, over another token."""
    model = jint8.load(DIRECTORY / "mistral", quantize=False, dtype="float32")
    for length, new in [(7, 4), (7, 5), (1, 4), (3, 9), (8, 4)]:
        prompt = RNG.integers(3, 96, length).tolist()
        chunks = model.generate_tokens([prompt, prompt[:1]] if several else [prompt], max_tokens=new)
        row = np.concatenate(list(chunks), axis=1)[0]
        assert len(row) == new
        np.testing.assert_array_equal(row, most_likely_after(model, prompt, row))


@pytest.mark.first_case
@pytest.mark.parametrize("cache", [None, "int8"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20, "seed": 7}], ids=["greedy", "drawn"])
def test_same_as_at_once(cache, options, programs, monkeypatch):
    model = jint8.load(DIRECTORY / "llama", dtype="float32")
    got = generated(model, PROMPTS[:2], cache=cache, **options)
    monkeypatch.setattr(generation, "runs_by_layers", lambda *_: False)
    np.testing.assert_array_equal(got, generated(model, PROMPTS[:2], cache=cache, **options))


@pytest.mark.first_case
@pytest.mark.parametrize("at_once", [False, True], ids=["by layers", "at once"])
def test_repetition_penalty(at_once, programs, monkeypatch):
    """The tokens of a loop in NumPy over logits of the whole sequence."""
    if at_once:
        monkeypatch.setattr(generation, "runs_by_layers", lambda model, params: False)
    model = jint8.load(DIRECTORY / "mistral", quantize=False, dtype="float32")
    penalty, rows = 1.4, []
    for prompt in PROMPTS:
        row = list(prompt)
        for _ in range(NEW):
            logits = np.asarray(model.logits([row])[0, -1], np.float64)
            seen = sorted(set(row))
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            row.append(int(np.argmax(logits)))
        rows.append(row[len(prompt) :])
    np.testing.assert_array_equal(generated(model, PROMPTS, repetition_penalty=penalty), rows)
    np.testing.assert_array_equal(generated(model, PROMPTS[1:2], repetition_penalty=penalty), rows[1:2])
    assert (generated(model, PROMPTS) != rows).any()


@pytest.mark.slow
def test_more_rows_change_nothing(small, programs):
    """Three rows run as four; the fourth is a copy, and doesn't keep the others waiting when they have ended."""
    model = jint8.load(DIRECTORY / "llama", dtype="float32", config=jint8.Config(threshold=1.0))
    rows = generated(model, PROMPTS)
    assert rows.shape == (3, NEW)
    for prompt, row in zip(PROMPTS[:2], rows, strict=False):
        np.testing.assert_array_equal(generated(model, [prompt, prompt])[0], row)


@pytest.mark.first_case
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 1, -1])
def test_seeds(seed, programs):
    model = jint8.load(DIRECTORY / "llama", dtype="float32")
    draw = lambda seed: generated(model, [PROMPTS[1]], temperature=5.0, seed=seed).tolist()
    assert draw(seed) == draw(seed)
    assert draw(seed) != draw(2)


LIMITS = {"batch": 2, "prompt": 11, "max_tokens": 5}


@pytest.mark.slow
def test_no_program_after_warm(small, programs):
    """Of any request up to the limits."""
    model = jint8.load(DIRECTORY / "llama", dtype="float32")
    model.warm(**LIMITS)
    made = programs.made
    assert len(programs) == made <= 30
    choose = random.Random(0)
    for _ in range(40):
        rows = choose.randint(1, LIMITS["batch"])
        prompts = [[5] * choose.randint(1, LIMITS["prompt"]) for _ in range(rows)]
        options = {"temperature": choose.random() * choose.randint(0, 1), "top_k": choose.randint(0, 3)}
        list(model.generate_tokens(prompts, max_tokens=choose.randint(1, LIMITS["max_tokens"]), **options))
    assert programs.made == made


@pytest.mark.parametrize(("longest", "most"), [(1100, 900), (600, 60), (64, 2000)])
def test_reachable_is_what_requests_need(longest, most):
    """Real sizes: for every length of prompt and answer, the cache and the first piece are among those of `warm`."""
    found = {(slots, sizes.padded_length(length)): alone for slots, length, alone in sizes.reachable(longest, most)}
    needed = {True: set(), False: set()}
    for prompt in range(1, longest + 1):
        padded = sizes.padded_length(prompt)
        key = padded if padded <= 512 else 512 + (padded % 512 or 512)
        for answer in (1, 10, 50, 60, 300, 383, 384, 800, most):
            if answer <= most:
                for alone in (True, False):
                    end, slots = sizes.sizes(prompt, answer, alone=alone)
                    assert slots >= max(end + answer, padded) >= prompt + answer
                    needed[alone].add((slots, key))
    assert needed[True] <= {key for key, alone in found.items() if alone}
    assert needed[False] <= set(found)


@pytest.mark.first_case
@pytest.mark.parametrize("family", ["gemma3", "bloom"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20, "seed": 7}], ids=["greedy", "drawn"])
def test_loop_over_tokens(family, options, programs, monkeypatch):
    """The tokens of the small programs, in one start or several; a row that ends, ends the loop."""
    monkeypatch.setattr(by_layers, "LOOP_STEPS", 4)
    model = jint8.load(DIRECTORY / family, quantize=False, dtype="float32")
    prompts, params, seed = [PROMPTS[0]], model._params_for(several=False), options.pop("seed", 0)

    def begun(*ends):
        sampling = by_layers.Sampling.of(**options, end_tokens=ends)
        return by_layers.ByLayers(model.model, params, prompts, max_tokens=20, sampling=sampling, seed=seed)

    by_steps = begun().advance(15)
    assert by_layers._token_loop not in {key[0] for key in programs._kept}
    prepared = begun()
    prepared.prepare_loop()
    made = programs.made
    in_loop = begun()
    parts = [in_loop.advance(count) for count in (1, 4, 10)]
    assert programs.made == made
    assert [part.shape[1] for part in parts] == [1, 4, 10]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), by_steps)
    np.testing.assert_array_equal(prepared.advance(15), by_steps)
    answer = [int(in_loop.first[0, 0]), *map(int, by_steps[0])]
    ending = begun(answer[6])
    assert [*ending.first[0], *ending.advance(15)[0]] == answer[: answer.index(answer[6]) + 1]
    assert ending.done
    assert ending.advance(3).shape == (1, 0)


@pytest.mark.skipif(native.kernels() is None, reason="jint8 was installed without a C++ compiler")
def test_loop_over_tokens_of_several_rows(programs, monkeypatch):
    """Where each layer is one call, `warm` compiles it; its tokens are those of the small programs."""
    model = jint8.load(DIRECTORY / "mistral", dtype="float32")
    params, sampling = model._params_for(several=True), by_layers.Sampling.of()
    begun = lambda: by_layers.ByLayers(model.model, params, PROMPTS, max_tokens=20, sampling=sampling, seed=0)
    assert begun().layers_are_calls
    by_steps = begun().advance(15)
    model.warm(batch=3, prompt=21, max_tokens=20)
    made, looped = programs.made, begun()
    assert looped._loop(programs.find) is not None
    np.testing.assert_array_equal(looped.advance(15), by_steps)
    assert programs.made == made
    monkeypatch.setenv("JINT8_NATIVE", "named")
    assert not begun().layers_are_calls


def test_least_recently_used_programs_go():
    programs = Programs(limit=2)
    double = lambda x: x * 2
    for size in (1, 2, 1, 3, 1):
        programs.run(double, (), (np.zeros(size, np.float32),))
    assert (len(programs), programs.made) == (2, 3)
    programs.run(double, (), (np.zeros(2, np.float32),))  # was dropped for 3, because 1 was used after it
    assert (len(programs), programs.made) == (2, 4)


def test_what_is_compiled_ahead_is_kept():
    programs = Programs(limit=2)
    with programs.keeping():
        for size in range(1, 6):
            programs.run(abs, (), (np.zeros(size, np.float32),))
    for size in range(1, 6):
        programs.run(abs, (), (np.zeros(size, np.float32),))
    assert (len(programs), programs.made) == (5, 5)
    assert programs.limit < 30


def test_groups_of_layers():
    for family, most, want in [("llama", 1, 1), ("gemma3", 10, None)]:
        model = jint8.load(DIRECTORY / family, dtype="float32")
        found = by_layers.groups(model.model, model.params, most)
        assert [i for group in found for i in group.layers] == list(range(model.config.num_layers))
        assert want is None or {len(group.layers) for group in found} == {want}


def test_a_cache_that_does_not_fit(programs, monkeypatch):
    model = jint8.load(DIRECTORY / "llama", dtype="float32")
    monkeypatch.setattr(sizes, "free_memory", lambda: 10**6)
    message = r"fits into the 0.0 GB .* max_tokens=100000000, for which 1 rows of \d+ tokens need .* GB; \d.* would fit"
    with pytest.raises(MemoryError, match=message):
        list(model.generate_tokens([[3]], max_tokens=100_000_000))
    assert programs.made == 0


@pytest.fixture(scope="module")
def token_model(tmp_path_factory):
    """A model with a tokenizer."""
    return jint8.load(make_llama_directory(tmp_path_factory.mktemp("model") / "llama", seed=0), dtype="float32")


REFUSED = {
    "prompts=None": ({"prompts": None}, TypeError, "prompts to be a text or a list of texts, got None"),
    "prompts=5": ({"prompts": [5]}, TypeError, "prompts to be a text or a list of texts, got 5 in it"),
    "surrogate": ({"prompts": ["a", "b\ud800"]}, ValueError, r"prompts\[1\] to be valid Unicode, got half .* 1"),
    "stop": ({"stop": [None]}, TypeError, "stop to be a text or a list of texts, got None in it"),
    "max_tokens=0": ({"max_tokens": 0}, ValueError, "max_tokens to be at least 1, got 0"),
    "max_tokens=2.5": ({"max_tokens": 2.5}, TypeError, "max_tokens to be a whole number, got 2.5"),
    "prompts=[]": ({"prompts": []}, ValueError, "prompts of at least one token, got no prompt"),
    "seed=2**64": ({"seed": 2**64}, ValueError, r"seed to be below 2\*\*64, got 18446744073709551616"),
    "seed=1.5": ({"seed": 1.5}, TypeError, "seed to be a whole number, got 1.5"),
    "temperature=True": ({"temperature": True}, TypeError, "temperature to be a number, got True"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments(options, error, message, token_model):
    with pytest.raises(error, match=f"Expected {message}"):
        token_model.generate(options.pop("prompts", "a"), **options)


def test_warm_refuses_sizes(token_model):
    with pytest.raises(ValueError, match="Expected batch to be at least 1, got 0"):
        token_model.warm(batch=0)
    with pytest.raises(TypeError, match=r"Expected prompt to be a whole number, got 1\.5"):
        token_model.warm(prompt=1.5)
