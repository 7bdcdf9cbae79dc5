"""Peer credentials and pidfd liveness."""

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from featcache.control.messages import ProtocolError
from featcache.errors import AttachRefused, BackendUnavailable, system_errors

_UCRED: Final = struct.Struct("3i")
_UID_MAP: Final = Path("/proc/self/uid_map")
_ALL_UIDS: Final = (1 << 32) - 1
_UNKNOWN_UID: Final = 65534
"""The overflow uid, by the kernel's default: the uid of every unmapped user of a user namespace."""


def _credentials(sock: socket.socket) -> tuple[int, int]:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _gid = _UCRED.unpack(data)
    return pid, uid


def peer_pid(sock: socket.socket) -> int:
    """Return the peer's pid as this PID namespace sees it (0 if it does not). For logs only."""
    return _credentials(sock)[0]


def check_uid(sock: socket.socket) -> None:
    """Raise AttachRefused unless the peer's process has this process's uid."""
    _, uid = _credentials(sock)
    if uid != os.geteuid():
        raise AttachRefused(f"the peer runs as uid {uid}, this process as uid {os.geteuid()}")
    if uid == _UNKNOWN_UID and not _maps_all_uids():
        told = "the overflow uid of this user namespace, which all unmapped users share"
        raise AttachRefused(f"both run as uid {uid}, {told}: run as another uid")


def _maps_all_uids() -> bool:
    """Whether this user namespace maps every uid, as the initial one does."""
    try:
        lines = _UID_MAP.read_text().splitlines()
        return sum(int(line.split()[2]) for line in lines) >= _ALL_UIDS
    except (OSError, ValueError, IndexError):
        return False


def own_pidfd() -> int:
    """Return a pidfd of this process, to be sent to a peer.

    Each side sends its own: a descriptor is valid across PID namespaces, a pid is not.

    Raises:
        BackendUnavailable: the system refuses it, as the seccomp profile of a container may.

    """
    with system_errors(BackendUnavailable, "no pidfd of this process (pidfd_open)"):
        return os.pidfd_open(os.getpid())


def _is_pidfd(fd: int) -> bool:
    target = str(Path(f"/proc/self/fd/{fd}").readlink())
    return target == "anon_inode:[pidfd]" or target.startswith("pidfd:")  # the latter since 6.9


def _process_of(pidfd: int) -> tuple[str, int] | None:
    """Return what tells the living process of a pidfd from all others."""
    try:
        info = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        pid = next(int(line[4:]) for line in info.splitlines() if line.startswith("Pid:"))
        if pid > 0:
            return "pid", pid
        # Of a PID namespace that this one does not see. Since Linux 6.9 a pidfd has an inode of its
        # process's own; before, all have one.
        inode, own = os.fstat(pidfd).st_ino, own_pidfd()
        try:
            return None if os.fstat(own).st_ino == inode else ("inode", inode)
        finally:
            os.close(own)
    except (OSError, StopIteration):
        return None


class PidWatch:
    """Calls back, once, when the process behind a pidfd has died. Owns the descriptor."""

    def __init__(self, pidfd: int, on_death: Callable[[], None]) -> None:
        """Begin to watch.

        Raises:
            ProtocolError: the peer's descriptor is none of a process.
            BackendUnavailable: the system refuses to watch it. Closed either way.

        """
        self._fd = pidfd
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        try:
            with system_errors(BackendUnavailable, "the peer's process can't be watched"):
                if not _is_pidfd(pidfd):
                    raise ProtocolError("the peer's first descriptor is not a pidfd")
                self._loop.add_reader(pidfd, self._fire)
        except BaseException:
            self.forget()
            raise

    @property
    def dead(self) -> bool:
        """Whether the process has died, polled now: the loop may not have seen it yet."""
        if self._fd < 0:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        with contextlib.suppress(OSError):  # the loop will see it
            return bool(poll.poll(0))
        return False

    def is_of(self, other: "PidWatch") -> bool:
        """Whether both watch one process, and it lives. False where the system does not tell."""
        if self.dead or other.dead:
            return False
        this = _process_of(self._fd)
        return this is not None and this == _process_of(other._fd)  # noqa: SLF001 - of this class

    def _fire(self) -> None:
        self.close()  # first: a pidfd stays readable, and would fire in every turn of the loop
        self._on_death()

    def close(self) -> None:
        """Stop watching. Idempotent."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        self.forget()

    def forget(self) -> None:
        """Drop the descriptor in a forked child, whose copy of the loop must not be touched."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
