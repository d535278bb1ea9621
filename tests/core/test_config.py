"""`Config` as a value, and the schemes that it can name."""

import dataclasses
import pickle

import numpy as np
import oracle
import pytest

import jint8

AFFINE = jint8.Config(scheme="llm.int8-zp")


def test_the_oracle_knows_every_scheme():
    """It shares no code with the library, so a new scheme is written down twice."""
    rows = {name: dataclasses.astuple(scheme) for name, scheme in jint8.SCHEMES.items()}
    assert rows == oracle.SCHEMES | oracle.FOUR_BITS


@pytest.mark.parametrize(("arguments", "name"), [(("tokn", "channel"), "activations"), (("token", "row"), "weights")])
def test_a_scheme_of_unknown_scales(arguments, name):
    with pytest.raises(ValueError, match=f"Expected {name} to be one of"):
        jint8.Scheme(*arguments)


def test_config_defaults_are_the_paper():
    assert jint8.Config() == jint8.Config(scheme="llm.int8", threshold=6, outliers="batch")


def test_config_is_frozen_hashable_and_keyword_only():
    config = jint8.Config(threshold=np.float32(6))
    assert (config, hash(config)) == (jint8.Config(), hash(jint8.Config()))
    assert len({config, jint8.Config(), jint8.Config(threshold=5), jint8.Config(outliers="token"), AFFINE}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 3
    with pytest.raises(TypeError):
        jint8.Config("llm.int8")
    assert pickle.loads(pickle.dumps(AFFINE)) == AFFINE


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"threshold": -1}, ValueError, "Expected threshold to be finite and at least 0, got -1"),
        ({"threshold": float("nan")}, ValueError, "got nan"),
        ({"threshold": float("inf")}, ValueError, "got inf"),
        ({"threshold": 10**400}, ValueError, "Expected threshold to be finite and at least 0, got 10000"),
        ({"threshold": "6"}, TypeError, "Expected threshold to be a real number, got '6'"),
        ({"threshold": True}, TypeError, "got True"),
        ({"scheme": "int3"}, ValueError, "Expected scheme to be one of none, absmax.* got 'int3'"),
        ({"outliers": "row"}, ValueError, "Expected outliers to be one of batch, token, static, got 'row'"),
    ],
)
def test_config_errors(fields, error, message):
    with pytest.raises(error, match=message):
        jint8.Config(**fields)


@pytest.mark.parametrize(("mode", "by_token"), [("batch", "token"), ("token", "token"), ("static", "static")])
def test_by_token(mode, by_token):
    """Several rows of a call need it where they mustn't depend on each other; calibrated columns stay."""
    config = jint8.Config(outliers=mode, threshold=5.0)
    assert config.by_token() == jint8.Config(outliers=by_token, threshold=5.0)
    assert config.depends_on_batch == (mode == "batch")
    assert not config.by_token().depends_on_batch


@pytest.mark.parametrize("scheme", jint8.SCHEMES)
def test_properties_of_a_scheme(scheme):
    activations, weights, _, decomposition = (oracle.SCHEMES | oracle.FOUR_BITS)[scheme]
    config = jint8.Config(scheme=scheme, outliers="static")
    assert config.quantizes_weights == (weights is not None)
    assert config.decomposes == config.uses_calibrated_columns == decomposition
    assert config.depends_on_batch == (activations == "tensor")
    assert not jint8.Config(scheme=scheme, threshold=0).decomposes


def test_calibrated_columns_of_four_bits():
    """Float activations have no outliers of a call; columns that were calibrated are another matter."""
    assert not jint8.Config(scheme="int4").decomposes
    assert not jint8.Config(scheme="int4").depends_on_batch
    assert jint8.Config(scheme="int4", rotate=64).is_calibrated
    assert not jint8.Config(scheme="int4", grouping="oc").is_calibrated
    assert jint8.Config(scheme="int4", group=32).for_calibration() == jint8.Config(outliers="token")
