"""The writers of a client: for the pool that it is bound to, and for the spill pool beside it."""

from typing import Any

from featcache.client.connection import PoolConnection
from featcache.client.registry import ConnectionRegistry
from featcache.client.uploader import Uploader
from featcache.client.writer import ClientWriter
from featcache.control import messages
from featcache.control.messages import ProtocolError
from featcache.errors import SettingsError
from featcache.memory.unreachable import UnreachableSlab
from featcache.session.arguments import check_on_full
from featcache.session.offload import Offload
from featcache.session.staging import Writers
from featcache.settings import Settings

PoolWriter = ClientWriter | Uploader


class ClientPuts:
    """Finds or makes the writers of a put."""

    def __init__(self, registry: ConnectionRegistry, settings: Settings, offload: Offload) -> None:
        self._registry = registry
        self._settings = settings
        self._offload = offload
        self._writers: dict[bytes, PoolWriter] = {}
        self._puts = 0  # of writers that are gone
        registry.on_gone.append(self._drop)

    def _drop(self, pool_id: bytes) -> None:
        """Drop a pool's writer, whose connection keeps the words mapped."""
        writer = self._writers.pop(pool_id, None)
        if writer is not None:
            self._puts += writer.published

    @property
    def puts(self) -> int:
        """Features that this client published."""
        return self._puts + sum(writer.published for writer in self._writers.values())

    def _known(self, connection: PoolConnection) -> PoolWriter | None:
        """Return the writer of a pool, if it has one that still fits."""
        writer = self._writers.get(connection.attachment.pool_id)
        if writer is None or writer.connection is not connection:
            return None
        unreachable = isinstance(connection.attachment.mapping, UnreachableSlab)
        if not isinstance(writer, Uploader):
            return None if unreachable else writer
        return (
            writer if unreachable and self._registry.is_open(writer.host_pool.connection) else None
        )

    async def _writer(self, connection: PoolConnection) -> PoolWriter:
        """Return the writer of a pool; one that stages through host memory if the slab is unreachable."""
        writer = self._known(connection)
        if writer is not None:
            return writer
        pool_id = connection.attachment.pool_id
        made: PoolWriter
        if isinstance(connection.attachment.mapping, UnreachableSlab):
            host_pool = await self._host_pool(connection)
            if (writer := self._known(connection)) is not None:  # made meanwhile, for another put
                return writer
            made = Uploader(connection, host_pool, self._settings)
        else:
            made = ClientWriter(connection, self._settings, self._offload)
        self._drop(pool_id)
        self._writers[pool_id] = made
        return made

    async def _host_pool(self, connection: PoolConnection) -> ClientWriter:
        link = connection.link
        answer, _ = await link.request(messages.HostPool(link.number()))
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a question with {type(answer).__name__}")
        host = await self._registry.attach(answer.text, sibling=True)
        return ClientWriter(host, self._settings, self._offload)

    def bound_writer(self) -> PoolWriter | None:
        """Return the writer of the pool that the client is bound to, if it has one."""
        connection = self._registry.peek_bound()
        return None if connection is None else self._known(connection)

    async def writers(self, on_full: str, key: Any) -> Writers:
        """Return the writers of the pools that a put may go to, attaching first.

        Raises:
            SettingsError: no such policy, or none that this pool or a keyed put can have.
            OwnerLost, CacheClosed: there is no owner, or no client any more.

        """
        check_on_full(on_full, None)
        connection = self._registry.peek_bound() or await self._registry.bound()
        slab = await self._writer(connection)
        if on_full != "spill":
            return Writers(slab)
        check_on_full(on_full, key)
        if not connection.spill_endpoint:
            raise SettingsError("on_full='spill' needs a host slab: create(…, spill='2GiB')")
        sibling = await self._registry.attach(connection.spill_endpoint, sibling=True)
        return Writers(None if self._settings.spill_always else slab, await self._writer(sibling))
