"""Arguments of the public calls, parsed and validated."""

from typing import Any, NoReturn

import attrs
import torch

from featcache.errors import BackendUnavailable, SettingsError
from featcache.memory.devices import CPU
from featcache.memory.pack import MAX_NAME, is_name
from featcache.ref import FeatureRef
from featcache.settings import Settings
from featcache.tier import TIER_CALLS, Tier


def settings_with(given: Settings | None, **overrides: Any) -> Settings:
    """Return settings, the given ones or the environment's, changed by a call's own arguments."""
    changed = {name: value for name, value in overrides.items() if value is not None}
    if given is None:
        return Settings(**changed)
    if not isinstance(given, Settings):
        raise SettingsError(f"settings={given!r} is not a featcache.Settings")
    return attrs.evolve(given, **changed)


def parse_device(value: Any) -> torch.device:
    """Return a device that exists here, or raise SettingsError or BackendUnavailable."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f"device={value!r} is no device: 'cpu' or 'cuda:<n>'") from error
    if device.type not in {"cpu", "cuda"}:
        raise SettingsError(f"device={value!r} is not supported: 'cpu' or 'cuda:<n>'")
    if device.type == "cpu":
        if device.index:
            raise SettingsError(f"device={value!r} is no device: there is one 'cpu'")
        return CPU
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"device={value!r}, but torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def parse_name(value: Any) -> str | None:
    """Return the name of a session, or None."""
    if value is not None and not is_name(value):
        raise SettingsError(
            f"name={value!r} must be a str of 1 to {MAX_NAME} characters that UTF-8 has"
        )
    return None if value is None else str(value)


def check_tier(value: Any) -> Tier:
    """Return a tier, or raise SettingsError."""
    missing = [name for name in TIER_CALLS if not callable(getattr(value, name, None))]
    if missing or isinstance(value, type):
        raise SettingsError(
            f"tier={value!r} is no featcache.tier.Tier: it has no {', '.join(missing) or 'instance'}"
        )
    return value  # type: ignore[no-any-return]  # by its calls


def check_ref(value: Any) -> FeatureRef:
    """Return a ref, or raise SettingsError naming the way from its bytes."""
    if not isinstance(value, FeatureRef):
        raise SettingsError(
            f"expected a FeatureRef, not {type(value).__name__}: for its bytes, FeatureRef.from_bytes"
        )
    return value


def no_pickle(whole: object) -> NoReturn:
    """Raise TypeError, as pickle does, for an object that belongs to one process."""
    raise TypeError(
        f"a {type(whole).__name__} is its own process's and can't be pickled or copied: pass the "
        "owner's endpoint (cache.endpoint), and connect(endpoint) in the other process"
    )
