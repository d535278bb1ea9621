"""The next token: greedy choice against NumPy's argmax."""

import jax
import numpy as np
import pytest

from jint8._inference import sampling
from jint8._inference.sampling import most_likely

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
