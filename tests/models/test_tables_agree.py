"""The table of GGUF architectures and that of model families say the same of each model."""

import dataclasses
from pathlib import Path

import pytest

from jint8.checkpoints._gguf.architectures import ARCHITECTURES
from jint8.checkpoints._gguf.config import config_from_metadata
from jint8.checkpoints._gguf.metadata_keys import HARMLESS, READ
from jint8.checkpoints._gguf.names import hf_name
from jint8.models import FAMILIES, model_config
from jint8.models.families._family import COLUMNS, HEADS

CASES = {arch.model_type: (name, arch) for name, arch in ARCHITECTURES.items()}
CASES |= {
    arch.with_experts.model_type: (name, arch.with_experts) for name, arch in ARCHITECTURES.items() if arch.with_experts
}
METADATA = {
    "embedding_length": 64, "feed_forward_length": 96, "block_count": 8, "context_length": 128,
    "attention.head_count": 4, "attention.head_count_kv": 4, "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5, "attention.sliding_window": 8, "rope.freq_base_swa": 1e4,
    "rope.dimension_count": 8, "expert_count": 4, "expert_used_count": 2, "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 3.0, "use_parallel_residual": False,
}  # fmt: skip


def config(model_type):
    """What the reader of GGUF files makes of a file with all that the architecture may say."""
    name, architecture = CASES[model_type]
    known = READ | HARMLESS | {*architecture.keys.values(), *architecture.optional.values()}
    metadata = {f"{name}.{key}": value for key, value in METADATA.items() if key in known}
    metadata["general.architecture"] = name
    said = config_from_metadata(
        metadata, architecture, path=Path("x"), vocab_size=32, tied=False, tensors=(), rope_tensors={}
    )
    assert said.keys() >= architecture.optional.keys(), "METADATA lacks some of them"
    return said


@pytest.mark.parametrize("model_type", CASES)
def test_the_family_exists(model_type):
    assert model_type in FAMILIES
    assert model_config(config(model_type)).family == model_type


@pytest.mark.parametrize("model_type", CASES)
def test_every_key_matters_to_the_family(model_type):
    """With an impossible value it is refused, or gives another model."""
    said = config(model_type)
    want = model_config(said)
    ignored = []
    for key in said:
        try:
            got = model_config(said | {key: object()})
        except (ValueError, TypeError):
            continue
        if got == want:
            ignored.append(key)
    assert not ignored


@pytest.mark.parametrize("model_type", CASES)
def test_every_tensor_name_is_one_of_the_family(model_type):
    _, architecture = CASES[model_type]
    theirs, _ = modules(model_type)
    for stem in (*architecture.names, *architecture.experts):
        names = {hf_name(f"{start}{stem}.weight", architecture) for start in ("", "blk.7.")}
        assert names & {f"{name}.weight" for name in theirs}, stem


@pytest.mark.parametrize("model_type", CASES)
def test_rows_and_norms_are_stored_alike(model_type):
    _, architecture = CASES[model_type]
    theirs, layouts = modules(model_type)
    for stem in architecture.names:
        name = hf_name(f"blk.7.{stem}.weight", architecture).removesuffix(".weight")
        if name in theirs:
            assert (layouts.get(name) == COLUMNS) == (stem in architecture.transposed), stem
            assert (layouts.get(name) == HEADS) == (stem == architecture.interleaved), stem
    assert model_config(config(model_type)).norm_offset == float(architecture.unit_norms)


def modules(model_type):
    """The family's names of layer 7 and of what is outside of layers, and the layouts of those that have one."""
    family = FAMILIES[model_type]
    theirs, layouts = [], {}
    for module, names in family.modules.items():
        for name in (names,) if isinstance(names, str) else names:
            theirs.append(("" if module == "lm_head" else family.prefixes[0]) + name.format(i=7, e="{e}"))
            if module in family.layouts:
                layouts[theirs[-1]] = family.layouts[module]
    return theirs, layouts


def test_an_ignored_key_would_be_found(monkeypatch):
    name, architecture = CASES["llama"]
    more = dataclasses.replace(architecture, constants={**architecture.constants, "clip_qkv": 8})
    monkeypatch.setitem(CASES, "llama", (name, more))
    with pytest.raises(AssertionError, match="clip_qkv"):
        test_every_key_matters_to_the_family("llama")
