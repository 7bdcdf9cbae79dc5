"""Memory that the host can still give, as the kernel and this process's control groups report it.

A kernel that overcommits refuses nothing: it kills. So a large commit checks here first.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_PROC: Final = Path("/proc")
_GROUPS: Final = Path("/sys/fs/cgroup")
_ODD: Final = (OSError, ValueError, IndexError)
"""Errors of a file that is missing or has an unknown form."""


class _Version(NamedTuple):
    """The names that one version of control groups has for its files."""

    limits: tuple[tuple[str, str], ...]
    """Pairs of files: a limit, and the bytes charged to it."""
    reclaimable: frozenset[str]
    """Entries of ``memory.stat``: bytes that the kernel reclaims before it kills."""


_V1: Final = _Version(
    (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    ),
    frozenset(("total_inactive_file", "total_active_file")),
)
_V2: Final = _Version(
    (("memory.max", "memory.current"), ("memory.high", "memory.current")),
    frozenset(("inactive_file", "active_file", "slab_reclaimable")),
)


class _Mount(NamedTuple):
    """A hierarchy of control groups, as this process finds it in the file system."""

    version: _Version
    root: str
    """The group that is mounted, as this process's control group namespace names it."""
    point: Path


def available_bytes(proc: Path = _PROC, groups: Path = _GROUPS) -> int | None:
    """Return the bytes that can be had without taking others'; None if unknown.

    Control groups of both versions count, this process's and those above it. `groups` is what stands
    where ``/sys/fs/cgroup`` is usual.
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


def _of_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Yield the bytes left under each limit that binds this process; caches count as left."""
    paths = _paths(proc)
    for mount in _mounts(proc, groups):
        path = paths.get(mount.version)
        if path is not None:
            for group in _chain(mount, path):
                yield from _left_in(group, mount.version)


def _paths(proc: Path) -> dict[_Version, str]:
    """Return this process's group in each hierarchy that may limit memory."""
    found: dict[_Version, str] = {}
    with contextlib.suppress(*_ODD):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                found[_V1] = path
            elif number == "0" and not controllers:
                found[_V2] = path
    return found


def _mounts(proc: Path, groups: Path) -> list[_Mount]:
    """Return where the hierarchies are mounted; the usual places if the system does not say."""
    found: list[_Mount] = []
    with contextlib.suppress(OSError):
        for line in (proc / "self" / "mountinfo").read_text().splitlines():
            with contextlib.suppress(*_ODD):
                fields, _, source = line.partition(" - ")
                kind, _, options = source.split(" ")[:3]
                root, point = (_plain(field) for field in fields.split(" ")[3:5])
                if kind == "cgroup2":
                    found.append(_Mount(_V2, root, _moved(point, groups)))
                elif kind == "cgroup" and "memory" in options.split(","):
                    found.append(_Mount(_V1, root, _moved(point, groups)))
    return found or [_Mount(_V2, "/", groups), _Mount(_V1, "/", groups / "memory")]


def _plain(field: str) -> str:
    """Return a field of mountinfo without its octal escapes."""
    return (
        field.encode("latin-1", "backslashreplace").decode("unicode_escape")
        if "\\" in field
        else field
    )


def _moved(point: str, groups: Path) -> Path:
    path = Path(point)
    return groups / path.relative_to(_GROUPS) if path.is_relative_to(_GROUPS) else path


def _chain(mount: _Mount, path: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those above it, as far as they are mounted.

    A container often has its own group mounted as the root of the file system, or sees its path from
    another namespace, as ``/../…``: then the mounted group is the nearest that can be looked at.
    """
    root = mount.root.rstrip("/")
    below = path[len(root) :] if path == root or path.startswith(f"{root}/") else ""
    names = [name for name in below.split("/") if name]
    if ".." in names:
        names = []
    for depth in range(len(names), -1, -1):
        group = mount.point.joinpath(*names[:depth])
        yield group
        # Old hierarchies could count a group apart from the one above it.
        if mount.version is _V1 and depth and _read(group.parent / "memory.use_hierarchy") == "0":
            break


def _left_in(group: Path, version: _Version) -> Iterator[int]:
    for limit_file, used_file in version.limits:
        with contextlib.suppress(*_ODD):
            limit = _read(group / limit_file)
            if limit is not None and limit != "max":
                used_bytes = int((group / used_file).read_text())
                yield max(0, int(limit) - used_bytes + _cached_in(group, version))


def _read(path: Path) -> str | None:
    with contextlib.suppress(*_ODD):
        return path.read_text().strip()
    return None


def _cached_in(group: Path, version: _Version) -> int:
    """Return the bytes that the kernel reclaims before it kills."""
    cached_bytes = 0
    with contextlib.suppress(*_ODD):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in version.reclaimable:
                cached_bytes += int(value)
    return cached_bytes
