"""The table of `benchmarks/peers`: speeds and ratios of a result that is made up."""

import pytest

table = pytest.importorskip("peers.table", reason="needs the benchmarks, which aren't in the wheel")


@pytest.fixture
def result():
    timed = {"ours, float32": {"seconds": 2.0}, "theirs": {"seconds": 0.5}}
    return {
        "machine": {"cpus": 2, "cpu": "a CPU", "isa": ["avx2"]},
        "baseline": "ours, float32",
        "skipped": {"absent": "No module named 'absent'"},
        "cells": {
            "prefill": {"title": "prefill of 512", "tokens": 512, "measured": timed},
            "decode_batch_4": {"title": "decode, batch 4", "tokens": 4, "measured": {"theirs": {"seconds": 0.125}}},
        },
        "rows": {
            "ours, float32": {"head": "float32", "memory": {"resident": 10**9, "peak": 2 * 10**9}, "versions": {}},
            "theirs": {"head": "int8", "memory": {"peak": 3 * 10**8}, "versions": {"theirs": "1.2"}},
        },
        "continuation": {"prompt": "One, two,", "texts": {"theirs": " three"}},
    }


def test_speeds_and_ratios(result):
    lines = table.markdown(result).splitlines()
    assert "| ours, float32 | float32 | 256 (1.00) | – | 1000 (2000) |" in lines
    assert "| theirs | int8 | 1024 (4.00) | 32.0 | (300) |" in lines


def test_says_what_was_skipped_and_with_which_versions(result):
    lines = table.markdown(result).splitlines()
    assert "Skipped: absent (No module named 'absent')." in lines
    assert "Versions: theirs 1.2." in lines
    assert "- theirs: ' three'" in lines
