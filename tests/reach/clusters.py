"""Owners of one cluster, as on hosts of their own, in one loop, over real TCP and a fake data plane."""

import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import featcache
from featcache import FeatureCache
from featcache.reach.rendezvous import Ranking
from reach.hosts import KEY, quick

PATIENT = {"peer_timeout": 1.0, "peer_lease": 3.0, "reconnect_interval": 0.1}


def free_addresses(count: int) -> list[str]:
    """Addresses of this machine that nobody listens at."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            held = stack.enter_context(socket.socket())
            held.bind(("127.0.0.1", 0))
            found.append(f"127.0.0.1:{held.getsockname()[1]}")
        return found


def owner_of(upstream: Sequence[str], listen: str | None = None, **changes: Any) -> FeatureCache:
    """An owner with upstreams."""
    settings = quick(**(PATIENT | changes))
    return featcache.create(settings=settings, listen=listen, upstream=upstream, cluster_key=KEY)


@contextlib.asynccontextmanager
async def cluster(homes: int, readers: int, **changes: Any) -> AsyncIterator[list[FeatureCache]]:
    """Owners of which the first are the homes of keys."""
    addresses = free_addresses(homes)
    async with contextlib.AsyncExitStack() as stack:
        listens: list[str | None] = [*addresses, *[None] * readers]
        yield [
            await stack.enter_async_context(owner_of(addresses, listen, **changes))
            for listen in listens
        ]


def key_at(owners: Sequence[FeatureCache], home: int, n: int = 0) -> str:
    """A key whose home is this one of the owners, another for each n."""
    addresses = [str(owner.address) for owner in owners if owner.address is not None]
    ranking = Ranking(KEY.encode(), addresses)
    fitting = (
        f"key {n}.{tried}"
        for tried in range(1000)
        if ranking.of(f"key {n}.{tried}".encode())[0] == addresses[home]
    )
    return next(fitting)
