"""The system calls that featcache makes, counted, and one of them made to fail."""

import asyncio
import ctypes
import errno
import fcntl
import mmap
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from featcache.memory.host import pages

SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_PLACE: Final = frozenset({errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ENOENT})
_SOCKET: Final = frozenset({errno.ENOMEM, errno.ENOBUFS, errno.EPERM})
_EPOLL: Final = frozenset({errno.ENOMEM, errno.ENOSPC})

TABLE: Final[dict[str, frozenset[int]]] = {
    "os.memfd_create": SHORT | {errno.ENOSYS, errno.EPERM},
    "os.ftruncate": frozenset({errno.EFBIG, errno.ENOSPC, errno.EPERM}),
    "os.fstat": frozenset({errno.ENOMEM, errno.EACCES}),
    "os.open": SHORT | {errno.ENOENT, errno.EACCES},
    "os.dup": SHORT - {errno.ENOMEM},
    "os.pidfd_open": SHORT | {errno.ENOSYS, errno.EPERM},
    "os.eventfd": SHORT | {errno.ENOSYS},
    "os.eventfd_read": frozenset({errno.EAGAIN, errno.EINTR}),
    "os.eventfd_write": frozenset({errno.EAGAIN, errno.EINTR}),
    "os.posix_fallocate": frozenset(
        {errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EINTR, errno.EPERM}
    ),
    "mmap.mmap": frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EACCES}),
    "os.fchmod": frozenset({errno.EPERM, errno.EROFS}),
    "os.pwrite": frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}),
    "fcntl.lockf": frozenset({errno.ENOLCK, errno.ENOMEM, errno.EPERM}),
    "fcntl.fcntl": frozenset({errno.ENOMEM, errno.EPERM}),
    "libc.madvise": frozenset({errno.ENOMEM, errno.EINVAL, errno.EINTR, errno.EPERM}),
    "libc.fallocate": frozenset({errno.ENOMEM, errno.EINTR, errno.EPERM}),
    "socket.socket": SHORT | {errno.ENOBUFS, errno.EACCES, errno.EPERM},
    "socket.bind": _PLACE | {errno.ENOMEM, errno.EPERM},
    "socket.listen": frozenset({errno.EADDRINUSE, errno.EPERM}),
    "socket.accept": SHORT | {errno.ENOBUFS, errno.EPERM, errno.ECONNABORTED},
    "socket.connect_ex": frozenset({errno.EACCES, errno.EINTR, errno.ENOMEM, errno.EPERM}),
    "socket.getsockopt": _SOCKET,
    "socket.send": _SOCKET | {errno.EINTR},
    "socket.sendmsg": _SOCKET | {errno.EINTR, errno.ETOOMANYREFS, errno.EMFILE},
    "socket.recvmsg": _SOCKET | {errno.EINTR},
    "loop.add_reader": _EPOLL,
    "loop.add_writer": _EPOLL,
    "Path.mkdir": _PLACE | {errno.ENOMEM},
    "Path.chmod": frozenset({errno.EPERM, errno.EACCES, errno.EROFS}),
    "Path.lstat": frozenset({errno.EACCES, errno.ENOMEM}),
    "Path.iterdir": frozenset({errno.EMFILE, errno.EACCES}),
    "Path.readlink": frozenset({errno.EACCES, errno.ENOENT, errno.ENOMEM}),
    "Path.unlink": frozenset({errno.EACCES, errno.EROFS, errno.EPERM}),
    "Path.read_text": frozenset({errno.EMFILE, errno.EACCES}),
    "tempfile.gettempdir": frozenset({errno.ENOENT}),
}
"""Each call, and the errors that it is made to fail with: those of its manual page that can come about.

Python itself repeats what a signal interrupts, but for the calls that have EINTR here.
"""

ELSEWHERE: Final[dict[str, str]] = {
    "Path.is_file": "takes any failure for: there is no such file",
    "socket.create_connection": "to Mooncake's master alone; an OSError of it is told as it is",
    "socket.create_server": "of a listener at all addresses alone; an OSError of it is told as it is",
    "socket.gethostname": "of a listener at all addresses alone; an OSError of it is told as it is",
    "os.close": "the descriptor is closed whatever it says",
    "os.fsencode": "no system call",
    "Path.open": "of the file of the cluster's key alone: tests/reach/test_secret.py",
    "Path.cwd": "of a relative endpoint alone: tests/control/test_endpoints.py",
    "os.fspath": "no system call",
    "os.strerror": "no system call",
    "os.path.realpath": "takes a path that it can not follow as it is",
    "os.getpid": "can't fail",
    "os.geteuid": "can't fail",
    "os.register_at_fork": "no system call",
    "os.environ.get": "no system call",
    "ctypes.CDLL": "the C library, which the process has",
    "select.poll": "`PidWatch.dead` takes any failure for: not yet",
    "socket.CMSG_SPACE": "no system call",
    "socket.shutdown": "the close that follows says as much",
    "os.pread": "the refusal then names no process",
    "threading.Thread": "tests/faults/test_no_thread.py, tests/memory/test_cuda_backing.py",
}
"""What the package calls in the same modules and is not made to fail here, and why."""


class Calls:
    """The calls made so far, by name; the one at `fail_at` fails with `code`.

    It is told by its name and its place among those of this name: threads make the others in any order.
    """

    def __init__(self, fail_at: tuple[str, int] | None = None, code: int = 0) -> None:
        self.made: list[str] = []
        self.error: OSError | None = None
        """The failure, once it came about."""
        self._fail_at = fail_at
        self._code = code

    def meet(self, name: str) -> OSError | None:
        """Count a call of featcache; return its error if it is to fail."""
        caller = sys._getframe(2).f_globals.get("__name__", "")
        if not caller.startswith("featcache."):
            return None
        self.made.append(name)
        if self._fail_at is None or self._fail_at != (name, self.made.count(name)):
            return None
        self.error = OSError(self._code, os.strerror(self._code))
        return self.error

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if (error := self.meet(name)) is not None:
                raise error
            return call(*args, **kwargs)

        return counted

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count, and fail, the calls made in the block."""
        places: dict[str, Any] = {
            "os": os,
            "mmap": mmap,
            "fcntl": fcntl,
            "tempfile": tempfile,
            "Path": pathlib.Path,
            "loop": asyncio.SelectorEventLoop,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "socket", self._socket())
            patch.setattr(pages, "_libc", _Libc(self, pages._libc))
            for full_name in TABLE:
                place, _, name = full_name.partition(".")
                if place in places:
                    call = getattr(places[place], name)
                    patch.setattr(places[place], name, self.wrap(full_name, call))
            yield

    def _socket(self) -> type[socket.socket]:
        calls = self

        class Counted(socket.socket):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                if (error := calls.meet("socket.socket")) is not None:
                    raise error
                super().__init__(*args, **kwargs)

            def connect_ex(self, address: Any) -> int:
                error = calls.meet("socket.connect_ex")
                return super().connect_ex(address) if error is None else error.errno or 0

        for full_name in TABLE:
            place, _, name = full_name.partition(".")
            if place == "socket" and name not in {"socket", "connect_ex"}:
                setattr(Counted, name, calls.wrap(full_name, getattr(socket.socket, name)))
        return Counted


class _Libc:
    """The calls that go through ctypes: they return -1 and leave the error in errno."""

    def __init__(self, calls: Calls, real: Any) -> None:
        self._calls = calls
        self._real = real

    def madvise(self, *args: Any) -> int:
        return self._call(self._real.madvise, args, self._calls.meet("libc.madvise"))

    def fallocate(self, *args: Any) -> int:
        return self._call(self._real.fallocate, args, self._calls.meet("libc.fallocate"))

    def _call(self, real: Any, args: tuple[Any, ...], error: OSError | None) -> int:
        if error is None:
            return int(real(*args))
        ctypes.set_errno(error.errno or 0)
        return -1
