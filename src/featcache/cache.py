"""`create` and `connect`: from what a user says to an object ready to be opened."""

from typing import Any

import attrs

from featcache.control import endpoint as endpoints
from featcache.errors import SettingsError
from featcache.feature_cache import FeatureCache
from featcache.feature_client import FeatureClient
from featcache.memory.host import HostSlab
from featcache.reads import parse_device, parse_name
from featcache.serving import limits_of
from featcache.settings import Settings, parse_bytes

__all__ = ["FeatureCache", "FeatureClient", "connect", "create"]


def _settings(given: Settings | None, **overrides: Any) -> Settings:
    changed = {name: value for name, value in overrides.items() if value is not None}
    if given is None:
        return Settings(**changed)
    if not isinstance(given, Settings):
        raise SettingsError(f"settings={given!r} is not a featcache.Settings")
    return attrs.evolve(given, **changed)


def create(
    *,
    device: Any = "cpu",
    capacity: int | str | None = None,
    endpoint: str | None = None,
    name: str | None = None,
    spill: int | str | None = None,
    settings: Settings | None = None,
    initial: int | str | None = None,
    segment: int | str | None = None,
    idle: float | None = None,
) -> FeatureCache:
    """Return a cache to be opened with ``async with``: this process will own its slab.

    Args:
        device: where the slab is: ``"cpu"``, or a GPU such as ``"cuda:0"`` (which needs cuda-bindings).
        capacity: bytes the slab may grow to (or ``"512MiB"``); 1 GiB if neither this, `settings` nor
            ``FEATCACHE_CAPACITY`` says otherwise.
        endpoint: the path of the Unix socket to listen at; None makes one that only this user can
            reach.
        name: the name under which the owner itself owes reads (``readers=[name, …]``).
        spill: bytes of a second slab in host memory, which ``put(on_full="spill")`` uses when this one
            is full; pinned if this one is on a GPU.
        settings: everything else; without it, the environment's ``FEATCACHE_…``.
        initial: bytes committed from the beginning; ``initial=capacity`` fails at the start rather
            than under load. One segment by default.
        segment: bytes committed and given back at a time, 64 MiB by default.
        idle: seconds an empty tail is kept, 30 by default.

    Raises:
        SettingsError: an argument makes no sense.
        BackendUnavailable: the device is not there.

    """
    target = parse_device(device)
    chosen = _settings(settings, capacity=capacity, initial=initial, segment=segment, idle=idle)
    limits_of(chosen, HostSlab.granularity_bytes)  # says now what makes no sense
    spill_bytes = None if spill is None else parse_bytes(spill, "spill")
    path = None if endpoint is None else endpoints.check_endpoint(endpoint)
    return FeatureCache(target, chosen, path, parse_name(name), spill_bytes)


def connect(
    endpoint: str | None = None,
    *,
    device: Any = None,
    name: str | None = None,
    settings: Settings | None = None,
) -> FeatureClient:
    """Return a client to be opened with ``async with``.

    Args:
        endpoint: an owner's `FeatureCache.endpoint`; the client then reads that pool only, and can
            put into it and use its keys. None attaches to a pool when it first meets a ref of it.
        device: where `get` puts its copies, and the GPU that maps a slab on a GPU; None is the pool's
            own device where it is visible here, else torch's current one.
        name: the name by which puts may call for this session's reads; one session at a time has it.
        settings: bounds and intervals; without it, the environment's ``FEATCACHE_…``.

    Raises:
        SettingsError: an argument makes no sense.
        BackendUnavailable: the device is not there.

    """
    target = None if device is None else parse_device(device)
    path = None if endpoint is None else endpoints.check_endpoint(endpoint)
    return FeatureClient(path, target, parse_name(name), _settings(settings))
