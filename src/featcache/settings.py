"""Every bound and interval in one frozen record, read from the environment where asked."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, Self

import attrs

from featcache.errors import SettingsError

__all__ = ["Settings", "parse_bytes", "parse_seconds", "split_budget"]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_MAX_BYTES = 1 << 47  # a user address space; what is larger can't be mapped on any machine we know
_ENVIRONMENT_PREFIX = "FEATCACHE_"


def parse_bytes(value: int | str, what: str = "size", *, minimum: int = 1) -> int:
    """Return a size in bytes from an int or a string such as ``"512MiB"``, ``"1.5 GB"``, ``"4096"``.

    Raises:
        SettingsError: not a size, under `minimum`, or beyond any address space.

    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise SettingsError(
                f"{what}={value!r} is not a size: give bytes, or a string such as '512MiB'"
            )
        size_bytes = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    elif isinstance(value, int) and not isinstance(value, bool):
        size_bytes = value
    else:
        raise SettingsError(f"{what}={value!r} is not a size: give an int or a str")
    if not minimum <= size_bytes <= _MAX_BYTES:
        raise SettingsError(f"{what}={value!r} is out of range: {minimum} to {_MAX_BYTES} bytes")
    return size_bytes


def parse_seconds(
    value: float | str, what: str = "time", *, minimum: float = 0.0, exclusive: bool = False
) -> float:
    """Return a time in seconds, finite and at least (or, if `exclusive`, above) `minimum`."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{what}={value!r} is not a number of seconds") from None
    if not math.isfinite(seconds) or seconds < minimum or (exclusive and seconds == minimum):
        bound = "more than" if exclusive else "at least"
        raise SettingsError(f"{what}={value!r} must be finite and {bound} {minimum} s")
    return seconds


def _optional_bytes(value: int | str | None, what: str) -> int | None:
    return None if value is None else parse_bytes(value, what, minimum=0)


def _ttl(value: float | str | None) -> float | None:
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return None
    return parse_seconds(value, "ttl", exclusive=True)


def _count(value: int | str, what: str, low: int, high: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{what}={value!r} is not a whole number") from None
    if isinstance(value, bool | float) or not low <= number <= high:
        raise SettingsError(f"{what}={value!r} is out of range: {low} to {high}")
    return number


_FLAGS = {"1": True, "true": True, "yes": True, "on": True}
_FLAGS |= {"0": False, "false": False, "no": False, "off": False}


def _flag(value: bool | str, what: str) -> bool:
    known = value if isinstance(value, bool) else _FLAGS.get(str(value).lower())
    if known is None:
        raise SettingsError(f"{what}={value!r} is neither true nor false")
    return known


# Converters are lambdas because mypy's attrs plugin knows no other kind that carries a field's name.
@attrs.frozen(kw_only=True)
class Settings:
    """Sizes (bytes, or strings such as ``"512MiB"``), times (seconds) and bounds of a pool.

    `Settings.from_environment` reads ``FEATCACHE_<FIELD>`` for every field, for example
    ``FEATCACHE_CAPACITY=4GiB``; what is passed to it wins over the environment.

    Raises:
        SettingsError: a value is out of range or not of its kind.

    """

    capacity: int = attrs.field(default=1 << 30, converter=lambda v: parse_bytes(v, "capacity"))
    """Bytes the slab may grow to."""
    segment: int = attrs.field(
        default=64 << 20, converter=lambda v: parse_bytes(v, "segment", minimum=4096)
    )
    """Bytes committed or given back at a time."""
    initial: int | None = attrs.field(
        default=None, converter=lambda v: _optional_bytes(v, "initial")
    )
    """Bytes committed at the start and never given back; None is one segment."""
    idle: float = attrs.field(default=30.0, converter=lambda v: parse_seconds(v, "idle"))
    """Seconds a segment at the tail stays empty before it is given back."""
    prefault: bool = attrs.field(default=True, converter=lambda v: _flag(v, "prefault"))
    """Touch host pages as they are committed (a first touch costs 40 times a warm copy)."""
    huge_pages: bool = attrs.field(default=True, converter=lambda v: _flag(v, "huge_pages"))
    """Ask the system for huge pages under a host slab; it may say no."""
    slots: int = attrs.field(default=4096, converter=lambda v: _count(v, "slots", 1, 1 << 20))
    """Features the pool can hold at once."""
    sessions: int = attrs.field(default=64, converter=lambda v: _count(v, "sessions", 1, 4096))
    """Readers and writers that can be attached at once."""
    waiters: int = attrs.field(default=4096, converter=lambda v: _count(v, "waiters", 0, 1 << 20))
    """Puts that may stand in the queue for room; one more is `PoolFull`."""
    readers: int = attrs.field(default=1024, converter=lambda v: _count(v, "readers", 1, 1 << 20))
    """Reads that one ref may owe."""
    tensors: int = attrs.field(default=256, converter=lambda v: _count(v, "tensors", 1, 4096))
    """Tensors that one feature may pack."""
    attachments: int = attrs.field(
        default=64, converter=lambda v: _count(v, "attachments", 1, 4096)
    )
    """Pools that one client keeps open; the least recently used idle one makes place."""
    ttl: float | None = attrs.field(default=300.0, converter=_ttl)
    """Seconds until a ref that was not paid expires; None is never."""
    grace: float = attrs.field(default=0.001, converter=lambda v: parse_seconds(v, "grace"))
    """Seconds between a revocation and the look at who still holds the bytes."""
    recycle_interval: float = attrs.field(
        default=0.05, converter=lambda v: parse_seconds(v, "recycle_interval", exclusive=True)
    )
    """Seconds between the recycler's looks while nobody waits; the safety net of its events."""
    pressure_interval: float = attrs.field(
        default=10.0, converter=lambda v: parse_seconds(v, "pressure_interval", exclusive=True)
    )
    """Seconds between pressure events while the level stays high."""
    log_interval: float = attrs.field(
        default=1.0, converter=lambda v: parse_seconds(v, "log_interval")
    )
    """Least seconds between two events of one busy kind (``put.waited``, level changes)."""
    attach_timeout: float = attrs.field(
        default=10.0, converter=lambda v: parse_seconds(v, "attach_timeout", exclusive=True)
    )
    """Seconds for a handshake, on both sides."""
    message_bytes: int = attrs.field(
        default=64 << 10, converter=lambda v: parse_bytes(v, "message_bytes", minimum=1024)
    )
    """Longest control message."""
    inline_bytes: int = attrs.field(
        default=4 << 20, converter=lambda v: parse_bytes(v, "inline_bytes", minimum=0)
    )
    """Copies above this many bytes leave the event loop for a thread (about a millisecond)."""

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, **overrides: Any
    ) -> Self:
        """Return settings from ``FEATCACHE_…`` variables; overrides that are not None win."""
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for field in attrs.fields(cls):
            name = _ENVIRONMENT_PREFIX + field.name.upper()
            if environment.get(name):
                values[field.name] = environment[name]
        values |= {name: value for name, value in overrides.items() if value is not None}
        return cls(**values)


def split_budget(total: int | str, workers: int, floor: int | str = "128MiB") -> int:
    """Return the bytes each of `workers` pools may have so that together they stay within `total`.

    Raises:
        SettingsError: a share would be under `floor`; the message says how many workers fit.

    """
    total_bytes = parse_bytes(total, "total")
    floor_bytes = parse_bytes(floor, "floor")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise SettingsError(f"workers={workers!r} must be a whole number of at least 1")
    share_bytes = total_bytes // workers
    if share_bytes < floor_bytes:
        raise SettingsError(
            f"{total_bytes} bytes over {workers} workers is {share_bytes} each, under the floor of "
            f"{floor_bytes}: this total carries {total_bytes // floor_bytes} workers"
        )
    return share_bytes
