"""The errors, each with a message that says what to do.

Every error that featcache raises on purpose is a `FeatcacheError`. Two families are worth telling
apart: *closed* is what this process did (`CacheClosed`), *lost* is what the peer did (`OwnerLost`).
Each class also derives from the built-in error that plain code would expect, so that
``except TimeoutError`` or ``except ValueError`` keep working.
"""

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
