"""The smallest inputs that show all that a corpus does: the lines they run, and how they are refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Final

import featcache
from fuzz import targets

MAX_FILES: Final = 25
"""Inputs that are kept of each target, and of how many bytes together."""
MAX_BYTES: Final = 16 << 10
_ROOT: Final = str(Path(featcache.__file__).parent)


def minimise(target: str, inputs: list[bytes]) -> list[bytes]:
    """Take inputs, the shorter first, as long as one shows what none before it did."""
    seen: set[object] = set()
    kept: list[bytes] = []
    for data in sorted(inputs, key=len):
        shown = features(target, data)
        if shown <= seen or sum(map(len, kept)) + len(data) > MAX_BYTES:
            continue
        seen |= shown
        kept.append(data)
    return kept[: MAX_FILES // 2] + kept[MAX_FILES // 2 :][-(MAX_FILES - MAX_FILES // 2) :]


def features(target: str, data: bytes) -> set[object]:
    """The steps from line to line in featcache, and the errors, numbers cut out of their words."""
    found: set[object] = set()
    last: dict[int, int] = {}

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_ROOT):
            return None
        if event == "exception":
            found.add((arg[0].__name__, re.sub(r"\d+|'.*'|`.*`", "", str(arg[1]))[:60]))
        found.add((frame.f_code.co_filename, last.get(id(frame)), frame.f_lineno))
        last[id(frame)] = frame.f_lineno
        return trace

    targets.TARGETS[target](data)  # what is done once is no feature of this input
    targets.outcomes.clear()
    sys.settrace(trace)
    try:
        targets.TARGETS[target](data)
    finally:
        sys.settrace(None)
    return found | targets.outcomes
