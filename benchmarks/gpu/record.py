"""What a stage has measured so far, in a JSON file that is whole at any time. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replaces the file in one step: a reader, or a process that is killed meanwhile, sees the old one or the new."""
    part = path.with_suffix(".partial")
    part.write_text(json.dumps(values, indent=1, default=float) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that `write_json` wrote; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


class Record:
    """The file of one stage, written anew with each measurement.

    Attributes:
      values: what it holds: `failures`, a list of what was found wrong; `ended`, whether the stage came to its end.
    """

    def __init__(self, path: Path):
        self._path = path
        self.values: dict[str, Any] = {"ended": False, "failures": []}
        self._write()

    def put(self, **values: Any) -> None:
        """Adds values by name."""
        self.values |= values
        self._write()

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Appends a row to the list of that name."""
        self.values.setdefault(table, []).append(row)
        self._write()

    def fail(self, what: str) -> None:
        """Notes something wrong. The stage goes on, and counts as failed."""
        self.values["failures"].append(what)
        self._write()

    def end(self) -> None:
        """Says that the stage did all that it had to do."""
        self.put(ended=True)

    def _write(self) -> None:
        write_json(self._path, self.values)
