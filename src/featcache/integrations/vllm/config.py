"""What ``ec_connector_extra_config`` may say."""

from collections.abc import Mapping
from typing import Any, Final

import attrs

from featcache import SettingsError
from featcache.api.endpoints import check_endpoint

_BOUNDS: Final = {
    "peer_wait": (0.0, 600.0),
    "save_queue": (1, 4096),
    "connect_wait": (0.0, 60.0),
}


@attrs.frozen(kw_only=True)
class ConnectorConfig:
    """``ec_connector_extra_config``, checked. Times are seconds."""

    endpoint: str
    """The socket of the owner: what `featcache serve` was given, or printed."""
    namespace: str = ""
    """Part of every key: engines that are to share nothing have different ones."""
    peer_wait: float = 5.0
    """How long a request waits for what another engine encodes now, before it is encoded here. 0: not."""
    save_queue: int = 64
    """Encoder outputs of a worker that wait to be saved; more are not saved."""
    connect_wait: float = 5.0
    """How long the start of an engine waits for the owner before it goes on without."""


def parse(extra: Any) -> ConnectorConfig:
    """Return the checked ``ec_connector_extra_config``.

    Raises:
        SettingsError: in one line, what is wrong and what is known.

    """
    if not isinstance(extra, Mapping):
        raise _wrong(f"it is a table of settings, not {type(extra).__name__}")
    known = [field.name for field in attrs.fields(ConnectorConfig)]
    for name in extra:
        if name not in known:
            raise _wrong(f"{name!r} is not known: it takes {', '.join(known)}")
    if "endpoint" not in extra:
        raise _wrong("'endpoint' is missing: the socket of `featcache serve`")
    return ConnectorConfig(**{name: _checked(name, extra[name]) for name in extra})


def _checked(name: str, value: Any) -> Any:
    bounds = _BOUNDS.get(name)
    if bounds is None:
        if not isinstance(value, str) or (name == "endpoint" and not value):
            raise _wrong(f"{name!r} is a string, not {value!r}")
        if name == "endpoint":
            try:
                check_endpoint(value)
            except SettingsError as error:
                raise _wrong(str(error)) from None
        return value
    low, high = bounds
    whole = isinstance(low, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise _wrong(f"{name!r} is {'a whole number' if whole else 'a number'}, not {value!r}")
    if not low <= value <= high:
        raise _wrong(f"{name!r} is between {low} and {high}, not {value!r}")
    return value if whole else float(value)


def _wrong(what: str) -> SettingsError:
    return SettingsError(f"ec_connector_extra_config of FeatcacheECConnector: {what}")
