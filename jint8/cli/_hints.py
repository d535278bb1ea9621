"""What somebody may have meant who asks for a name that isn't there."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path

ALIKE = 0.85  # of the letters of both, in order: one letter is missing, added or another in about seven
MOST_HINTS = 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean ...?"` with names that begin with this one, or else with those that are alike; or nothing.

    Examples:
      >>> did_you_mean("opt-175", ["opt-175b", "bloom-176b"])
      '; did you mean opt-175b?'
      >>> did_you_mean("gpt-5", ["opt-175b", "bloom-176b"])
      ''
    """
    by_lower_case = {other.lower(): other for other in known}
    begins = [other for other in by_lower_case if name and other.startswith(name.lower())]
    found = begins or difflib.get_close_matches(name.lower(), by_lower_case, n=MOST_HINTS, cutoff=ALIKE)
    if not found:
        return ""
    return f"; did you mean {' or '.join(by_lower_case[other] for other in found[:MOST_HINTS])}?"


def did_you_mean_path(path: Path) -> str:
    """`did_you_mean` of the last part of a path among what is beside it."""
    beside: list[str] = []
    with contextlib.suppress(OSError):  # nobody can look there
        beside = sorted(other.name for other in path.parent.iterdir() if not other.name.startswith("."))
    return did_you_mean(path.name, beside)
