"""The sizes of a pool, from its settings and its slab's granularity."""

from featcache.core.effects import Limits
from featcache.errors import SettingsError
from featcache.settings import Settings, round_up


def limits_of(
    settings: Settings,
    granularity_bytes: int,
    max_segments: int | None = None,
    capacity_bytes: int | None = None,
    initial_bytes: int | None = None,
) -> Limits:
    """Return the sizes of a pool, rounded up to its slab's granularity; SettingsError if they clash.

    A slab that can't have as many segments gets larger ones. `capacity_bytes` and
    `initial_bytes` are those of a pool whose size is not the settings'.
    """
    wanted_bytes = settings.initial if capacity_bytes is None else initial_bytes
    capacity_bytes = round_up(capacity_bytes or settings.capacity, granularity_bytes)
    segment_bytes = min(round_up(settings.segment, granularity_bytes), capacity_bytes)
    if max_segments is not None:
        least_bytes = round_up(-(-capacity_bytes // max_segments), granularity_bytes)
        segment_bytes = max(segment_bytes, least_bytes)
    if wanted_bytes is None:
        wanted_bytes = segment_bytes
    if wanted_bytes > capacity_bytes:
        raise SettingsError(f"initial={settings.initial} is more than capacity={capacity_bytes}")
    return Limits(
        capacity_bytes=capacity_bytes,
        segment_bytes=segment_bytes,
        initial_bytes=min(round_up(wanted_bytes, segment_bytes), capacity_bytes),
        slots=settings.slots,
        waiters=settings.waiters,
        grace_s=settings.grace,
        idle_s=settings.idle,
        eviction=settings.eviction,
        evict_first=settings.when_full == "evict",
        evict_above=settings.evict_above,
        evict_to=_evict_to(settings),
        compact=settings.compact,
    )


def _evict_to(settings: Settings) -> float:
    above, to = settings.evict_above, settings.evict_to
    if above is None:
        return 1.0
    if to is None:
        return max(0.0, above - 0.05)
    if to > above:
        raise SettingsError(f"evict_to={to} is more than evict_above={above}")
    return to
