"""`Settings`: every bound and interval in one frozen record, with defaults from the environment."""

import difflib
import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs
import structlog

from featcache.errors import SettingsError

__all__ = [
    "MAX_KEY_BYTES",
    "Settings",
    "parse_bytes",
    "parse_seconds",
    "parse_timeout",
    "round_up",
    "split_budget",
]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**n for n, p in enumerate("kmgtpe", 1)}
_UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgtpe", 1)}
_SIZE_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
MAX_KEY_BYTES = 1024
"""Bytes of the longest key."""
_MAX_GRACE_S: Final = 1.0
_MAX_BYTES = 1 << 47  # a user address space: no machine that we know maps more
_ENVIRONMENT_PREFIX = "FEATCACHE_"
_log = logging.getLogger("featcache")


def round_up(size_bytes: int, unit_bytes: int) -> int:
    """Return the least multiple of `unit_bytes` that is not below a size."""
    return -(-size_bytes // unit_bytes) * unit_bytes


def parse_bytes(value: int | str, name: str = "size", *, minimum: int = 1) -> int:
    """Return a size in bytes from an int or a string such as ``"512MiB"``, ``"1.5 GB"``, ``"4096"``.

    Raises:
        SettingsError: not a size, under `minimum`, or beyond any address space.

    """
    if isinstance(value, str):
        match = _SIZE_TEXT.fullmatch(value)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise SettingsError(
                f"{name}={value!r} is not a size: give bytes, or a string such as '512MiB'"
            )
        size_bytes = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    elif isinstance(value, int) and not isinstance(value, bool):
        size_bytes = value
    else:
        raise SettingsError(f"{name}={value!r} is not a size: give an int or a str")
    if not minimum <= size_bytes <= _MAX_BYTES:
        raise SettingsError(f"{name}={value!r} is out of range: {minimum} to {_MAX_BYTES} bytes")
    return size_bytes


def parse_timeout(value: float | None) -> float | None:
    """Return seconds; None waits indefinitely."""
    return None if value is None else parse_seconds(value, "timeout")


def parse_seconds(
    value: float | str, name: str = "time", *, minimum: float = 0.0, exclusive: bool = False
) -> float:
    """Return a time in seconds, finite and at least (or, if `exclusive`, above) `minimum`."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{name}={value!r} is not a number of seconds") from None
    if not math.isfinite(seconds) or seconds < minimum or (exclusive and seconds == minimum):
        bound = "more than" if exclusive else "at least"
        raise SettingsError(f"{name}={value!r} must be finite and {bound} {minimum} s")
    return seconds


# Converters: attrs passes them the field, so that an error names it.


def _size(value: int | str, field: "attrs.Attribute[Any]") -> int:
    return parse_bytes(value, field.name, minimum=0)


def _is_none(value: object) -> bool:
    return isinstance(value, str) and value.lower() == "none"  # the environment has only strings


def _optional_size(value: int | str | None, field: "attrs.Attribute[Any]") -> int | None:
    return None if value is None or _is_none(value) else _size(value, field)


def _seconds(value: float | str, field: "attrs.Attribute[Any]") -> float:
    return parse_seconds(value, field.name)


def _optional_seconds(value: float | str | None, field: "attrs.Attribute[Any]") -> float | None:
    return None if value is None or _is_none(value) else parse_seconds(value, field.name)


def _count(value: int | str, field: "attrs.Attribute[Any]") -> int:
    try:
        if not isinstance(value, bool | float):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise SettingsError(f"{field.name}={value!r} is not a whole number")


_FLAGS = {"1": True, "true": True, "yes": True, "on": True}
_FLAGS |= {"0": False, "false": False, "no": False, "off": False}


def _flag(value: bool | str, field: "attrs.Attribute[Any]") -> bool:
    known = value if isinstance(value, bool) else _FLAGS.get(str(value).lower())
    if known is None:
        raise SettingsError(f"{field.name}={value!r} is neither true nor false")
    return known


def _share(value: float | str, field: "attrs.Attribute[Any]") -> float:
    share = parse_seconds(value, field.name)
    if share > 1.0:
        raise SettingsError(f"{field.name}={value!r} is a share of the whole: 0 to 1")
    return share


def _optional_share(value: float | str | None, field: "attrs.Attribute[Any]") -> float | None:
    return None if value is None or _is_none(value) else _share(value, field)


def _optional_file(value: str | None, field: "attrs.Attribute[Any]") -> str | None:
    if value is None or _is_none(value):
        return None
    if not isinstance(value, str) or not Path(value).is_file():
        raise SettingsError(f"{field.name}={value!r} is not the path of a file")
    return value


_OPTIONAL_FILE = attrs.Converter(_optional_file, takes_field=True)
_SHARE = attrs.Converter(_share, takes_field=True)
_OPTIONAL_SHARE = attrs.Converter(_optional_share, takes_field=True)
_SIZE = attrs.Converter(_size, takes_field=True)
_OPTIONAL_SIZE = attrs.Converter(_optional_size, takes_field=True)
_SECONDS = attrs.Converter(_seconds, takes_field=True)
_OPTIONAL_SECONDS = attrs.Converter(_optional_seconds, takes_field=True)
_COUNT = attrs.Converter(_count, takes_field=True)
_FLAG = attrs.Converter(_flag, takes_field=True)


def _within(low: int, high: int = _MAX_BYTES) -> Callable[[Any, Any, int], None]:
    def check(_: object, field: "attrs.Attribute[int]", value: int) -> None:
        if not low <= value <= high:
            raise SettingsError(f"{field.name}={value} is out of range: {low} to {high}")

    return check


def _one_of(*names: str) -> Callable[[Any, Any, str], None]:
    def check(_: object, field: "attrs.Attribute[str]", value: str) -> None:
        if value not in names:
            raise SettingsError(f"{field.name}={value!r} is none of {names}")

    return check


def _positive(_: object, field: "attrs.Attribute[Any]", value: float | None) -> None:
    if value is not None and value <= 0:
        raise SettingsError(f"{field.name}={value} must be more than 0 s")


def _revocation(_: object, field: "attrs.Attribute[Any]", value: float) -> None:
    if value > _MAX_GRACE_S:
        raise SettingsError(
            f"{field.name}={value:g} is more than {_MAX_GRACE_S:g} s: each ref that is taken back waits for "
            "it. The time that `featcache serve` gives its readers at the end is shutdown_grace"
        )


def _or_environment(field: "attrs.Attribute[Any]") -> Any:
    """Return a default that is the field's variable where it is set, parsed so that an error names it."""
    variable = _ENVIRONMENT_PREFIX + field.name.upper()
    converter: Any = field.converter

    def read() -> Any:
        text = os.environ.get(variable)
        if not text:
            return field.default
        try:
            value = text if converter is None else converter.converter(text, field)
            if field.validator is not None:
                field.validator(None, field, value)
        except SettingsError as error:
            raise SettingsError(f"{variable} in the environment: {error}") from None
        return value

    return attrs.Factory(read)


def _read_environment(
    _: type, fields: "list[attrs.Attribute[Any]]"
) -> "list[attrs.Attribute[Any]]":
    """Default each field to ``FEATCACHE_<NAME>``, read when a record is made, then to its own value."""
    _VARIABLES.extend(_ENVIRONMENT_PREFIX + field.name.upper() for field in fields)
    return [field.evolve(default=_or_environment(field)) for field in fields]


_VARIABLES: list[str] = []
"""Of all the fields."""
_COMMAND_LINE: Final = frozenset(
    _ENVIRONMENT_PREFIX + name
    for name in (
        *("CONFIG", "DEVICE", "ENDPOINT", "LOG", "LOG_LEVEL", "METRICS_HOST", "METRICS_PORT"),
        *("NAME", "SHUTDOWN_GRACE", "SPILL", "LISTEN", "CLUSTER_KEY", "CLUSTER_KEY_FILE"),
        # of the plugin for SGLang
        *("SGLANG_SERVER", "SGLANG_SPILL", "SGLANG_TTL", "SGLANG_WAIT"),
    )
)
"""Of the options of ``featcache serve`` that are no settings of a pool."""
_warned: set[str] = set()
_MISSPELT: Final = 0.8
"""Likeness of a variable's name to a setting's from which it is taken for a slip of the hand."""


def _check_environment() -> None:
    """Refuse a misspelt variable; warn, once, of one that is no setting's.

    A name that is like none may be a later version's, or a program's own, and stops nothing.
    """
    for variable in os.environ:
        if not variable.startswith(_ENVIRONMENT_PREFIX) or variable in _VARIABLES:
            continue
        if variable in _COMMAND_LINE:
            continue
        name = variable.removeprefix(_ENVIRONMENT_PREFIX)
        names = [known.removeprefix(_ENVIRONMENT_PREFIX) for known in _VARIABLES]
        nearest = difflib.get_close_matches(name.upper(), names, 1, _MISSPELT)
        if nearest:
            raise SettingsError(
                f"{variable} in the environment is no setting: {_ENVIRONMENT_PREFIX}{nearest[0]} is"
            )
        if variable not in _warned:
            _warned.add(variable)
            guess = difflib.get_close_matches(name, names, 1)
            hint = f": did you mean {_ENVIRONMENT_PREFIX}{guess[0]}?" if guess else ""
            _warn(f"{variable} in the environment is no setting of this version{hint}")


def _warn(text: str) -> None:
    """Log a warning where events go: to structlog if that is configured, else to `logging`."""
    if structlog.is_configured():
        structlog.get_logger("featcache").warning(text)
    else:
        _log.warning(text)


@attrs.frozen(kw_only=True, field_transformer=_read_environment)
class Settings:
    """Sizes (bytes, or strings such as ``"512MiB"``), times (seconds) and bounds of a pool.

    A field that is not given is read from ``FEATCACHE_<FIELD>``, such as ``FEATCACHE_CAPACITY=4GiB``
    or ``FEATCACHE_TTL=none``; without that it has the default.

    Raises:
        SettingsError: a value is out of range or not of its kind, or a ``FEATCACHE_…`` variable is
            misspelt.

    """

    def __attrs_pre_init__(self) -> None:
        """Look at the environment for names that would be read by nobody."""
        _check_environment()

    capacity: int = attrs.field(default=1 << 30, converter=_SIZE, validator=_within(1))
    """Bytes that the slab may grow to."""
    segment: int = attrs.field(default=64 << 20, converter=_SIZE, validator=_within(4096))
    """Bytes committed or released at a time."""
    initial: int | None = attrs.field(default=None, converter=_OPTIONAL_SIZE)
    """Bytes committed at the start and never released; None is one segment."""
    idle: float = attrs.field(default=30.0, converter=_SECONDS)
    """Seconds that a segment at the tail stays empty before it is released."""
    prefault: bool = attrs.field(default=True, converter=_FLAG)
    """Whether host pages are touched as they are committed: a first touch costs 40 times a warm copy."""
    huge_pages: bool = attrs.field(default=True, converter=_FLAG)
    """Whether a host slab requests huge pages from the system, which may refuse."""
    slots: int = attrs.field(default=4096, converter=_COUNT, validator=_within(1, 1 << 20))
    """Features that the pool can hold at once."""
    sessions: int = attrs.field(default=64, converter=_COUNT, validator=_within(1, 4096))
    """Readers and writers that can be attached at once."""
    observers: int = attrs.field(default=8, converter=_COUNT, validator=_within(0, 256))
    """Observers that can be attached besides: they look on, and read and hold nothing."""
    waiters: int = attrs.field(default=4096, converter=_COUNT, validator=_within(0, 1 << 20))
    """Puts that may wait for others' features to be recycled; one more is `PoolFull`. Those whose room
    comes as the slab grows are not counted."""
    readers: int = attrs.field(default=1024, converter=_COUNT, validator=_within(1, 1 << 20))
    """Reads that one ref may owe."""
    tensors: int = attrs.field(default=256, converter=_COUNT, validator=_within(1, 4096))
    """Tensors that one feature may pack."""
    attachments: int = attrs.field(default=64, converter=_COUNT, validator=_within(1, 4096))
    """Pools that one client keeps open; above that the longest attached one without reads is closed."""
    ttl: float | None = attrs.field(default=300.0, converter=_OPTIONAL_SECONDS, validator=_positive)
    """Seconds until a ref with unpaid reads expires; None is never."""
    grace: float = attrs.field(default=0.001, converter=_SECONDS, validator=_revocation)
    """Seconds between a revocation and the check for sessions that still hold the bytes; at most 1."""
    recycle_interval: float = attrs.field(default=0.05, converter=_SECONDS, validator=_positive)
    """Seconds between the recycler's polls while no put waits; the safety net of its events."""
    pressure_interval: float = attrs.field(default=10.0, converter=_SECONDS, validator=_positive)
    """Seconds between pressure events while the level stays high."""
    log_interval: float = attrs.field(default=1.0, converter=_SECONDS)
    """Least seconds between two events of one busy kind (``put.waited``, level changes)."""
    wait_warning: float | None = attrs.field(
        default=5.0, converter=_OPTIONAL_SECONDS, validator=_positive
    )
    """Seconds that a put waits for room until ``put.waiting`` warns of it, once; None is never."""
    attach_timeout: float = attrs.field(default=10.0, converter=_SECONDS, validator=_positive)
    """Seconds for a handshake, on both sides."""
    reconnect_interval: float = attrs.field(default=1.0, converter=_SECONDS, validator=_positive)
    """Most seconds between two tries of a client with ``reconnect=True`` to reach a lost owner."""
    message_bytes: int = attrs.field(default=64 << 10, converter=_SIZE, validator=_within(1024))
    """Longest control message."""
    inline_bytes: int = attrs.field(default=4 << 20, converter=_SIZE, validator=_within(0))
    """Bytes above which a copy leaves the event loop for a thread (about a millisecond)."""
    rooms_ahead: int = attrs.field(default=8, converter=_COUNT, validator=_within(0, 64))
    """Slots that the owner gives a session that puts, ahead of its next puts, so that these wait for no
    answer; 0 is none. A session has at most a 32nd of the capacity ahead, all together an eighth."""
    rooms_idle: float = attrs.field(default=0.5, converter=_SECONDS)
    """Seconds after which a slot that was given ahead is taken back unused; at once if a put needs it."""
    backend: str = attrs.field(default="auto", validator=_one_of("auto", "vmm", "ipc"))
    """How a slab on a GPU is shared: ``"vmm"`` (segments by descriptor, elastic, read-only in readers),
    ``"ipc"`` (one legacy allocation of a fixed size), or ``"auto"``, the first that the device supports."""
    through_host: bool = attrs.field(default=False, converter=_FLAG)
    """Whether a client reads through host memory even where it could access the slab."""
    spill_always: bool = attrs.field(default=False, converter=_FLAG)
    """Whether every put with ``on_full="spill"`` spills, even while the slab has room."""
    grants: int = attrs.field(default=4096, converter=_COUNT, validator=_within(1, 1 << 16))
    """Reads by key that one session may hold at once."""
    when_full: str = attrs.field(default="grow", validator=_one_of("grow", "evict"))
    """First response of a full slab: ``"grow"`` up to the capacity, or ``"evict"`` features that are
    kept under keys and not read, the least recently used first."""
    eviction: str = attrs.field(default="lru", validator=_one_of("lru", "sieve"))
    """Which of these features goes first: ``"lru"`` the least recently used, ``"sieve"`` the first that
    was not used since the order came to it last."""
    evict_above: float | None = attrs.field(default=None, converter=_OPTIONAL_SHARE)
    """Share of the capacity (0 to 1) above which features are evicted before a put needs their room,
    down to `evict_to`; None evicts only for a put."""
    evict_to: float | None = attrs.field(default=None, converter=_OPTIONAL_SHARE)
    """Share of the capacity (0 to 1) down to which `evict_above` evicts; None is `evict_above` less 0.05."""
    compact: float = attrs.field(default=0.0, converter=_SHARE)
    """Share of the last segment (0 to 1) up to which idle features in it are evicted, after `idle`
    seconds, so that it can be released; 0 is never."""
    peers: int = attrs.field(default=64, converter=_COUNT, validator=_within(1, 4096))
    """Other hosts that can be connected at once, those that come in and those that are dialed each."""
    peer_timeout: float = attrs.field(default=2.0, converter=_SECONDS, validator=_positive)
    """Seconds within which another host answers, in each step; one that does not is `OwnerLost`."""
    peer_lease: float = attrs.field(default=10.0, converter=_SECONDS, validator=_positive)
    """Seconds after its last sign of life that another host's reads are kept for it; then they are paid."""
    tls_cert: str | None = attrs.field(default=None, converter=_OPTIONAL_FILE)
    """The PEM file of this host's certificate, for TLS between hosts."""
    tls_key: str | None = attrs.field(default=None, converter=_OPTIONAL_FILE)
    """The PEM file of the certificate's key."""
    tls_ca: str | None = attrs.field(default=None, converter=_OPTIONAL_FILE)
    """The PEM file of the authorities that sign the hosts' certificates."""
    relay_ttl: float = attrs.field(default=30.0, converter=_SECONDS, validator=_positive)
    """Seconds that a copy made for a read through host memory is kept for its reader."""


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
