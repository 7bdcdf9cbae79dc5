"""The errors, each with a message that says what to do.

Every error that featcache raises on purpose is a `FeatcacheError`. Two families are worth telling
apart: *closed* is what this process did (`CacheClosed`), *lost* is what the peer did (`OwnerLost`).
Each class also derives from the built-in error that plain code would expect, so that
``except TimeoutError`` or ``except ValueError`` keep working.

What the system refuses (`OSError`, `MemoryError`) becomes one of these at the few boundaries that use
`system_errors`: the slab, the pool, the attach, the endpoint.
"""

import contextlib
import errno
import os
import socket
import traceback
from collections.abc import Iterator
from typing import Final

__all__ = [
    "AttachRefused",
    "BackendUnavailable",
    "CacheClosed",
    "FeatcacheError",
    "FeatureTooLarge",
    "GetTimeout",
    "KeyNotFound",
    "KeyTimeout",
    "MalformedRef",
    "OwnerLost",
    "OwnerUnreachable",
    "PoolFull",
    "PutTimeout",
    "SettingsError",
    "StaleRef",
    "UnknownPool",
    "WrongLoop",
]


class FeatcacheError(Exception):
    """The root of featcache's errors."""

    member: int | None = None
    """Of a call with many members (`get_many`, `put_many`): the one that failed, counted from 0."""


class PoolFull(FeatcacheError):
    """There is no room now, and the call was not allowed to wait. Wait, shed load, or add capacity.

    The message names who holds the room: the oldest refs, their age, and who owes them.
    """


class FeatureTooLarge(FeatcacheError, ValueError):
    """The feature can never fit this pool, even an empty one. Raise ``capacity`` or split it."""


class PutTimeout(FeatcacheError, TimeoutError):
    """A put waited its whole ``timeout`` for room. Its place in the queue is given up.

    The message names who holds the room, as that of `PoolFull`.
    """


class GetTimeout(FeatcacheError, TimeoutError):
    """A get or borrow waited its whole ``timeout`` for the pool or the bytes. The read is still owed."""


class StaleRef(FeatcacheError):
    """The ref names bytes that are gone: recycled, expired, discarded, or already paid by this session.

    The message says which where it is known, as it is in the owner, and what to do.
    """


class MalformedRef(FeatcacheError, ValueError):
    """The bytes are not a ref, were damaged on the way, or contradict the pool they name."""


class UnknownPool(FeatcacheError, LookupError):
    """The ref's endpoint is served by another pool, or this client is bound to another one."""


class KeyNotFound(FeatcacheError, LookupError):
    """No feature is kept under this key."""


class KeyTimeout(KeyNotFound, GetTimeout):
    """A get, borrow or get_or_put waited its whole ``timeout`` for a key, and nothing came under it."""


class OwnerLost(FeatcacheError, ConnectionError):
    """The process that owns the pool died or closed it. Ask for the feature again elsewhere."""


class AttachRefused(FeatcacheError, ConnectionError):
    """The owner could not be reached or would not have this session; the message says why."""


class OwnerUnreachable(AttachRefused, OwnerLost):
    """Nobody listens at the endpoint: the owner ended, or never was."""


class CacheClosed(FeatcacheError):
    """This cache or client is not open in this process: never opened, closed, or inherited by a fork."""


class WrongLoop(FeatcacheError, RuntimeError):
    """The call came from another event loop or thread than the object's own; the message names both."""


class BackendUnavailable(FeatcacheError, RuntimeError):
    """The device or kernel feature that the backend needs is not there."""


class SettingsError(FeatcacheError, ValueError):
    """An argument or a setting is invalid; the message names it and its constraint."""


# --- what the system refuses ---------------------------------------------------------------------

OUT_OF_DESCRIPTORS: Final = "out of file descriptors: raise ulimit -n"

_ADVICE: Final = {
    errno.EMFILE: OUT_OF_DESCRIPTORS,
    errno.ENFILE: "the whole system is out of file descriptors: raise fs.file-max",
    errno.ETOOMANYREFS: "too many file descriptors are on their way to others: raise ulimit -n",
    errno.ENOMEM: "lower capacity, or raise the memory limit, ulimit -v or vm.max_map_count",
    errno.ENOBUFS: "the system is out of memory for sockets: free some, then try again",
    errno.EAGAIN: "the system is short of something for the moment: try again",
    errno.ENOSPC: "free some space and inodes there, or name another place",
    errno.EDQUOT: "over this user's quota: free some space there, or name another place",
    errno.EFBIG: "over the limit on file sizes: raise ulimit -f, or lower capacity",
    errno.EACCES: "make it accessible to this user, or name another place",
    errno.EPERM: "a seccomp profile or security policy forbids the call: allow it",
    errno.ENOSYS: "featcache needs Linux 5.3, and a seccomp profile that allows the call",
    errno.EROFS: "the file system is read-only: name another place",
    errno.ENOENT: "make it, or name another place",
    errno.EISDIR: "name a file",
    errno.ECONNREFUSED: "nobody listens there: start it, or correct the address",
    errno.EHOSTUNREACH: "look at the address, routes and firewalls",
    errno.ENETUNREACH: "look at the address, routes and firewalls",
    errno.EINTR: "a signal interrupted the call: try again",
}
_ODD: Final = "the system refused the call"


def explain(error: BaseException) -> str:
    """Return what went wrong, and what to do about it where the system refused something."""
    if isinstance(error, MemoryError):
        return f"{str(error) or os.strerror(errno.ENOMEM)}: {_ADVICE[errno.ENOMEM]}"
    if isinstance(error, FeatcacheError) or not isinstance(error, OSError):
        return str(error)
    if isinstance(error, socket.gaierror):  # its numbers are the resolver's own
        return f"{error.strerror or error}: correct the host's name, or make it known (DNS, /etc/hosts)"
    said = error.strerror or str(error) or type(error).__name__
    where = f" ({error.filename})" if error.filename is not None else ""
    return f"{said}{where}: {_ADVICE.get(error.errno or 0, _ODD)}"


def at_member(error: BaseException, member: int) -> BaseException:
    """Return an error of featcache's that knows of which member it is; `of_member` has it say so."""
    if isinstance(error, FeatcacheError) and error.member is None:
        error.member = member
    return error


def of_member(error: BaseException, member: int | None, count: int, label: str) -> BaseException:
    """Return the error of one of so many members, which then says of which; others' errors as they are."""
    if isinstance(error, FeatcacheError) and member is not None:
        error.member = member
        error.args = (f"member {member + 1} of {count}, {label}: {error}",)
    return error


@contextlib.contextmanager
def system_errors(kind: type[FeatcacheError], doing: str) -> Iterator[None]:
    """Raise what the system refuses as `kind`, saying what was to be done; other errors pass.

    The frames that the error went through drop their locals: an error may be kept for long, in a cycle
    with its task even until the next collection, and its traceback would keep their mappings.
    """
    try:
        yield
    except FeatcacheError as error:
        traceback.clear_frames(error.__traceback__)
        raise
    except (OSError, MemoryError) as error:
        traceback.clear_frames(error.__traceback__)
        raise kind(f"{doing}: {explain(error)}") from error
