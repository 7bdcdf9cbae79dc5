"""Result files: JSON with a line for each cell.

A cell is a record of figures, each a scalar or a list of scalars (the rounds, say). What holds cells has
a line for each of them, and one for the scalars beside them; nothing is divided more than twice. So a
file is short, and a figure that changed shows as one line.

    python tests/bench/resultfile.py tests/bench/results/*.json      # put files in this form
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
_DEEPEST = 2


def write(to: Path | None, result: dict[str, Any]) -> None:
    """Write a result, if there is a file to write it to."""
    if to is not None:
        to.write_text(dumps(result))


def dumps(result: dict[str, Any]) -> str:
    """Return the text of a result file."""
    return _divided(result, 0) + "\n"


def _divided(value: Any, depth: int) -> str:
    if depth > _DEEPEST or (depth and _is_cell(value)):
        return json.dumps(value)
    named = isinstance(value, dict)
    lines: list[str] = []
    together = False
    for key, member in value.items() if named else enumerate(value):
        text = (f"{json.dumps(key)}: " if named else "") + _divided(member, depth + 1)
        scalar = not isinstance(member, dict | list)
        if together and scalar:
            lines[-1] += f", {text}"
        else:
            lines.append(text)
        together = scalar
    inside = f",\n{' ' * (depth + 1)}".join(lines)
    first, last = "{}" if named else "[]"
    return f"{first}\n{' ' * (depth + 1)}{inside}\n{' ' * depth}{last}"


def _is_cell(value: Any) -> bool:
    """Whether no member of a value has members that have members."""
    return all(
        not isinstance(member, dict) and not any(isinstance(each, dict | list) for each in member)
        for member in (value.values() if isinstance(value, dict) else [value])
        if isinstance(member, dict | list)
    )


def main(argv: list[str]) -> int:
    for path in map(Path, argv):
        path.write_text(dumps(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
