"""`benchmarks/gpu_check.py` before there is a GPU: all of it at toy sizes, its parts with results that are made up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from kernels import kernel_oracle

import pallas_kernels as pk
from pallas_kernels import tune

gpu_check = pytest.importorskip("gpu_check", reason="needs the benchmarks, which aren't in the wheel")
from gpu import clock, correctness, operands, oracle, processes, products, record, setting, table, targets, tuning  # noqa: E402

STAGES = [stage.name for stage in gpu_check.STAGES]
COMMAND = [sys.executable, gpu_check.__file__, "--rehearse"]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    done = subprocess.run([*COMMAND, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in [*STAGES, "summary"]}
    can_skip = {"peers", "mosaic", "mosaic_one_tile"}
    assert {stage for stage in STAGES if found[stage]["status"] != "done"} <= can_skip
    assert not any(found[stage]["failures"] for stage in STAGES)
    assert all(row["right"] for row in found["triton"]["checked"])
    assert found["products"]["tuned"] == found["decoder"]["tuned"] == found["tune"]["winners"] != {}
    assert found["summary"]["complete"]
    assert found["summary"]["versions"]["jax"] == jax.__version__
    assert found["summary"]["products"][0]["times_bf16"] > 0
    assert found["decoder"]["logits_error"] < 0.1
    assert found["summary"] == json.loads((tmp_path / "all.json").read_text())["summary"]
    assert "x bf16" in done.stdout


def test_limits_add_up_to_less_than_nine_minutes():
    assert sum(stage.seconds for stage in gpu_check.STAGES) <= gpu_check.TOTAL < 540


def test_without_a_gpu_it_says_so(tmp_path):
    """Of the nine stages only the first runs."""
    command = [*COMMAND[:2], "--out", tmp_path]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Expected a GPU that JAX can use" in done.stderr
    assert [stage["name"] for stage in json.loads((tmp_path / "summary.json").read_text())["stages"]] == ["about"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_what_is_told_to_end_ends_its_stage(tmp_path):
    with subprocess.Popen([*COMMAND, "--out", tmp_path, "--stages", "tune"], stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "tune.json").exists():  # the stage has begun
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    mark = f"{processes.MARK}=tune-{process.pid}-".encode()
    alive = [folder for folder in Path("/proc").glob("[0-9]*") if mark in _environment(folder)]
    assert alive == []


def _environment(process):
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


CASE = correctness.Case(70, 33, 64, outliers=2)


@pytest.fixture(scope="module")
def operands_and_result():
    ops = operands.make(1, m=CASE.m, n=CASE.n, k=CASE.k, outliers=CASE.outliers)
    y = kernel_oracle.product(*ops, None, 6.0, "batch")
    return ops, np.asarray(jax.numpy.asarray(y, jax.numpy.bfloat16))


def _one_wrong(y):
    y = y.copy()
    y[66, 7] = y[66, 7] * 1.02 + 1e-3
    return y


def _one_missing(y):
    y = y.copy()
    y[5, 3] = np.nan  # in a row that may not be among the sampled
    return y


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda y, call: y, []),
        (lambda y, call: _one_wrong(y), ["error"]),
        (lambda y, call: _one_missing(y), ["error", "finite"]),
        (lambda y, call: np.nextafter(y, y + 1) if call else y, ["equal"]),
    ],
    ids=["right", "one_wrong", "one_never_written", "second_time_another"],
)
def test_a_wrong_number_is_found(operands_and_result, change, wrong, monkeypatch):
    ops, y = operands_and_result
    monkeypatch.setattr(oracle, "sample_rows", lambda m, seed: np.arange(m))
    calls = iter(range(2))
    found = correctness.judge(lambda: change(y, next(calls)), ops, CASE, seed=0, rehearse=True)
    assert found["right"] == (not wrong)
    assert (found["error"] <= 1) == ("error" not in wrong)
    assert found["equal"] == ("equal" not in wrong)
    assert found["finite"] == ("finite" not in wrong)


def _record(tmp_path):
    return record.Record(tmp_path / "stage.json")


def test_a_stage_with_a_wrong_kernel_fails_and_goes_on(tmp_path, monkeypatch):
    """The first product of each kind is wrong, the second doesn't compile, the third is right."""
    calls = iter(range(3))

    def kernel(x, q, scale, **options):
        number = next(calls)
        if number == 1:
            raise NotImplementedError("no such tile")
        y = jax.numpy.asarray(kernel_oracle.product(*ops, None, 6.0, "batch"), x.dtype)
        return y * jax.numpy.where(number, 1, 1.1).astype(x.dtype)

    ops = operands.make(5, m=CASE.m, n=CASE.n, k=CASE.k, outliers=CASE.outliers)
    monkeypatch.setattr(correctness.pk, "llm_int8_matmul", kernel)
    monkeypatch.setattr(correctness, "_operands", lambda seed, case: ops)
    kept = _record(tmp_path)
    correctness._run(kept, setting.Setting(tmp_path, rehearse=True), [(CASE, {"backend": "triton"})] * 3)
    found = json.loads((tmp_path / "stage.json").read_text())
    assert [row["right"] for row in found["checked"]] == [False, False, True]
    assert len(found["failures"]) == 2
    assert "no such tile" in found["failures"][1]


def test_a_wrong_tile_does_not_win(operands_and_result, tmp_path):
    """However fast it is; nor does one that doesn't run."""
    ops, y = operands_and_result
    rows = np.arange(CASE.m)
    allowed = oracle.expected(*map(np.asarray, ops), threshold=6.0, mode="batch", rows=rows, dtype="bfloat16")
    here = setting.Setting(tmp_path, rehearse=True)

    def broken(sets):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    def slow(sets):
        time.sleep(0.01)
        return [y]

    tried = {32: lambda sets: [_one_wrong(y)], 64: broken, 128: slow, 256: "ptxas doesn't take it"}
    configs = {bn: tune.to_json(pk.FewRowsConfig(bn=bn)) for bn in tried}
    timed = [{"config": configs[bn], **tuning._timed(run, [ops], rows, allowed, here)} for bn, run in tried.items()]
    assert ["wrong" in row for row in timed] == [True, True, False, False]
    assert ["us" in row for row in timed] == [False, False, True, False]
    assert tune.winners({"sizes": [{"entry": "few_16", "timed": timed}]}) == {"few_16": configs[128]}


@pytest.mark.parametrize("mode", ["batch", "token"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_oracle_agrees_with_the_kernels(mode, dtype):
    """Both were written from the formulas, without a look at the other."""
    ops = operands.make(2, m=130, n=33, k=64, outliers=3, dtype=dtype)
    x, q, scale = (np.asarray(a) for a in ops)
    rows = oracle.sample_rows(130, 0)
    assert {0, 129} <= set(rows)
    assert all(((rows >= start) & (rows < start + 64)).any() for start in (0, 64, 128))
    right, allowed = oracle.expected(x, q, scale, threshold=6.0, mode=mode, rows=rows, dtype=dtype)
    case = (x.astype(np.float64), q, scale, None)
    np.testing.assert_allclose(right, kernel_oracle.product(*case, 6.0, mode)[rows], rtol=1e-12)
    np.testing.assert_allclose(allowed, kernel_oracle.tolerance(*case, 6.0, mode, dtype)[rows], rtol=1e-6)


def test_rows_of_every_tile_are_sampled():
    for seed in range(3):
        rows = oracle.sample_rows(2048, seed)
        assert {0, 2047} <= set(rows)
        assert set(rows // 64) == set(range(32))


def test_what_is_timed_without_a_gpu():
    """By the host's clock; with CUPTI asked for, it says why that is all there is."""
    program = jax.jit(clock.repeated(lambda x: x + 1)).lower([(np.ones(3),)] * 4).compile()
    found = clock.measure({"add": (program, ([(np.ones(3),)] * 4,), 4)}, "cupti", rounds=2)["add"]
    assert found["us"] == found["wall_us"] > 0
    assert found["clock"] == "host"
    assert "cupti_error" in found


def test_what_cupti_gives_is_in_milliseconds(monkeypatch):
    from jax.experimental.mosaic.gpu import profiler

    def measure(self, compiled, *, aggregate):
        assert (self.finalize, aggregate) == (False, False)
        return lambda *args: (compiled(*args), [("quantize", 0.002), ("multiply", 0.03)])

    monkeypatch.setattr(profiler.Cupti, "measure", measure)
    program = jax.jit(lambda x: x + 1).lower(np.ones(3)).compile()
    found = clock.measure({"product": (program, (np.ones(3),), 1)}, "cupti", rounds=2)["product"]
    assert found["us"] == pytest.approx(32)
    assert found["launches"] == 2
    assert found["wall_us"] > 0


def test_times_of_kernels():
    """Two products of two kernels each, three rounds, and one in which CUPTI lost a record."""
    rounds = [[("quantize", 1.0), ("multiply", t), ("multiply", t), ("quantize", 2.0)] for t in (10.0, 30.0, 20.0)]
    found = clock._summary([50.0, 60.0, 70.0], [*rounds, rounds[0][:3]], 2, None)
    assert found["us"] == 21.5
    assert found["wall_us"] == 30.0
    assert found["launches"] == 2
    assert found["kernels"] == [["quantize", 1, 1.5], ["multiply", 1, 20.0]]
    assert found["rounds"] == 3
    assert found["clock"] == "cupti"


def test_weights_together_are_larger_than_the_cache():
    assert clock.number_of_sets(4096 * 14336, 50 << 20) == 3
    assert clock.number_of_sets(8192 * 32768, 50 << 20) == 1
    assert clock.number_of_sets(768, 50 << 20) == 48


def test_operations_of_a_program():
    text = """HloModule jit_f
%inner (p: s8[4]) -> s8[4] {
  ROOT %copy.9 = s8[4]{0} copy(%p)
}
ENTRY %main (p0: f32[4], p1: s8[4]) -> f32[4] {
  %p0 = f32[4]{0} parameter(0), metadata={op_name="x"}
  %p1 = s8[4]{0} parameter(1)
  %call.1 = (s8[4]{0}, f32[]) custom-call(%p0, %p1), custom_call_target="__gpu$xla.gpu.triton"
  %get.2 = s8[4]{0} get-tuple-element(%call.1), index=0
  %bitcast.3 = s8[2,2]{1,0} bitcast(%get.2)
  ROOT %loop_fusion = f32[4]{0} fusion(%bitcast.3), kind=kLoop, calls=%inner
}
"""
    assert products.operations(text) == ["call.1", "loop_fusion"]


def test_winners_of_another_chip_are_not_taken(tmp_path):
    (tmp_path / "tune.json").write_text(json.dumps({"chip": "sm_1", "sizes": []}))
    assert setting.Setting(tmp_path, rehearse=True).use_tuned() == {}


def test_the_table_has_targets_and_predictions(tmp_path):
    times = {"us": 100.0, "wall_us": 110.0, "tera_per_s": 1374.0, "launches": 5, "times_bf16": 1.9, "clock": "cupti"}
    programs = {"bf16": {**times, "us": 190.0}, "jint8 outliers=6": times, "mosaic": {**times, "us": 90.0}}
    rows = [{"m": m, "k": 4096, "n": 8192, "programs": programs} for m in (2048, 16)]
    rows.append({"m": 17, "k": 4096, "n": 8192, "programs": {"jint8 outliers=6": {**times, "us": 150.0}}})
    (tmp_path / "products.json").write_text(json.dumps({"table": rows}))
    (tmp_path / "about.json").write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "versions": {"jax": "0.11.2"}}))
    peers = [{"m": 2048, "k": 4096, "n": 8192, "bitsandbytes threshold=6": 321.5}]
    (tmp_path / "peers.json").write_text(json.dumps({"table": peers}))
    predicted = tmp_path / "predicted.json"
    predicted.write_text(json.dumps({"products": [{"m": 2048, "k": 4096, "n": 8192, "times_bf16": 1.65}]}))
    outcomes = [processes.Outcome("about", "done", "", 1.0), processes.Outcome("mosaic", "failed", "killed", 50.0)]
    found = table.summary(tmp_path, outcomes, predicted)
    row = found["products"][0]
    assert (row["us"], row["bf16_us"], row["target_tera_per_s"], row["target_times_bf16"]) == (100, 190, 1321, 1.85)
    assert row["target_source"] == "sglang #3035"
    assert row["predicted_times_bf16"] == 1.65
    assert row["bitsandbytes_us"] == 321.5
    assert row["other_us"] == {"mosaic": 90.0}
    assert found["17_rows"]["us_over_16_rows"] == 1.5
    assert found["failed"] == ["mosaic"]
    text = table.text(found)
    assert "FAILED mosaic: killed" in text
    assert "321.5" in text


def test_a_table_that_cannot_be_made_is_said_so(tmp_path):
    (tmp_path / "products.json").write_text(json.dumps({"table": [{"m": 1}]}))
    found = table.summary(tmp_path, [processes.Outcome("products", "failed", "killed", 1.0)], None)
    assert found["products_error"] == "KeyError: 'k'"
    assert found["failed"] == ["products"]


def test_targets_are_of_their_gpu_and_shape():
    assert targets.target("NVIDIA A100-SXM4-80GB", 2048, 4096, 8192)["tera_per_s"] == 499
    assert targets.target("NVIDIA H200", 2048, 4096, 8192)["tera_per_s"] == 1321
    assert targets.target("NVIDIA H200", 1, 4096, 8192) == {}  # its memory is faster
    assert targets.target("NVIDIA H100 80GB HBM3", 2048, 4096, 4096) == {}
