"""An owner's listener, data plane and peers on other hosts; off without an address or a cluster key."""

import asyncio
from typing import NamedTuple

from featcache import events
from featcache.memory.cuda.backing import VMM
from featcache.owner.far_keys import FarKeys
from featcache.owner.far_peer import FarPeer
from featcache.owner.far_peers import FarPeers
from featcache.owner.far_reads import FarReads
from featcache.owner.home import Home
from featcache.owner.homes import Homes
from featcache.owner.key_hosts import KeyHosts
from featcache.owner.landing import Landing
from featcache.owner.registered import RegisteredSlab, memory_of
from featcache.owner.served_pool import ServedPool, take_each
from featcache.owner.upstreams import Upstreams
from featcache.reach.listener import Listener
from featcache.reach.plane import DataPlane, make_plane
from featcache.reach.rendezvous import Ranking
from featcache.reach.secret import Address, tls_contexts
from featcache.session.offload import SharedTask


class Cluster(NamedTuple):
    """What a user says of other hosts."""

    key: bytes
    listen: Address | None = None
    upstream: tuple[str, ...] = ()
    """The addresses of the homes of keys."""


class Beyond:
    """The listener, the data plane, the hosts that read here and those that are read from.

    The data plane is made when it is first needed: at once by an owner that listens, else for the first
    ref of another host.
    """

    def __init__(self, served: ServedPool, cluster: Cluster) -> None:
        self._served = served
        self._cluster = cluster
        self._settings = served.pool.settings
        self._tls = tls_contexts(self._settings)
        self._opening = SharedTask(self._register)
        self._slab: RegisteredSlab | None = None
        self._plane: DataPlane | None = None
        self._listener: Listener | None = None
        self._refusals = events.Throttle(self._settings.log_interval, burst=16)
        self._closed = False
        self.peers: FarPeers | None = None
        self.homes = Homes(served.pool, cluster.key, self._tls, self._names)
        self.landing = Landing(served, self.slab)
        self.reads = FarReads(served, self.homes, self.slab, self.landing)
        self.far_keys: FarKeys | None = None
        """What other hosts were given by key."""
        self.keys: KeyHosts | None = None
        """Keys of other hosts, of an owner with upstreams."""

    async def open(self) -> None:
        """Listen, if that was asked for; from then on refs carry the address.

        Raises:
            BackendUnavailable: the data plane is not there, or can't reach this pool's memory.
            SettingsError: the address can't be used.

        """
        listen, pool = self._cluster.listen, self._served.pool
        if listen is not None:
            slab = await self.slab()
            self.far_keys = FarKeys(self._served, slab, self.landing)
            self.peers = FarPeers(self._served, slab, self.far_keys)
            listener = self._listener = Listener(
                *(self._cluster.key, pool.pool_id, self._settings, self._tls),
                *(self.peers.on_host, self._refused),
            )
            self.peers.forget_host = listener.forget_host
            await listener.listen(listen)
            self.homes.own_address = listener.address
            pool.ref_endpoint = listener.address + pool.endpoint
        self._served.sessions.far = self.reads
        if self._cluster.upstream:
            await self._open_keys()

    async def _open_keys(self) -> None:
        """Look up keys at other hosts too."""
        await self.slab()  # a data plane that can't be had is told now
        settings, listen = self._settings, self._cluster.listen
        ranking = Ranking(self._cluster.key, self._cluster.upstream)
        upstreams = Upstreams(self.homes, ranking, settings.reconnect_interval)
        for own in (self.address, None if listen is None else str(listen)):
            if own is not None:
                upstreams.add_own(own)
        self.keys = KeyHosts(self._served, upstreams, self.slab, self.landing)
        if self.far_keys is not None:
            self._served.sources.add(self.far_keys)
        self._served.sources.add_hosts(self.keys)
        upstreams.warm()

    @property
    def address(self) -> str | None:
        """Where other hosts find this owner."""
        return None if self._listener is None else self._listener.address

    async def slab(self) -> RegisteredSlab:
        """Return the slab as the data plane has it, registered once."""
        if self._slab is None:
            self._slab = await self._opening.join()
        return self._slab

    async def _register(self) -> RegisteredSlab:
        pool = self._served.pool
        pool.check_open()
        if self._plane is None:
            loop, memory = asyncio.get_running_loop(), memory_of(pool.slab)
            name, by_segments = f"featcache-{pool.name}", pool.slab.kind == VMM
            self._plane = make_plane(name, loop, memory, by_segments=by_segments)
        slab = RegisteredSlab(pool, self._plane)
        await slab.open()
        return slab

    def counts(self) -> dict[str, int]:
        """Return its counters, by their names in `Statistics`."""
        return {
            "fetched": self.reads.fetched,
            "fetched_bytes": self.reads.fetched_bytes,
            "fetches_failed": self.reads.failed,
            "told": 0 if self.peers is None else self.peers.told,
            "told_bytes": 0 if self.peers is None else self.peers.told_bytes,
            "hosts_lost": 0 if self.peers is None else self.peers.lost,
            "keys_fetched": 0 if self.keys is None else self.keys.fetched,
            "keys_offered": 0 if self.keys is None else self.keys.offers.taken,
            "claims_passed": 0 if self.far_keys is None else self.far_keys.passed,
        }

    @property
    def lease_s(self) -> float:
        """For how long a host that reads here is kept after it was heard last."""
        return self._settings.peer_lease

    def homes_known(self) -> list[Home]:
        """Return the homes of which there is a record. Safe in any thread."""
        return self.homes.known

    def hosts_known(self) -> list[FarPeer]:
        """Return the hosts that read here, with the last that were lost. Safe in any thread."""
        return [] if self.peers is None else self.peers.known

    def _names(self) -> list[str]:
        pages = self._served.pool.pages.values()
        return sorted({page.name for page in pages if page.name is not None})

    def _refused(self, where: str, reason: str) -> None:
        unlogged = self._refusals.pass_(asyncio.get_running_loop().time())
        if unlogged is not None:
            pool, told = self._served.pool.name, f"{where}: {reason}"
            events.emit(events.PeerRefused(pool=pool, reason=told, pid=0, unlogged=unlogged))

    async def close(self) -> None:
        """End it, before the pool's memory goes: no other host may read it, no read land in it."""
        if self._closed:
            return
        self._closed = True
        listener, peers = self._listener, self.peers
        keys = () if self.keys is None else (self.keys.close,)
        await take_each(
            self._served.sources.close,
            *keys,
            *(() if listener is None else (listener.close,)),
            *(() if peers is None else (peers.close,)),
            self.reads.close,
            self.homes.close,
            self._close_plane,
        )
        self._served.sessions.far = None

    async def _close_plane(self) -> None:
        if self._opening.task is not None:
            await asyncio.wait([self._opening.task])
        if self._slab is not None:
            await self._slab.drain()
        if self._plane is not None:
            await self._plane.close()

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self.homes.forget()
        if self._plane is not None:
            self._plane.forget()
        if self._listener is not None:
            self._listener.forget()
