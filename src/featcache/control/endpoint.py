"""An owner's endpoint: a Unix socket in a directory that only this user can enter."""

import contextlib
import errno
import os
import secrets
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Final

from featcache.errors import BackendUnavailable, SettingsError, explain

_MAX_PATH_BYTES: Final = 107  # sun_path, less its final zero
_BACKLOG: Final = 128
_SUFFIX: Final = ".sock"
_TEMPORARY: Final = ".new"
_TEMPORARY_AGE_S: Final = 60.0


def check_endpoint(endpoint: object) -> str:
    """Return the path as a str, or raise SettingsError if no Unix socket can have it."""
    if not isinstance(endpoint, str | os.PathLike) or not os.fspath(endpoint):
        raise SettingsError(f"endpoint={endpoint!r} is not the path of a Unix socket")
    path = os.fspath(endpoint)
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
        if (
            ours and ~found.st_mode & stat.S_IRWXU
        ):  # made under a umask that takes from its own user
            folder.chmod(stat.S_IRWXU)
            found = folder.lstat()
    except OSError as error:
        raise _refused(
            f"no directory for sockets in {parent} (set XDG_RUNTIME_DIR or endpoint)", error
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        raise SettingsError(f"{folder} must be a directory of uid {uid} with mode 0700")
    return folder


def listen(endpoint: str | None) -> tuple[socket.socket, str]:
    """Return a listening socket and its path; a stale socket in the way is replaced.

    Raises:
        SettingsError: the path can't be used, or a live owner listens there.
        BackendUnavailable: the system has no descriptor or memory for a socket.

    """
    if endpoint is None:
        folder = default_directory()
        _sweep(folder)
        path = folder / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
    else:
        path = Path(endpoint)
        try:
            in_use = path.exists() and not _is_stale(path)
        except OSError as error:
            raise _refused(f"can't listen at {path}", error) from error
        if in_use:
            why = "another owner listens there, or it is no socket"
            raise SettingsError(f"{path} is in use: {why}")
    check_endpoint(path)
    # Bound under a temporary name and renamed once it listens: between bind and listen a socket refuses
    # connections, and another owner would take it for stale and remove it.
    temporary = path.with_name(f".{secrets.token_hex(4)}{_TEMPORARY}")
    check_endpoint(temporary)
    sock: socket.socket | None = None
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        sock.bind(str(temporary))
        temporary.chmod(0o600)
        sock.listen(_BACKLOG)
        temporary.rename(path)
    except OSError as error:
        if sock is not None:
            sock.close()
        unlink(str(temporary))
        raise _refused(f"can't listen at {path}", error) from error
    return sock, str(path)


def _refused(doing: str, error: OSError) -> SettingsError | BackendUnavailable:
    """Return the error of a path that can't serve, or of a system that has nothing left to give."""
    lacks = error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
    return (BackendUnavailable if lacks else SettingsError)(f"{doing}: {explain(error)}")


def unlink(path: str) -> None:
    """Remove a socket file if it is still there, and can be: the next owner there replaces a stale one."""
    with contextlib.suppress(OSError):
        Path(path).unlink()


def _is_stale(path: Path) -> bool:
    """Whether the path is a socket without a listener, or raise OSError if that can't be told."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(str(path))
    if code not in {0, errno.EAGAIN, errno.ECONNREFUSED}:
        raise OSError(code, os.strerror(code))
    return code == errno.ECONNREFUSED


def _sweep(folder: Path) -> None:
    """Remove the sockets of owners that were killed."""
    for path in _found(folder, f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if _is_stale(path):
                path.unlink()
    for path in _found(folder, f".*{_TEMPORARY}"):  # killed between bind and rename
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _TEMPORARY_AGE_S:
                path.unlink()


def _found(folder: Path, pattern: str) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(folder.glob(pattern))
    return []
