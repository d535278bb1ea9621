"""Arguments of `jint8.load` that belong together, or don't."""

import inspect

import pytest
from family_files import DIRECTORY

import jint8
from jint8._core.qtensor import is_qtensor
from jint8._trees.paths import leaf_paths

LLAMA = DIRECTORY / "llama"
STATIC = jint8.Config(outliers="static")
COLUMNS = {"layers_0/mlp/down/weight": [1]}

IGNORED = {
    "text_without_static_outliers": ({"calibrate": "a text"}, "Expected calibrate with static outliers"),
    "text_beside_columns": ({"calibrate": "a text", "outliers": COLUMNS, "config": STATIC}, "Expected calibrate with"),
    "text_without_int8": ({"calibrate": "a text", "config": STATIC, "quantize": False}, "Expected calibrate with"),
    "columns_without_int8": ({"outliers": COLUMNS, "quantize": False}, "Expected outliers for weights in int8"),
    "float_type": ({"dtype": "int8"}, "Expected dtype to be a float type, got int8"),
}


@pytest.mark.parametrize(("options", "message"), IGNORED.values(), ids=IGNORED)
def test_no_argument_is_ignored(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jint8.load(LLAMA, **options)


def test_patterns_from_an_iterator_skip_in_every_layer():
    params = jint8.load(LLAMA, skip=iter(["down"])).params
    int8 = {path for path, leaf in leaf_paths(params, is_leaf=is_qtensor) if is_qtensor(leaf)}
    assert int8
    assert not any("down" in path for path in int8)


def test_load_encoder_has_the_arguments_of_load():
    load, load_encoder = (inspect.signature(f).parameters for f in (jint8.load, jint8.load_encoder))
    assert [name for name in load if name in load_encoder] == list(load_encoder)
    assert load.keys() - load_encoder.keys() == {"mesh", "outliers", "calibrate"}
