"""Figures in few columns."""

from typing import Final

from featcache.cli.showing import printable

_KIB: Final = 1024.0
_EXACT: Final = 100
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400
_TEN_S: Final = 10
_MILLISECOND_S: Final = 1e-3


def short_size(nbytes: float) -> str:
    """Return bytes in at most five columns: 512B, 1.5K, 20M, 1023G (powers of 1024)."""
    value = float(nbytes)
    for unit in "BKMGTP":
        if value < _KIB or unit == "P":
            few = unit != "B" and value < _EXACT and value != round(value)
            return f"{value:.1f}{unit}" if few else f"{value:.0f}{unit}"
        value /= _KIB
    raise AssertionError("the last unit takes all")


def short_age(seconds: float) -> str:
    """Return seconds in at most six columns: 3.2s, 45s, 3m12s, 2h05m, 4d03h."""
    if seconds < _TEN_S:
        return f"{max(0.0, seconds):.1f}s"
    if seconds < _MINUTE_S:
        return f"{seconds:.0f}s"
    if seconds < _HOUR_S:
        return f"{seconds // _MINUTE_S:.0f}m{seconds % _MINUTE_S // 1:02.0f}s"
    if seconds < _DAY_S:
        return f"{seconds // _HOUR_S:.0f}h{seconds % _HOUR_S // _MINUTE_S:02.0f}m"
    return f"{seconds // _DAY_S:.0f}d{seconds % _DAY_S // _HOUR_S:02.0f}h"


def short_latency(seconds: float) -> str:
    """Return what an operation took in at most five columns: 850us, 3.2ms, 45ms, 1.4s."""
    if seconds >= 1:
        return short_age(seconds)
    if seconds < _MILLISECOND_S:
        return f"{seconds * 1e6:.0f}us"
    value = seconds * 1e3
    return f"{value:.1f}ms" if value < _TEN_S else f"{value:.0f}ms"


def short_rate(per_s: float) -> str:
    """Return a rate: 0/s, 0.3/s, 1234/s, 12k/s."""
    if per_s >= _EXACT * _EXACT:
        return f"{per_s / 1000:.0f}k/s"
    return f"{per_s:.1f}/s" if 0 < per_s < _TEN_S else f"{per_s:.0f}/s"


def both(count: int, nbytes: int) -> str:
    """Return a count and bytes; nothing if there are none."""
    return f"{count} {short_size(nbytes)}" if count else "-"


def plain(text: str | None, ascii_only: bool = False) -> str:
    """Return a text of others in which nothing moves the cursor."""
    shown = printable(text or "")
    return ascii(shown)[1:-1] if ascii_only and not shown.isascii() else shown
