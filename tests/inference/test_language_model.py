"""The arguments of a language model's methods: what None stands for, and their order."""

import inspect

import pytest
from family_files import DIRECTORY

import jint8
from jint8._inference import language_model

ABSOLUTE, RELATIVE = jint8.Config(threshold=4.0), jint8.Config(threshold=20.0, relative=True)
CASES = {
    "the_papers": (ABSOLUTE, {}, (6.0, False)),
    "relative_as_the_model": (RELATIVE, {}, (20.0, True)),
    "own_threshold": (RELATIVE, {"threshold": 15.0}, (15.0, True)),
    "absolute_by_request": (RELATIVE, {"relative": False}, (6.0, False)),
    "relative_by_request": (ABSOLUTE, {"relative": True}, (6.0, True)),
}


@pytest.fixture(scope="module")
def model():
    return jint8.load(DIRECTORY / "llama", dtype="float32")


@pytest.mark.parametrize(("config", "options", "expected"), CASES.values(), ids=CASES)
def test_criteria_of_calibrate(config, options, expected, model, monkeypatch):
    model = language_model.LanguageModel(model.model, model.params, None, model.config, config)
    monkeypatch.setattr(model, "batches", lambda text: [text])
    monkeypatch.setattr(language_model, "calibrate", lambda *args, **criteria: criteria)
    criteria = model.calibrate("a text", **options)
    assert (criteria.pop("threshold"), criteria.pop("relative")) == expected
    assert criteria == {"layer_share": 0.25, "position_share": 0.06, "budget": None, "skip": "embedding"}


def test_calibrate_has_the_criteria_of_the_function_in_its_order():
    ours, functions = (
        [name for name, p in inspect.signature(f).parameters.items() if p.kind is p.KEYWORD_ONLY]
        for f in (language_model.LanguageModel.calibrate, jint8.calibrate)
    )
    assert ours == functions[: len(ours)]
    assert len(ours) == 5


def test_calibrate_refuses_what_it_does_not_know(model):
    with pytest.raises(TypeError, match="treshold"):
        model.calibrate(treshold=3.0)


def test_the_type_of_a_request_has_the_keywords_of_generate():
    keywords = inspect.signature(language_model.LanguageModel.generate).parameters.keys() - {"self", "prompts"}
    assert keywords == language_model.Request.__annotations__.keys() | {"stream"}
