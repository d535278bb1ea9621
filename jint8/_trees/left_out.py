"""What stays in floating point though nobody asked for it: said in one warning per call, with the reasons."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping, Sequence

from jint8._trees.paths import path_group

# Parts of the names that authors give to arrays with two axes or more that aren't projections.
_NO_PROJECTION = re.compile(r"conv|embed|norm|bias|scale|cache|lora|(^|[/_])(pos|cls)", re.IGNORECASE)

_GROUPS_SHOWN = 6


def may_be_projection(path: str, shape: Sequence[int]) -> bool:
    """Whether a leaf of which nothing but name and shape is known is worth a word when it stays in floating point."""
    return sum(size != 1 for size in shape) >= 2 and not _NO_PROJECTION.search(path)


def say_left_out(caller: str, reasons: Mapping[str, str], advice: str, *, quantizes: bool, nothing: str = "") -> None:
    """Warns of weights that stay in floating point for another reason than the user's.

    Args:
      caller: the public function that leaves them out.
      reasons: for each such weight, by path, why.
      advice: what a user can do, one or more sentences.
      quantizes: whether any weight is int8. Where none is, there is a warning even without `reasons`.
      nothing: why none is, where no weight has a reason.
    """
    if quantizes and not reasons:
        return
    what = "these weights stay in floating point" if quantizes else "nothing becomes int8"
    why = _listed(reasons) if reasons else nothing
    warnings.warn(f"{caller}: {what}: {why}. {advice}", stacklevel=first_frame_outside())


def _listed(reasons: Mapping[str, str]) -> str:
    """`"layers/*/w (12 times): reason; ..."`: weights that differ in a layer's number only are one entry."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, reason in reasons.items():
        groups.setdefault((path_group(path), reason), []).append(path)
    shown = [
        f"{paths[0]}: {reason}" if len(paths) == 1 else f"{group} ({len(paths)} times): {reason}"
        for (group, reason), paths in list(groups.items())[:_GROUPS_SHOWN]
    ]
    more = len(groups) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more else [])])


def first_frame_outside() -> int:
    """`stacklevel` for `warnings.warn` in the caller, so that the warning names the line of the user's own code."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] == "jint8":
        level, frame = level + 1, frame.f_back
    return level
