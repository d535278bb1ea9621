import pytest

from jint8._ops.cpu import native

SMALL = ("--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1)


@pytest.mark.slow
def test_json(llama, model, float_model, run_json):
    import jint8

    got = run_json("bench", llama, *SMALL, "--batch-size", 1)
    assert got["weight_bytes"] == {
        "int8": jint8.memory_report(model.params).bytes,
        "float": jint8.memory_report(float_model.params).bytes,
    }
    assert list(got["batches"]) == ["1"]
    for batch in got["batches"].values():
        for kind in ("int8", "float"):
            assert batch["prefill_tokens_per_s"][kind] > 0
            assert batch["decode_tokens_per_s"][kind] > 0
            # the first call compiles, those that are timed don't
            assert batch["first_token_s"][kind] > 8 / batch["prefill_tokens_per_s"][kind]
            assert batch["decode_roofline"][kind] > 0
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        assert got[name] == got["batches"]["1"][name]
    assert (got["prompt_tokens"], got["new_tokens"]) == (8, 3)
    assert got["cpu_library"] == native.kernels()


@pytest.mark.slow
def test_table(llama, run):
    status, out, _ = run("bench", llama, *SMALL, "--batch-size", 2)
    assert status == 0
    prefill, decode, weights, *library = out.splitlines()
    assert prefill.startswith("batch   2  prefill")
    assert "% of the roofline" in decode
    assert weights.startswith("weights: ")
    assert len(library) == (native.kernels() is not None)


@pytest.mark.parametrize("option", ["--prompt-tokens", "--new-tokens", "--repeats", "--batch-size"])
def test_counts_are_at_least_one(llama, run_error, option):
    assert f"Expected {option} to be at least 1, got 0" in run_error("bench", llama, option, 0)


def test_longer_than_the_model_is_made_for(llama, run_error):
    assert "Expected at most" in run_error("bench", llama, "--prompt-tokens", 10**6)


@pytest.mark.slow
def test_int8_cache(llama, run_json, monkeypatch):
    import jint8

    seen = set()
    generate_tokens = jint8.LanguageModel.generate_tokens
    monkeypatch.setattr(
        jint8.LanguageModel,
        "generate_tokens",
        lambda self, *args, **options: (
            seen.add((self.quant.scheme, options["cache"])) or generate_tokens(self, *args, **options)
        ),
    )
    assert run_json("bench", llama, *SMALL, "--batch-size", 1, "--cache", "int8")["cache"] == "int8"
    assert seen == {("llm.int8", "int8"), ("none", None)}
