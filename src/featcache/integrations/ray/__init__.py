"""A tensor transport for Ray actors: what a method returns goes through the slab, not the object store.

Ray 2.55 or newer (its Direct Transport, in alpha). Ray is imported when `register` is called, not before.
"""

import os

from featcache.api.endpoints import check_endpoint
from featcache.errors import SettingsError
from featcache.integrations.ray.config import NAME, Config
from featcache.settings import parse_timeout

__all__ = ["NAME", "register"]


def register(endpoint: str | None = None, *, put_timeout: float = 30.0) -> None:
    """Make the transport known to Ray, before the classes of the actors that use it.

    Actors that are created afterwards in this process get it from Ray. A module of actors that workers
    import calls it too; the second call in a process changes nothing.

    Args:
        endpoint: the socket of the owner, on the host of the actors; left out, ``FEATCACHE_ENDPOINT``.
        put_timeout: seconds that a returned object waits for room; then its task fails with PutTimeout.

    Raises:
        SettingsError: no endpoint, or not one; a timeout that is none.
        ImportError: Ray is not installed, or has no such interface.

    """
    endpoint = endpoint or os.environ.get("FEATCACHE_ENDPOINT")
    if not endpoint:
        raise SettingsError("name the owner's socket: register(endpoint), or FEATCACHE_ENDPOINT")
    check_endpoint(endpoint)
    timeout_s = parse_timeout(put_timeout)
    try:
        from featcache.integrations.ray import transport  # noqa: PLC0415 - Ray may be absent
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ImportError(
            "featcache.integrations.ray needs Ray 2.55 or newer: pip install 'featcache[ray]'"
        ) from error
    transport.register(Config(endpoint=endpoint, put_timeout_s=timeout_s))
