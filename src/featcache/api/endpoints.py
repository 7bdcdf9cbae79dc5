"""The endpoints of this user on this host, alive or stale."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import attrs

from featcache.control import endpoint as endpoints
from featcache.errors import SettingsError

_UNIX_SOCKETS: Final = Path("/proc/net/unix")
_PATH_FIELD: Final = 7


@attrs.frozen
class Endpoint:
    """A path at which an owner listens, or did."""

    path: str
    state: Literal["alive", "stale"]
    """``stale``: its owner died; the next one takes the path over."""
    pid: int | None
    """The owner's, as its lock says it; None if there is no lock."""


def find_endpoints() -> list[Endpoint]:
    """Return the endpoints in this user's folder, and those elsewhere at which somebody listens.

    Raises:
        SettingsError: the folder can't be used.

    """
    folder = endpoints.default_directory()
    try:
        paths = {path for path in folder.iterdir() if path.suffix in {".sock", ".lock"}}
    except OSError as error:
        raise SettingsError(f"{folder} can't be read: {error.strerror}") from error
    # A socket may have any name; a lock is beside it, or is all that is left.
    sockets = {path.with_name(path.name.removesuffix(".lock")) for path in paths}
    return sorted(
        (_found(path) for path in sockets | set(_listening()) if endpoints.is_endpoint(path)),
        key=lambda found: (found.state, found.path),
    )


def _found(path: Path) -> Endpoint:
    return Endpoint(
        str(path), "stale" if endpoints.is_stale(path) else "alive", endpoints.holder_of(path)
    )


def _listening() -> Iterator[Path]:
    """Yield paths of sockets with the lock of an owner of this user beside them."""
    with contextlib.suppress(OSError):
        for line in _UNIX_SOCKETS.read_text(errors="replace").splitlines()[1:]:
            fields = line.split(maxsplit=_PATH_FIELD)
            if len(fields) <= _PATH_FIELD or not fields[_PATH_FIELD].startswith("/"):
                continue
            path = Path(fields[_PATH_FIELD])
            with contextlib.suppress(OSError):
                lock = path.with_name(path.name + ".lock")
                if lock.lstat().st_uid == os.geteuid() and endpoints.is_endpoint(path):
                    yield path


def check_endpoint(endpoint: str) -> None:
    """Raise SettingsError if no Unix socket can have this path."""
    endpoints.check_endpoint(endpoint)


def named_endpoint(name: str) -> str:
    """Return the path of an endpoint of this name in this user's folder, which is made if need be.

    Raises:
        SettingsError: the folder can't be used.

    """
    return str(endpoints.default_directory() / f"{name}.sock")


def sweep(prefix: str = "") -> list[str]:
    """Remove the sockets and locks of owners that died from this user's folder; return their paths.

    Only those, and of them those whose names begin with `prefix`: what an owner listens at, and any other
    file, stays.
    """
    return [
        found.path
        for found in find_endpoints()
        if found.state == "stale"
        and Path(found.path).name.startswith(prefix)
        and endpoints.sweep_one(Path(found.path))
    ]
