"""What the plugin is told by environment variables, which SGLang's child processes inherit."""

import os
import secrets
from collections.abc import Callable
from typing import Any, Final, TypeVar

import attrs

from featcache import SettingsError
from featcache.settings import parse_bytes, parse_seconds

T = TypeVar("T")

PREFIX: Final = "FEATCACHE_SGLANG_"
SERVER: Final = PREFIX + "SERVER"
"""Set by the plugin: which SGLang server a process belongs to."""
MIB: Final = 1 << 20


@attrs.frozen(kw_only=True)
class Config:
    """The plugin's settings. Times are seconds, sizes bytes.

    Raises:
        SettingsError: a variable is no number, time or size; the message names it.

    """

    endpoint: str | None
    """The socket of a ``featcache serve`` that has the slab; None: the tokenizer workers have their own."""
    server: str
    """Tells one SGLang server of this host from another."""
    wait_s: float
    """How long a put waits for room, where its caller can wait."""
    spill_bytes: int
    """The host slab for what finds no room; 0 is none."""
    ttl_s: float
    """When a feature that its ranks never asked for is given up."""

    @classmethod
    def from_environment(cls) -> "Config":
        """Return what ``FEATCACHE_ENDPOINT`` and ``FEATCACHE_SGLANG_…`` say."""
        return cls(
            endpoint=os.environ.get("FEATCACHE_ENDPOINT") or None,
            server=server_id(),
            wait_s=_read("WAIT", "0.1", parse_seconds),
            spill_bytes=_read(
                "SPILL", "512MiB", lambda text, name: parse_bytes(text, name, minimum=0)
            ),
            ttl_s=_read(
                "TTL", "1800", lambda text, name: parse_seconds(text, name, exclusive=True)
            ),
        )


def server_id() -> str:
    """Return the id of the server that this process belongs to: made once, by its first process."""
    found = os.environ.get(SERVER)
    if not found:
        found = os.environ[SERVER] = secrets.token_hex(4)
    return found


def _read(name: str, default: str, parse: Callable[[str, str], T]) -> T:
    variable = PREFIX + name
    try:
        return parse(os.environ.get(variable) or default, variable)
    except SettingsError as error:
        raise SettingsError(f"{error} (in the environment)") from None


def capacity_bytes(share_bytes: int, workers: int, budget_bytes: int, known_bytes: int) -> int:
    """Return the capacity of the one slab that all tokenizer workers share.

    SGLang gives each worker's pool a share of its budget. `known_bytes` is the budget as SGLang's module
    read it when it was imported, `budget_bytes` as the environment has it now: SGLang raises it for some
    models after that import. A share of another size was chosen by the caller, for each worker.
    """
    if share_bytes == known_bytes // workers:
        return budget_bytes
    return share_bytes * workers


def published(read: Callable[[], Any], default: T) -> T:
    """Return a value of SGLang's runtime context, or a default in a process that has published none."""
    try:
        found: T = read()
    except Exception:  # noqa: BLE001 - SGLang raises ValueError, RuntimeError or AttributeError for it
        return default
    return found
