"""Exit codes, and what a failure of featcache's ends as: one line on stderr, never a traceback."""

import enum

from featcache.errors import (
    AttachRefused,
    BackendUnavailable,
    CacheClosed,
    FeatcacheError,
    GetTimeout,
    OwnerLost,
    OwnerUnreachable,
    SettingsError,
)


class Exit(enum.IntEnum):
    """What a command's end means. A second signal while `serve` ends is 128 and the signal's number."""

    OK = 0
    FAILED = 1
    """It did not do what was asked: a bad check of `doctor`, an unknown key of `evict`."""
    USAGE = 2
    """An option, an argument, a variable or a line of the configuration is invalid."""
    NO_OWNER = 3
    """Nobody serves at the endpoint."""
    REFUSED = 4
    """The owner refused: another version, another user's, or as many observers as it takes."""
    IN_USE = 5
    """The endpoint, or the port, is another's."""
    UNAVAILABLE = 6
    """The device, the memory or a package is not there."""
    LOST = 7
    """The owner ended meanwhile, or does not answer."""


class Failure(Exception):
    """Ends a command with one line and this exit code."""

    def __init__(self, text: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(text)
        self.code = code


_CODES: tuple[tuple[type[FeatcacheError], Exit], ...] = (
    # In this order: the first is of the classes of those that follow.
    (OwnerUnreachable, Exit.NO_OWNER),
    (AttachRefused, Exit.REFUSED),
    (SettingsError, Exit.USAGE),
    (BackendUnavailable, Exit.UNAVAILABLE),
    (OwnerLost, Exit.LOST),
    (GetTimeout, Exit.LOST),
    (CacheClosed, Exit.LOST),
)


def code_of(error: FeatcacheError) -> Exit:
    """Return the exit code that an error ends a command with."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.FAILED)


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; one of the system's without its number."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    text = " ".join(said.split())
    return text or type(error).__name__
