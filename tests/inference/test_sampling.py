"""The next token: greedy choice against NumPy's argmax, and what of a request is compiled in."""

import cases
import jax
import numpy as np
import pytest

from jint8._inference import sampling
from jint8._inference.sampling import Sampling, most_likely, sample

RNG = np.random.default_rng(0)
LOGITS = {
    "normal": RNG.normal(size=(3, 1001)),
    "one_row": RNG.normal(size=(1, 7)),
    "ties": np.array([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, -0.0, -1.0, 0.0]]),
    "nothing_possible": np.full((2, 5), -np.inf),
    "some_impossible": np.array([[-np.inf, -3.0, -np.inf, -2.0], [np.inf, -1.0, np.inf, 0.0]]),
    "subnormal": np.array([[-1e-40, -1e-39, -3e-38, -1.0]]),
    "far": np.pad(np.ones((2, 1)), ((0, 0), (131_071, 3))),
}


@pytest.mark.first_case
@pytest.mark.parametrize("one_cpu", [True, False])
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_greedy_is_argmax(monkeypatch, one_cpu, logits):
    monkeypatch.setattr(sampling, "on_one_cpu", lambda: one_cpu)
    logits = logits.astype(np.float32)
    got = jax.jit(lambda x: most_likely(x))(logits)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


def test_nan_chooses_a_token(monkeypatch):
    monkeypatch.setattr(sampling, "on_one_cpu", lambda: True)
    logits = np.array([[1.0, np.nan, 2.0], [np.nan] * 3], np.float32)
    assert jax.jit(lambda x: most_likely(x))(logits).tolist()[1] == 0
    assert 0 <= int(most_likely(logits)[0]) < 3


def test_one_program_for_all_settings():
    traces = []

    @jax.jit
    def draw(logits, sampling):
        traces.append(sampling)
        return sample(logits, jax.random.key(0), sampling)

    logits = cases.normal(2, 9, seed=1)
    for options in ({}, {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.5}, {"temperature": 2.0, "top_k": 3}):
        for end_tokens in ((), (1,), (1, 2, 3)):
            draw(logits, Sampling.of(**options, end_tokens=end_tokens))
    assert len(traces) == 1


def can_be_drawn(logits, top_k, top_p, min_p):
    """Which tokens stay, in float64: fewer than top_k are above them, and those hold less than top_p of the top_k's."""
    out = np.zeros(logits.shape, bool)
    for row, kept in zip(logits.astype(np.float64), out, strict=True):
        above = np.array([np.sum(row > value) for value in row])
        few = above < (top_k or len(row))
        share = np.where(few, np.exp(row - row.max()), 0)
        share /= share.sum()
        mass = np.array([share[row > value].sum() for value in row])
        kept[:] = few & ((mass < top_p) | (top_p >= 1)) & (np.exp(row - row.max()) >= min_p)
    return out


FILTERED = jax.jit(sampling.filtered)


@pytest.mark.first_case
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 5000, 2**40])
def test_filtered(top_k, top_p, min_p):
    logits = RNG.normal(size=(4, 1001)).astype(np.float32) * 3
    logits[1, ::2] = logits[1, 0]  # ties
    logits[2, 5:] = -np.inf
    logits[3] = np.abs(logits[3])  # no bit of a sign
    numbers = Sampling.of(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    got = np.asarray(FILTERED(logits, numbers.top_k, numbers.top_p, numbers.min_p))
    want = can_be_drawn(logits, top_k, top_p, min_p) & np.isfinite(logits)
    np.testing.assert_array_equal(np.isfinite(got), want)
    np.testing.assert_array_equal(got[want], logits[want])


@pytest.mark.first_case
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-300])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=["all", "top_k", "top_p"])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature, options):
    """Logits divided by it are infinite, several of them."""
    numbers = Sampling.of(temperature=temperature, **options)
    assert numbers.temperature > 0
    logits = np.array([[4, 5, 30, 20], [-40, -30, -5, -20], [-np.inf, 1, 3, -np.inf]], np.float32)
    assert sample(logits, jax.random.key(0), numbers).tolist() == [2, 2, 2]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_penalty(penalty):
    logits = RNG.normal(size=(2, 50)).astype(np.float32)
    prompts = [[3, 7, 7], [0]]
    numbers = Sampling.of(repetition_penalty=penalty)
    seen = sampling.seen_too(jax.numpy.asarray(sampling.seen_in(prompts, 2, 50, numbers)), np.array([9, 3]))
    got = np.asarray(sampling.penalized(logits, seen, numbers))
    want = logits.astype(np.float64)
    for row, tokens in zip(want, ([3, 7, 9], [0, 3]), strict=True):
        row[tokens] = [x / penalty if x > 0 else x * penalty for x in row[tokens]]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("penalty", [1e300, 1e-300])
def test_a_penalty_that_float32_has_no_number_for(penalty):
    numbers = Sampling.of(repetition_penalty=penalty)
    logits, seen = jax.numpy.array([[0.0, 0.0, 1.0]]), jax.numpy.array([[True, False, False]])
    logits = sampling.penalized(logits, seen, numbers)
    np.testing.assert_array_equal(logits, [[0.0, 0.0, 1.0]])


def test_no_penalty_has_no_table():
    assert sampling.seen_in([[1]], 1, 50, Sampling.of()) is None


def test_temperature_divides_the_logits():
    logits = cases.normal(64, 9, seed=1)
    key = jax.random.key(0)
    drawn = sample(logits, key, Sampling.of(temperature=0.5))
    np.testing.assert_array_equal(drawn, jax.random.categorical(key, 2 * logits))


OUT_OF_RANGE = {
    "negative": ({"temperature": -1.0}, "temperature to be finite and at least 0, got -1.0"),
    "infinite": ({"temperature": float("inf")}, "temperature to be finite and at least 0, got inf"),
    "top_k": ({"top_k": -1}, "top_k to be at least 0, got -1"),
    "top_p=0": ({"top_p": 0.0}, r"top_p to be in \(0, 1\], got 0.0"),
    "min_p": ({"min_p": -0.1}, r"min_p to be in \[0, 1\], got -0.1"),
    "penalty": ({"repetition_penalty": 0.0}, "repetition_penalty to be finite and above 0, got 0.0"),
    "top_p=2": ({"top_p": 2.0}, r"top_p to be in \(0, 1\], got 2.0"),
}


@pytest.mark.parametrize(("options", "message"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        Sampling.of(**options)


NOT_NUMBERS = {
    "temperature=True": ({"temperature": True}, "temperature to be a number, got True"),
    "temperature=text": ({"temperature": "1"}, "temperature to be a number, got '1'"),
    "top_p=None": ({"top_p": None}, "top_p to be a number, got None"),
    "penalty=True": ({"repetition_penalty": True}, "repetition_penalty to be a number, got True"),
    "top_k=1.5": ({"top_k": 1.5}, "top_k to be a whole number, got 1.5"),
    "top_k=True": ({"top_k": True}, "top_k to be a whole number, got True"),
}


@pytest.mark.parametrize(("options", "message"), NOT_NUMBERS.values(), ids=NOT_NUMBERS)
def test_what_is_not_a_number(options, message):
    with pytest.raises(TypeError, match=f"Expected {message}"):
        Sampling.of(**options)
