"""The cluster arguments of `create` and of the command line."""

from featcache.errors import SettingsError
from featcache.owner.beyond import Cluster
from featcache.reach.secret import (
    KEY_VARIABLE,
    key_from_environment,
    parse_address,
    parse_key,
    read_key,
)

__all__ = ["parse_cluster", "read_key"]


def parse_cluster(listen: object, cluster_key: str | bytes | None) -> Cluster | None:
    """Return an owner's checked cluster arguments; None without a key or an address."""
    key = key_from_environment() if cluster_key is None else parse_key(cluster_key)
    if listen is None:
        return None if key is None else Cluster(key)
    address = parse_address(listen)
    if key is None:
        raise SettingsError(
            f"listen={listen!r} needs the key of the cluster: cluster_key, or {KEY_VARIABLE}"
        )
    return Cluster(key, address)
