"""Owners as on two hosts, in one loop, over real TCP and a fake data plane."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import featcache
from featcache import FeatureCache, FeatureClient
from support.caches import small
from support.fakeplane import FakePlane

KEY = "a key of the cluster, for tests"


class Hosts(NamedTuple):
    """The owner whose refs are read, and the other host: its owner, and a client of that."""

    home: FeatureCache
    reader: FeatureCache
    client: FeatureClient

    @property
    def home_plane(self) -> FakePlane:
        return plane_of(self.home)

    @property
    def reader_plane(self) -> FakePlane:
        return plane_of(self.reader)


def plane_of(owner: FeatureCache) -> FakePlane:
    """The fake plane of an owner that has needed one."""
    return FakePlane.planes[f"featcache-{owner._opened().pool.name}"]


def quick(**changes: Any) -> featcache.Settings:
    """Settings of an owner whose peers are soon given up."""
    return small(**({"peer_timeout": 0.4, "peer_lease": 1.0} | changes))


def listening(**changes: Any) -> FeatureCache:
    """An owner that listens to other hosts."""
    return featcache.create(settings=quick(**changes), listen="127.0.0.1:0", cluster_key=KEY)


@contextlib.asynccontextmanager
async def hosts(*, name: str | None = None, **changes: Any) -> AsyncIterator[Hosts]:
    """Two hosts. The reader has the changed settings."""
    async with (
        listening() as home,
        featcache.create(settings=quick(**changes), cluster_key=KEY) as reader,
        featcache.connect(reader.endpoint, name=name) as client,
    ):
        yield Hosts(home, reader, client)


@contextlib.asynccontextmanager
async def clients_of(owner: FeatureCache, count: int) -> AsyncIterator[list[FeatureClient]]:
    """More clients of an owner."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(featcache.connect(owner.endpoint)) for _ in range(count)
        ]
