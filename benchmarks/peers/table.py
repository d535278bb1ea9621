"""peers_cpu.md from peers_cpu.json."""

from __future__ import annotations

from typing import Any

MISSING = "–"


def markdown(result: dict[str, Any]) -> str:
    """The result of `run.py` as Markdown.

    Speed in tokens per second, and as a multiple of the baseline's in the same run.
    """
    machine, baseline = result["machine"], result["baseline"]
    header = ["", "head", *(cell["title"] for cell in result["cells"].values()), "memory, MB (peak)"]
    lines = [
        "Tokens per second (times those of " + baseline + "), medians of runs that took turns, on "
        f"{machine['cpus']} cores of {machine['cpu']} ({', '.join(machine['isa'])}).",
        "",
        _line(header),
        _line(["---"] * len(header)),
    ]
    for name, row in result["rows"].items():
        cells = [_speed(result, cell, name) for cell in result["cells"]]
        lines.append(_line([name, row["head"], *cells, _memory(row["memory"])]))
    versions = {key: value for row in result["rows"].values() for key, value in row["versions"].items()}
    lines += ["", "Versions: " + ", ".join(f"{key} {value}" for key, value in sorted(versions.items())) + "."]
    lines += [f"Skipped: {name} ({why})." for name, why in result["skipped"].items()]
    lines += ["", f"Greedy continuation of {result['continuation']['prompt']!r}:", ""]
    lines += [f"- {name}: {text!r}" for name, text in result["continuation"]["texts"].items()]
    return "\n".join(lines) + "\n"


def _speed(result: dict[str, Any], cell: str, name: str) -> str:
    measured, request = result["cells"][cell]["measured"], result["cells"][cell]["request"]
    if name not in measured:
        return MISSING
    speeds = {row: one["tokens"] / one["seconds"] for row, one in measured.items()}
    text = f"{speeds[name]:.{0 if speeds[name] >= 100 else 1}f}"
    if result["baseline"] in speeds:
        text += f" ({speeds[name] / speeds[result['baseline']]:.2f})"
    tokens = measured[name]["prompt_tokens"]
    return text if tokens == request["prompt_tokens"] else f"{text}, prompt of {tokens}"


def _memory(memory: dict[str, int]) -> str:
    """Where only the peak is known, that."""
    now, peak = memory.get("resident"), memory["peak"] / 1e6
    return f"({peak:.0f})" if now is None else f"{now / 1e6:.0f} ({peak:.0f})"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
