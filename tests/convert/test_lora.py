"""LoRA adapters against what PEFT computes; see tests/fixtures/make_adapters.py."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from family_files import DIRECTORY, expected

import jint8

ADAPTERS = DIRECTORY.parent / "adapters"
NAMES = sorted(path.name for path in ADAPTERS.iterdir())


def family(name):
    return name.partition("-")[0]


def load(name, **options):
    return jint8.load(DIRECTORY / family(name), **{"adapter": ADAPTERS / name, "dtype": "float32"} | options)


def logits(model, name):
    return np.asarray(model.model.apply({"params": model.params}, jnp.asarray(expected(family(name))["tokens"]))[0])


@pytest.mark.first_case
@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    want = np.load(ADAPTERS / name / "expected.npz")["logits"]
    got = logits(load(name, quantize=False), name)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    without = expected(family(name))["logits"]
    assert np.linalg.norm(without - want) > 0.1 * np.linalg.norm(want)
    int8 = logits(load(name), name)
    assert np.linalg.norm(int8 - want) < 0.06 * np.linalg.norm(want)


def test_on_top_of_bitsandbytes():
    want = np.load(ADAPTERS / "bloom" / "expected.npz")["logits"]
    got = logits(jint8.load(DIRECTORY.parent / "bitsandbytes" / "bloom", adapter=ADAPTERS / "bloom"), "bloom")
    assert np.linalg.norm(got - want) < 0.06 * np.linalg.norm(want)


def test_saved_with_its_factors(tmp_path):
    model = load("llama")
    jint8.save(tmp_path / "dst", model)
    again = jint8.load(tmp_path / "dst")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    with pytest.raises(ValueError, match="Expected a model without an adapter"):
        jint8.save(tmp_path / "other", model, format="bitsandbytes")
    factors = {k: v for k, v in safetensors.numpy.load_file(tmp_path / "dst" / "model.safetensors").items()}
    factors["layers_0/mlp/down/lora_a"] = np.zeros((2, 7), np.float32)
    safetensors.numpy.save_file(factors, tmp_path / "dst" / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'layers_0/mlp/down/lora_a': Expected shape \(2, 48\)"):
        jint8.load(tmp_path / "dst")


@pytest.mark.slow
def test_generates(tmp_path):
    model, tokens = load("llama"), expected("llama")["tokens"][0].tolist()
    chunks = model.generate_tokens([tokens], max_tokens=3)
    got = np.concatenate(list(chunks), axis=1)[0].tolist()
    assert got[0] == logits(model, "llama")[0, -1].argmax()


def options(**changes):
    def fault(path):
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return fault


def tensors(change):
    def fault(path):
        file = path / "adapter_model.safetensors"
        factors = dict(safetensors.numpy.load_file(file))
        change(factors)
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in factors.items()}, file)

    return fault


Q = "base_model.model.model.layers.0.self_attn.q_proj"
FAULTS = {
    "no_config": (lambda path: (path / "adapter_config.json").unlink(), r"adapter_config\.json"),
    "no_weights": (lambda path: (path / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors"),
    "kind": (options(peft_type="IA3"), "Expected peft_type to be 'LORA', got 'IA3'"),
    "dora": (options(use_dora=True), "q_proj': Expected a lora_magnitude_vector, got none"),
    "alpha": (options(lora_alpha=None), "Expected lora_alpha to be a number, got None"),
    "alpha_nan": (options(lora_alpha=float("nan")), "Expected lora_alpha to be a number, got nan"),
    "alpha_beyond_float32": (options(lora_alpha=1e39), r"Expected lora_alpha to be a number, got 1e\+39"),
    "alphas_list": (options(alpha_pattern=[1]), r"adapter_config\.json: Expected alpha_pattern to have a number for"),
    "alphas_text": (options(alpha_pattern={"q_proj": "x"}), "Expected alpha_pattern to have a number for each pattern"),
    "alphas_pattern": (options(alpha_pattern={"[": 1}), r"Expected patterns in alpha_pattern, got '\[': unterminated"),
    "modules_number": (options(modules_to_save=5), "Expected modules_to_save to be a list of names, got 5"),
    "modules_text": (options(modules_to_save="lm_head"), "Expected modules_to_save to be a list of names, got 'lm_h"),
    **{
        f"init_{name}": (options(init_lora_weights=name), f"init_lora_weights to be .*, got '{name}', with which PEFT")
        for name in ("pissa_niter_16", "corda", "loftq", "lora_ga")
    },
    "invocation": (options(alora_invocation_tokens=[1, 2]), r"Expected no alora_invocation_tokens, got \[1, 2\]"),
    "replication": (options(layer_replication=[[0, 1], [0, 2]]), "Expected no layer_replication"),
    "init_pissa_as_peft_refuses_it": (options(init_lora_weights="PiSSA"), "init_lora_weights to be .*, got 'PiSSA'"),
    "init_rank": (options(init_lora_weights="pissa", r=7), r"Expected r of '.*q_proj' to be .* its factors, 4, got 7"),
    "init_ranks": (options(init_lora_weights="olora", rank_pattern=[3]), "Expected rank_pattern to have a rank for"),
    "init_unknown": (options(init_lora_weights="new"), r"adapter_config\.json: .* init_lora_weights .*, got 'new'\.$"),
    "init_number": (options(init_lora_weights=1.5), "init_lora_weights .*, got 1.5"),
    "half_a_pair": (tensors(lambda t: t.pop(f"{Q}.lora_A.weight")), f"{Q}': Expected lora_A.weight and lora_B.weight"),
    "wrong_shape": (
        tensors(lambda t: t.update({f"{Q}.lora_B.weight": t[f"{Q}.lora_B.weight"][1:]})),
        rf"{Q}': Expected factors \(r, 32\) and \(32, r\), got \(4, 32\) and \(31, 4\)",
    ),
    "nan": (tensors(lambda t: t.update({f"{Q}.lora_B.weight": np.full((32, 4), np.nan, np.float32)})), f"{Q}': .* NaN"),
    "huge": (
        tensors(lambda t: t.update({f"{Q}.lora_B.weight": np.full((32, 4), 3e38, np.float32)})),
        f"{Q}': Expected factors within float32 when they are scaled",
    ),
    "unknown": (tensors(lambda t: t.update(x=np.zeros(1, np.float32))), "tensor 'x': Expected only factors"),
    "truncated": (
        lambda path: (path / "adapter_model.safetensors").write_bytes(b"\x08"), r"adapter_model\.safetensors.*truncated"
    ),
}  # fmt: skip


@pytest.mark.first_case
@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_fault(fault, message, tmp_path):
    path = shutil.copytree(ADAPTERS / "llama", tmp_path / "adapter")
    fault(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load("llama", adapter=path)


@pytest.mark.first_case
@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_leave_the_weights(init, tmp_path):
    path = shutil.copytree(ADAPTERS / "llama", tmp_path / "adapter")
    options(init_lora_weights=init)(path)
    jax.tree.map(np.testing.assert_array_equal, load("llama", adapter=path).params, load("llama").params)


def test_factors_of_experts(tmp_path):
    path = shutil.copytree(ADAPTERS / "llama", tmp_path / "adapter")
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    factors = {f"{name}.lora_A.weight": np.ones((2, 32)), f"{name}.lora_B.weight": np.ones((32, 2))}
    safetensors.numpy.save_file(factors, path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="Expected no factors for experts"):
        load("mixtral", adapter=path)


INITIAL = [name for name in NAMES if "-" in name]


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["llama-pissa", "gpt2-pissa", "bloom-olora"])
def test_untrained_initial_factors_change_nothing(name, tmp_path):
    """What PEFT takes out of the weights and what it adds are the same then."""
    path = shutil.copytree(ADAPTERS / name, tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    weights = safetensors.numpy.load_file(DIRECTORY / family(name) / "model.safetensors")

    def untrained(factors):
        for module in {key.rpartition(".lora_")[0] for key in factors}:
            stored = module.removeprefix("base_model.model.") + ".weight"
            w = next(w for key, w in weights.items() if stored.endswith(key)).astype(np.float64)
            w = w.T if config["fan_in_fan_out"] else w
            a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            rank = len(factors[a])
            if config["init_lora_weights"] == "pissa":
                scaling = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
                u, s, v = np.linalg.svd(w, full_matrices=False)
                up, down = u[:, :rank] * s[:rank] / scaling, v[:rank]
            else:
                q, r = np.linalg.qr(w)
                up, down = q[:, :rank], r[:rank]
            factors[a], factors[b] = down.astype(np.float32), up.astype(np.float32)

    tensors(untrained)(path)
    want = expected(family(name))["logits"]
    got = logits(load(name, adapter=path, quantize=False), name)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", ["llama-pissa", "bloom-olora"])
def test_initial_factors_need_the_float_weights(name, tmp_path):
    jint8.save(tmp_path / "int8", jint8.load(DIRECTORY / family(name)))
    with pytest.raises(
        ValueError, match=r"Expected the checkpoint's '.*' in floating point, .* got none\. Load the orig"
    ):
        jint8.load(tmp_path / "int8", adapter=ADAPTERS / name)


def test_initial_factors_on_top_of_bitsandbytes():
    with pytest.raises(ValueError, match=r"'transformer\..*' in floating point, .*'olora'.*, got one in other numbers"):
        jint8.load(DIRECTORY.parent / "bitsandbytes" / "bloom", adapter=ADAPTERS / "bloom-olora")


def test_olora_of_transposed_weights(tmp_path):
    path = shutil.copytree(ADAPTERS / "gpt2-pissa", tmp_path / "adapter")
    options(init_lora_weights="olora")(path)
    with pytest.raises(
        ValueError, match=r"init_lora_weights='olora' for '.*c_attn.weight', which is stored as \[in, out\]"
    ):
        load("gpt2", adapter=path)


def test_singular_values_that_are_equal(tmp_path):
    directory = shutil.copytree(DIRECTORY / "llama", tmp_path / "llama")
    weights = safetensors.numpy.load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = np.eye(*weights[name].shape, dtype=weights[name].dtype)
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match="q_proj': Expected singular value 4 to be above the next one for 'pissa'"):
        jint8.load(directory, adapter=ADAPTERS / "llama-pissa")


@pytest.mark.first_case
@pytest.mark.parametrize("name", INITIAL)
def test_initial_factors_are_merged(name):
    want = np.load(ADAPTERS / name / "expected.npz")["logits"]
    merged, _ = jint8.merge_adapter(load(name, quantize=False))
    np.testing.assert_allclose(logits(merged, name), want, rtol=0, atol=2e-4 * np.abs(want).max())
