"""An owner's endpoint: a Unix socket in a directory that only this user can enter.

Who owns an endpoint is decided by a lock on a file beside the socket (`EndpointLock`), held for life: only
its holder binds the socket there, and only its holder removes it.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import select
import socket
import stat
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Final

from featcache.control.credentials import peer_pid
from featcache.errors import BackendUnavailable, SettingsError, explain

_MAX_PATH_BYTES: Final = 107  # sun_path, less its final zero
_BACKLOG: Final = 128
_SUFFIX: Final = ".sock"
_LOCK_SUFFIX: Final = ".lock"
_OURS: Final = re.compile(r"[0-9]+-[0-9a-f]+\.sock")
"""Names that `listen` makes: nobody else will ever listen there."""


def check_endpoint(endpoint: object) -> str:
    """Return the absolute path as a str, or raise SettingsError if no Unix socket can have it.

    Absolute, since refs carry it to processes that run in other directories.
    """
    if not isinstance(endpoint, str | os.PathLike) or not os.fspath(endpoint):
        raise SettingsError(f"endpoint={endpoint!r} is not the path of a Unix socket")
    path = os.fspath(endpoint)
    if isinstance(path, str) and not path.startswith("/"):
        try:
            path = str(Path.cwd() / path)
        except OSError as error:  # it was removed
            raise _refused(f"endpoint={path!r} is in no directory: give it whole", error) from error
    try:  # the longer of its forms: the file system's, and UTF-8, as refs carry it
        nbytes = max(len(os.fsencode(path)), len(path.encode())) if isinstance(path, str) else 0
    except UnicodeEncodeError:
        nbytes = 0
    if not nbytes or "\0" in path:
        raise SettingsError(f"endpoint={path!r} is not a path in UTF-8")
    if nbytes > _MAX_PATH_BYTES:
        raise SettingsError(
            f"endpoint={path!r} is longer than a Unix socket's {_MAX_PATH_BYTES} bytes"
        )
    return path


def default_directory() -> Path:
    """Return ``$XDG_RUNTIME_DIR/featcache``, else ``featcache-<uid>`` under the temporary directory.

    It is made with mode 0700, whatever the umask, if it is not there.

    Raises:
        SettingsError: it exists and belongs to another user, or is open to others, or can't be made.

    """
    runtime, uid = os.environ.get("XDG_RUNTIME_DIR"), os.geteuid()
    name = "featcache" if runtime else f"featcache-{uid}"
    parent = runtime or "the temporary directory"
    try:
        parent = runtime or tempfile.gettempdir()
        folder = Path(parent, name)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == uid
        if ours and ~found.st_mode & stat.S_IRWXU:  # made under a umask that takes from its user
            folder.chmod(stat.S_IRWXU)
            found = folder.lstat()
    except OSError as error:
        raise _refused(
            f"no directory for sockets in {parent} (set XDG_RUNTIME_DIR or endpoint)", error
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        raise SettingsError(f"{folder} must be a directory of uid {uid} with mode 0700")
    return folder


class EndpointLock:
    """The right to an endpoint's path: a locked file beside it, which names the holder's process.

    It is a POSIX record lock, which belongs to the process: it ends with that, however that ends and
    whatever forks of it live on (one of `flock` would be theirs too, also of a fork that runs no hook of
    Python's). Its price is that the process loses it by closing any descriptor of the file: so none is
    opened while the lock is held here, and `_locks` tells. Who has lost it still has the socket, at
    which `_clear` looks.
    """

    def __init__(self, path: Path, fd: int, identity: tuple[int, int]) -> None:
        self._path = path
        self._fd = fd
        self._identity = identity
        _locks[identity] = self

    @classmethod
    def take(cls, endpoint: Path) -> "EndpointLock":
        """Take the lock of an endpoint.

        Raises:
            SettingsError: another owner holds it.
            OSError: its file can't be made.

        """
        path = endpoint.with_name(endpoint.name + _LOCK_SUFFIX)
        with _taking:
            while True:
                with contextlib.suppress(FileNotFoundError):
                    if _identity(path.lstat()) in _locks:
                        raise _in_use(endpoint, "this process owns it")
                taken = cls._try(endpoint, path)
                if taken is not None:
                    return taken

    @classmethod
    def _try(cls, endpoint: Path, path: Path) -> "EndpointLock | None":
        """Return None if the file was removed meanwhile: then the lock is one of nothing."""
        fd, made = _open_or_make(path)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(fd)
            os.close(fd)
            raise _in_use(endpoint, f"{holder} owns it") from None
        except BaseException:
            _drop(path, fd, remove=made)
            raise
        try:
            identity = _identity(os.fstat(fd))
            if _is_file(path, identity):
                os.fchmod(fd, 0o600)  # whatever the umask: the next owner must open it
                os.ftruncate(fd, 0)
                os.pwrite(fd, b"%d\n" % os.getpid(), 0)
                return cls(path, fd, identity)
        except BaseException:
            _drop(path, fd, remove=True)
            raise
        os.close(fd)
        return None

    def release(self) -> None:
        """Remove the file, then release the lock. Idempotent."""
        if self._fd >= 0:
            # In this order: unlocked first, the file could be the next owner's.
            _unlink(self._path, self._identity)
            self.forget()

    def forget(self) -> None:
        """Close the descriptor; in a forked child, which has no lock, that does nothing to its parent's."""
        if self._fd >= 0:
            _locks.pop(self._identity, None)
            os.close(self._fd)
            self._fd = -1


class Listener:
    """A listening socket, its path and the lock of that path."""

    def __init__(self, sock: socket.socket, path: str, lock: EndpointLock) -> None:
        self.sock = sock
        self.path = path
        self._lock = lock
        self._file = _identity(Path(path).lstat())
        _listeners.add(self)

    def close(self) -> None:
        """Stop listening, and remove the socket's file if it is still this one. Idempotent."""
        if self.sock.fileno() < 0:
            return
        self.sock.close()
        # Under the lock, and compared: whoever removed the folder may have let another owner in.
        _unlink(Path(self.path), self._file)
        self._lock.release()

    def forget(self) -> None:
        """Close a forked child's copies; the parent's file and lock stay."""
        self.sock.close()
        self._lock.forget()


def listen(endpoint: str | None) -> Listener:
    """Listen at a path, or at one of its own; a stale socket in the way is replaced.

    Raises:
        SettingsError: the path can't be used, or another owner has it.
        BackendUnavailable: the system has no descriptor or memory for a socket.

    """
    if endpoint is None:
        folder = default_directory()
        _sweep(folder)
        path = folder / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
    else:
        path = Path(endpoint)
    check_endpoint(path)
    with contextlib.ExitStack() as undo:
        try:
            lock = EndpointLock.take(path)
            undo.callback(lock.release)
            _clear(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            undo.callback(sock.close)
            sock.setblocking(False)
            sock.bind(str(path))
            undo.callback(_unlink, path, _identity(path.lstat()))
            path.chmod(0o600)
            sock.listen(_BACKLOG)
            listener = Listener(sock, str(path), lock)
        except OSError as error:
            raise _refused(f"can't listen at {path}", error) from error
        undo.pop_all()
    return listener


def _refused(doing: str, error: OSError) -> SettingsError | BackendUnavailable:
    """Return the error of a path that can't serve, or of a system that has nothing left to give."""
    lacks = error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
    return (BackendUnavailable if lacks else SettingsError)(f"{doing}: {explain(error)}")


def _clear(path: Path) -> None:
    """Remove a stale socket from a path whose lock is held; raise SettingsError for what is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise SettingsError(f"endpoint {path} is in use: it is no socket; name another")
    # The lock was free, but an owner whose lock file somebody removed still listens.
    if not _is_stale(path):
        raise _in_use(path, "another owner listens there")
    path.unlink()


def _open_or_make(path: Path) -> tuple[int, bool]:
    """Return a descriptor of a lock's file, and whether it was made."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
        with contextlib.suppress(FileNotFoundError):  # removed between the two
            return os.open(path, flags), False


def _drop(path: Path, fd: int, *, remove: bool) -> None:
    """Close a lock's file that can't be used, and remove it."""
    with contextlib.suppress(OSError):
        if remove:
            _unlink(path, _identity(os.fstat(fd)))
    os.close(fd)


def _in_use(path: Path, why: str) -> SettingsError:
    return SettingsError(f"endpoint {path} is in use: {why}; name another, or stop that one")


def _holder(lock_fd: int) -> str:
    """Return what the file of a lock that is held says of its holder."""
    with contextlib.suppress(OSError):
        pid = os.pread(lock_fd, 32, 0).strip()
        if pid.isdigit():
            return f"process {int(pid)}"
    return "another process"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _is_file(path: Path, identity: tuple[int, int]) -> bool:
    """Whether this file is the one at a path now."""
    with contextlib.suppress(FileNotFoundError):
        return _identity(path.lstat()) == identity
    return False


def _unlink(path: Path, identity: tuple[int, int]) -> None:
    """Remove a file from its path, if it is still the one there, and can be."""
    with contextlib.suppress(OSError):
        if _is_file(path, identity):
            path.unlink()


def _is_stale(path: Path) -> bool:
    """Whether a socket has no listener, or one whose process is dead and only a fork of it lives.

    Raise OSError if that can't be told.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(str(path))
        if code not in {0, errno.EAGAIN, errno.ECONNREFUSED}:
            raise OSError(code, os.strerror(code))
        return code == errno.ECONNREFUSED or (code == 0 and _is_dead(peer_pid(probe)))


def _is_dead(pid: int) -> bool:
    """Whether a process is known to be dead; one that this PID namespace does not see is not."""
    try:
        pidfd = os.pidfd_open(pid) if pid > 0 else -1
    except ProcessLookupError:
        return True
    except OSError:
        return False
    if pidfd < 0:
        return False
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(0))  # a zombie, too
    finally:
        os.close(pidfd)


def _sweep(folder: Path) -> None:
    """Remove the sockets of owners that were killed, of those that no owner will ever take over."""
    with contextlib.suppress(OSError):
        names = {path.name.removesuffix(_LOCK_SUFFIX) for path in folder.iterdir()}
        for name in filter(_OURS.fullmatch, names):
            sweep_one(folder / name)


def sweep_one(path: Path) -> bool:
    """Remove a socket and its lock if their owner is dead; return whether that was so."""
    with contextlib.suppress(OSError, SettingsError):  # a live owner's
        lock = EndpointLock.take(path)
        try:
            _clear(path)
            return True
        finally:
            lock.release()
    return False


def is_stale(path: Path) -> bool:
    """Whether nobody listens at a path, or only a fork of a dead owner; False if that can't be told.

    An owner that is just opening has its lock but no socket yet.
    """
    with contextlib.suppress(OSError):
        kind = _kind(path)
        return kind is None or (kind == stat.S_IFSOCK and _is_stale(path))
    return False


def _kind(path: Path) -> int | None:
    """Return what kind of file is at a path, None if there is none."""
    try:
        return stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return None


def holder_of(path: Path) -> int | None:
    """Return the process that the lock of an endpoint names, if there is one. For reports only."""
    lock = path.with_name(path.name + _LOCK_SUFFIX)
    with _taking, contextlib.suppress(OSError, ValueError):
        # One that this process holds is not opened: closing it would end the lock.
        return os.getpid() if _identity(lock.lstat()) in _locks else int(lock.read_text())
    return None


def is_endpoint(path: Path) -> bool:
    """Whether what is at a path is a socket, or gone with its lock still there."""
    with contextlib.suppress(OSError):
        kind = _kind(path)
        return holder_of(path) is not None if kind is None else kind == stat.S_IFSOCK
    return False


_taking = threading.Lock()
_locks: dict[tuple[int, int], EndpointLock] = {}
"""Those that this process holds, by their files."""
_listeners: "weakref.WeakSet[Listener]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # Here, since `api.forks` knows nothing of an owner that is just opening.
    global _taking  # noqa: PLW0603 - another thread may have held it as this process forked
    _taking = threading.Lock()
    for listener in list(_listeners):
        listener.forget()
    for lock in list(_locks.values()):
        lock.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
