"""Argument parsing and validation of puts and keys, the same for owners and clients."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

import torch

from featcache.core.keyed_store import key_label
from featcache.core.put_queue import Request
from featcache.errors import KeyNotFound, KeyTimeout, SettingsError, of_member
from featcache.memory.pack import MAX_NAME, Packed, is_name, pack
from featcache.ref import FeatureRef, TensorSpec
from featcache.settings import MAX_KEY_BYTES, Settings, parse_seconds

TTL_DEFAULT: Final[Any] = ...
"""Stands for "as the settings say", since None means "never"."""

NOWAIT_RPC_TIMEOUT_S: Final = 5.0
"""RPC timeout for non-waiting calls (``timeout=0``): the owner may be busy, or stopped."""

MAX_MEMBERS: Final = 1024
"""Members of one `get_many`, `contains_many` or `put_many`."""

ParsedPut: TypeAlias = tuple[Request, tuple[TensorSpec, ...], Packed]
"""A put's request, its specs, and its tensors."""


def key_bytes(key: Any) -> bytes:
    """Return a key as the directory has it: a str is its UTF-8.

    Raises:
        SettingsError: neither str nor bytes, not Unicode, empty, or of more than `MAX_KEY_BYTES` bytes.

    """
    if isinstance(key, str):
        try:
            key = key.encode()
        except UnicodeEncodeError:
            raise SettingsError(
                f"the key {key[:64]!r} has a lone surrogate, which UTF-8 has not: give bytes, such as "
                "os.fsencode(path) or content_key(text)"
            ) from None
    if not isinstance(key, bytes):
        raise SettingsError(f"a key is a str or bytes, not {type(key).__name__}")
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        raise SettingsError(
            f"a key has 1 to {MAX_KEY_BYTES} bytes, not {len(key)}: hash what is longer"
        )
    return key


def parse_many(values: Any, call: str, what: str) -> list[Any]:
    """Return the members of a call with many, or raise SettingsError."""
    if isinstance(values, str | bytes | FeatureRef | Mapping | torch.Tensor) or not isinstance(
        values, Iterable
    ):
        raise SettingsError(f"{call} takes a list of {what}, not {type(values).__name__}")
    members = list(values)
    if len(members) > MAX_MEMBERS:
        raise SettingsError(
            f"{call} takes up to {MAX_MEMBERS} {what}, not {len(members)}: call it again for the rest"
        )
    return members


def member_label(member: Any) -> str:
    """Return a ref or a key as the errors of calls with many name it."""
    if isinstance(member, FeatureRef):
        return f"ref {member.slot}:{member.generation}"
    return f"key {key_label(member)[:64]!r}" if isinstance(member, bytes) else type(member).__name__


def parse_keys(values: Any, call: str) -> list[bytes]:
    """Return the keys of a call with many, or raise SettingsError, which says which is none."""
    keys = parse_many(values, call, "keys")
    for index, key in enumerate(keys):
        try:
            keys[index] = key_bytes(key)
        except SettingsError as error:
            raise of_member(error, index, len(keys), "a key") from None
    return keys


def check_on_full(on_full: Any, key: Any) -> None:
    """Raise SettingsError unless it is a known policy, and one that a put with this key can have."""
    if not isinstance(on_full, str) or on_full not in {"wait", "raise", "spill"}:
        raise SettingsError(f"on_full={on_full!r} is none of 'wait', 'raise', 'spill'")
    if key is not None and on_full == "spill":
        raise SettingsError("what is kept under a key makes its own room: it does not spill")


def check_make(make: Callable[[], Any]) -> None:
    """Raise SettingsError unless `make` can be called."""
    if not callable(make):
        raise SettingsError(
            f"make is a function that returns the feature, not {type(make).__name__}"
        )


def rpc_timeout(timeout_s: float | None) -> float | None:
    """Return how long a call may take: a round trip is no wait, so 0 is not 0 s."""
    return NOWAIT_RPC_TIMEOUT_S if timeout_s == 0 else timeout_s


def not_found(key: bytes) -> KeyNotFound:
    """Return the KeyNotFound of a key."""
    hint = ": was a ref's bytes meant? FeatureRef.from_bytes" if key.startswith(b"fR\x01") else ""
    return KeyNotFound(f"no feature is kept under {key_label(key)[:64]!r}{hint}")


def key_timeout(label: str, timeout_s: float) -> KeyTimeout:
    """Return the KeyTimeout for an unsatisfied wait."""
    return KeyTimeout(f"nothing came under {label[:64]!r} within {timeout_s} s")


def parse_put(feature: Any, readers: Any, ttl: Any, key: Any, settings: Settings) -> ParsedPut:
    """Parse and pack a put, or raise SettingsError.

    `readers` left out (``...``) is one read, or none of a feature that is kept under a key.
    """
    specs, packed, nbytes = pack(feature, settings.tensors)
    ttl_s = settings.ttl if ttl is TTL_DEFAULT else parse_ttl(ttl)
    kept = None if key is None else key_bytes(key)
    if readers is ...:
        readers = 1 if kept is None else 0
    elif type(readers) is not int or not 0 < readers <= settings.readers:
        readers = parse_readers(readers, settings.readers, least=1 if kept is None else 0)
    return Request(nbytes, readers, ttl_s, kept), specs, packed


def parse_ttl(ttl: Any) -> float | None:
    """Return seconds until a ref expires, None for never; or raise SettingsError."""
    return None if ttl is None else parse_seconds(ttl, "ttl", exclusive=True)


def parse_readers(readers: Any, most: int, *, least: int) -> int | frozenset[str]:
    """Return a count of reads, or the names of the readers that owe them, or raise SettingsError."""
    if isinstance(readers, int) and not isinstance(readers, bool):
        if not least <= readers <= most:
            raise SettingsError(f"readers={readers} is out of range: {least} to {most}")
        return readers
    if isinstance(readers, str | bytes) or not isinstance(readers, Iterable):
        raise SettingsError(f"readers={readers!r} is neither a count nor names of readers")
    names = list(readers)
    if not all(is_name(name) for name in names):
        raise SettingsError(
            f"names of readers are str of 1 to {MAX_NAME} characters that UTF-8 has"
        )
    if not 1 <= len(names) <= most or len(set(names)) != len(names):
        raise SettingsError(f"readers={names[:8]!r}: 1 to {most} names, each of them once")
    return frozenset(names)
