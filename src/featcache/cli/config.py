"""What `serve` is told: by options, else by the environment, else by a TOML file, else by default."""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from featcache import Settings, SettingsError
from featcache.settings import parse_bytes, parse_seconds

_PREFIX: Final = "FEATCACHE_"
_MAX_PORT: Final = 65535
_LOGS: Final = ("console", "json")
_LEVELS: Final = ("debug", "info", "warning", "error")


@attrs.frozen(kw_only=True)
class ServeOptions:
    """What `serve` is to do."""

    device: str = "cpu"
    endpoint: str | None = None
    name: str | None = None
    listen: str | None = None
    cluster_key_file: str | None = None
    upstream: tuple[str, ...] | None = None
    spill: int | None = None
    tier: str | None = None
    log: str = "console"
    log_level: str = "info"
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    shutdown_grace: float = 10.0
    settings: Settings


_OWN: Final = tuple(field.name for field in attrs.fields(ServeOptions) if field.name != "settings")
_SETTINGS: Final = tuple(field.name for field in attrs.fields(Settings))


def options_of(given: Mapping[str, Any], config: str | None) -> ServeOptions:
    """Return what to do; `given` are options, None where they are left out.

    Raises:
        SettingsError: a value is invalid, or the file can't be read or names no setting.

    """
    config = config or os.environ.get(_PREFIX + "CONFIG") or None
    values: dict[str, Any] = {} if config is None else _file(config)
    for name in [*_OWN, *_SETTINGS]:
        variable = _PREFIX + name.upper()
        if text := os.environ.get(variable):
            if name in _SETTINGS:
                values.pop(name, None)  # Settings reads it itself, and names it in an error
            else:
                values[name] = _parsed(name, text, f"{variable} in the environment")
    for name, value in given.items():
        if value is not None and value != ():
            option = "grace" if name == "shutdown_grace" else name.replace("_", "-")
            values[name] = _parsed(name, value, f"--{option}")
    own = {name: values.pop(name) for name in _OWN if name in values}
    return ServeOptions(**own, settings=Settings(**values))


def _file(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            read = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} is not TOML: {error}") from error
    values: dict[str, Any] = {}
    for written, value in read.items():
        name = written.replace("-", "_")
        if name not in _OWN and name not in _SETTINGS:
            raise SettingsError(f"--config {path}: {no_setting(written, [*_OWN, *_SETTINGS])}")
        values[name] = _parsed(name, value, f"--config {path}")
    return values


def no_setting(written: str, known: Iterable[str]) -> str:
    """Return what is said of a name that is none of those known."""
    near = difflib.get_close_matches(written.replace("-", "_"), known, 1)
    return f"{written} is no setting" + (f": did you mean {near[0]}?" if near else "")


def _parsed(name: str, value: Any, where: str) -> Any:
    """Return the value of an option of the command line alone; `Settings` reads its own."""
    try:
        return _value(name, value)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None


def _value(name: str, value: Any) -> Any:
    if name == "spill":
        return None if str(value).lower() == "none" else parse_bytes(value, name)
    if name == "shutdown_grace":
        return parse_seconds(value, name)
    if name == "metrics_port":
        return _port(value)
    if name in {"log", "log_level"}:
        return _one_of(name, value, _LOGS if name == "log" else _LEVELS)
    if name == "upstream":
        return _texts(name, value)
    if name in _OWN and not isinstance(value, str):
        raise SettingsError(f"{name}={value!r} is not a text")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """Return a list of a file or of options; of the environment, with commas between."""
    if isinstance(value, str):
        value = [text.strip() for text in value.split(",") if text.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise SettingsError(f"{name}={value!r} is not a list of texts")
    return tuple(value)


def _port(value: Any) -> int:
    try:
        port = int(value) if not isinstance(value, bool | float) else -1
    except (TypeError, ValueError):
        port = -1
    if not 0 <= port <= _MAX_PORT:
        raise SettingsError(f"metrics_port={value!r} is no port: 0 to {_MAX_PORT}")
    return port


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise SettingsError(f"{name}={value!r} is none of {', '.join(known)}")
    return str(value)
