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
    tokens, measured = result["cells"][cell]["tokens"], result["cells"][cell]["measured"]
    if name not in measured:
        return MISSING
    seconds = measured[name]["seconds"]
    speed = f"{tokens / seconds:.{0 if tokens / seconds >= 100 else 1}f}"
    if result["baseline"] not in measured:
        return speed
    return f"{speed} ({measured[result['baseline']]['seconds'] / seconds:.2f})"


def _memory(memory: dict[str, int]) -> str:
    """Where only the peak is known, that."""
    now, peak = memory.get("resident"), memory["peak"] / 1e6
    return f"({peak:.0f})" if now is None else f"{now / 1e6:.0f} ({peak:.0f})"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
