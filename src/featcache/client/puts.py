"""A client's puts into the pool that it is connected to, and into the one beside it that takes spills."""

from typing import Any

from featcache.client.connection import PoolConnection
from featcache.client.registry import ConnectionRegistry
from featcache.client.uploader import Uploader
from featcache.client.writer import ClientWriter
from featcache.control import messages
from featcache.control.messages import ProtocolError
from featcache.errors import FeatureTooLarge, PoolFull, SettingsError
from featcache.memory.unreachable import UnreachableSlab
from featcache.ref import FeatureRef
from featcache.session.arguments import check_on_full
from featcache.session.offload import Offload
from featcache.session.staging import SpillCounter, Staged
from featcache.settings import Settings

Writes = ClientWriter | Uploader
Places = tuple[Writes | None, Writes | None]
Placed = tuple[Writes, Staged]
StagedPut = tuple[Placed | None, Placed | None]
"""A put for the slab, and the same for the host slab where it may go there: at least one of them."""


class ClientPuts:
    """Finds the writer of a put, and spills what may."""

    def __init__(self, registry: ConnectionRegistry, settings: Settings, offload: Offload) -> None:
        self._registry = registry
        self._settings = settings
        self._offload = offload
        self._writers: dict[bytes, Writes] = {}
        self._puts = 0  # of writers that are gone
        self.spills = SpillCounter(settings.log_interval)
        registry.on_gone = self._drop

    def _drop(self, pool_id: bytes) -> None:
        """Let go of a pool's writer: its handle keeps the words mapped."""
        writer = self._writers.pop(pool_id, None)
        if writer is not None:
            self._puts += writer.puts

    @property
    def puts(self) -> int:
        """Features that this client published."""
        return self._puts + sum(writer.puts for writer in self._writers.values())

    def _known(self, connection: PoolConnection) -> Writes | None:
        """Return the writer of a pool, if it has one that still fits."""
        writer = self._writers.get(connection.attachment.pool_id)
        unmapped = isinstance(connection.attachment.mapping, UnreachableSlab)
        if (
            writer is not None
            and writer.connection is connection
            and isinstance(writer, Uploader) is unmapped
            and (
                not isinstance(writer, Uploader)
                or writer.beside.connection in self._registry.connections
            )
        ):
            return writer
        return None

    async def _writer(self, connection: PoolConnection) -> Writes:
        """Return the writer of a pool; where the slab is out of reach, one that goes through the host."""
        writer = self._known(connection)
        if writer is not None:
            return writer
        pool_id = connection.attachment.pool_id
        made: Writes
        if isinstance(connection.attachment.mapping, UnreachableSlab):
            made = Uploader(connection, await self._beside(connection), self._settings)
        else:
            made = ClientWriter(connection, self._settings, self._offload)
        self._drop(pool_id)
        self._writers[pool_id] = made
        return made

    async def _beside(self, connection: PoolConnection) -> ClientWriter:
        answer, _ = await connection.link.request(messages.HostPool(connection.link.number()))
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a question with {type(answer).__name__}")
        beside = await self._registry.attach(answer.text, kin=True)
        return ClientWriter(beside, self._settings, self._offload)

    async def places(self, on_full: str, key: Any) -> Places:
        """Return the writers of the slab and of the host slab, of where a put may go; attach them."""
        check_on_full(on_full)
        connection = self._registry.peek_bound() or await self._registry.bound_handle()
        here = self._known(connection) or await self._writer(connection)
        if on_full != "spill":
            return here, None
        if key is not None:
            raise SettingsError("what is kept under a key makes its own room: it does not spill")
        if not connection.kin_endpoint:
            raise SettingsError("on_full='spill' needs a host slab: create(…, spill='2GiB')")
        there = await self._writer(await self._registry.attach(connection.kin_endpoint, kin=True))
        return (None if self._settings.spill_always else here), there

    def stage(self, places: Places, feature: Any, readers: Any, ttl: Any, key: Any) -> StagedPut:
        """Return what a put asks for; in the caller's thread."""
        here, there = (
            None if writer is None else (writer, writer.stage(feature, readers, ttl, key))
            for writer in places
        )
        return here, there

    async def put(self, staged: StagedPut, timeout_s: float | None, on_full: str) -> FeatureRef:
        """Put into the slab; if it is full and that was asked for, into the host slab."""
        here, there = staged
        if here is not None:
            writer, put = here
            try:
                return await writer.put(put, timeout_s, wait=on_full == "wait")
            except (PoolFull, FeatureTooLarge):
                if there is None:
                    raise
        assert there is not None, "a put goes somewhere"
        ref = await there[0].put(there[1], timeout_s, wait=True)
        self.spills.add(self._registry.bound_pool.hex(), ref)
        return ref
