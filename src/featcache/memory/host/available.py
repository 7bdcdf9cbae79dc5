"""Memory that the host can still give, as the kernel and this process's control groups report it.

A kernel that overcommits refuses nothing: it kills. So a large commit checks here first.
"""

import contextlib
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_GROUPS: Final = Path("/sys/fs/cgroup")
_ODD: Final = (OSError, ValueError, IndexError)
"""Errors of a file that is missing or has an unknown form."""


def available_bytes(proc: Path = _PROC, groups: Path = _GROUPS) -> int | None:
    """Return the bytes that can be had without taking others'; None if unknown.

    Control groups of version 2 count, this process's and those above it.
    """
    known = [value for value in (_of_host(proc), *_of_groups(proc, groups)) if value is not None]
    return min(known) if known else None


def _of_host(proc: Path) -> int | None:
    fields = {}
    with contextlib.suppress(*_ODD):
        for line in (proc / "meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in {"MemAvailable", "SwapFree"}:
                fields[name] = int(value.split()[0]) << 10
    return sum(fields.values()) if "MemAvailable" in fields else None


def _of_groups(proc: Path, groups: Path) -> list[int]:
    """Return the bytes left under each limit that binds this process; caches count as left."""
    found: list[int] = []
    with contextlib.suppress(*_ODD):
        path = (proc / "self" / "cgroup").read_text().partition("0::/")[2].splitlines()[0]
        own = groups / path
        for group in (own, *own.parents):
            left = _left_in(group)
            if left is not None:
                found.append(left)
            if group == groups:
                break
    return found


def _left_in(group: Path) -> int | None:
    with contextlib.suppress(*_ODD):
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used_bytes = int((group / "memory.current").read_text())
            return max(0, int(limit) - used_bytes + _cached_in(group))
    return None


def _cached_in(group: Path) -> int:
    """Return the bytes that the kernel reclaims before it kills."""
    cached_bytes = 0
    with contextlib.suppress(*_ODD):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in {"inactive_file", "active_file", "slab_reclaimable"}:
                cached_bytes += int(value)
    return cached_bytes
