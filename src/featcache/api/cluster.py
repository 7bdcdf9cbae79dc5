"""The cluster arguments of `create` and of the command line."""

from collections.abc import Iterable
from os import PathLike

from featcache.errors import SettingsError
from featcache.owner.beyond import Cluster
from featcache.reach.secret import (
    KEY_VARIABLE,
    WILDCARDS,
    key_from_environment,
    parse_address,
    parse_key,
    read_key,
)

__all__ = ["parse_cluster", "read_key"]


def parse_cluster(
    listen: object, cluster_key: str | bytes | PathLike[str] | None, upstream: object, most: int
) -> Cluster | None:
    """Return an owner's checked cluster arguments; None without a key or an address.

    `most` upstreams can be given.
    """
    key = key_from_environment() if cluster_key is None else parse_key(cluster_key)
    address = None if listen is None else parse_address(listen)
    addresses = parse_upstream(upstream, most)
    for name, value in (("listen", listen), ("upstream", addresses)):
        if value and key is None:
            raise SettingsError(
                f"{name}={value!r} needs the key of the cluster: cluster_key, {KEY_VARIABLE}, or "
                "--cluster-key-file of featcache serve"
            )
    return None if key is None else Cluster(key, address, addresses)


def parse_upstream(upstream: object, most: int) -> tuple[str, ...]:
    """Return addresses as refs carry them; none for None."""
    if upstream is None:
        return ()
    if isinstance(upstream, str) or not isinstance(upstream, Iterable):
        raise SettingsError(f"upstream={upstream!r} is not a list of addresses, 'HOST:PORT' each")
    addresses = tuple(str(parse_address(each, "upstream")) for each in upstream)
    if len(addresses) > most:
        raise SettingsError(f"{len(addresses)} upstreams: Settings.peers is {most}")
    for each in addresses:
        if each.endswith(":0"):
            raise SettingsError(f"upstream={each!r}: port 0 is no host's")
        if parse_address(each).host in WILDCARDS:
            raise SettingsError(f"upstream={each!r} is no host's: name it as the other hosts do")
    return addresses
