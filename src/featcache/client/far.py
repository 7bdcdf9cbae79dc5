"""A client's refs of other hosts, which the owner that it is connected to reaches for it."""

from typing import Literal

from featcache.client.connection import PoolConnection
from featcache.control.far import Bring, EndFar
from featcache.control.messages import ProtocolError, Reply
from featcache.ref import FeatureRef


class FarPools:
    """The part of a `ConnectionRegistry` that knows pools of other hosts."""

    bound_pool: bytes
    _lost_pools: dict[bytes, str]

    def peek_bound(self) -> PoolConnection | None:
        """Return the connection of the pool that this client is connected to."""
        raise NotImplementedError

    async def bound(self) -> PoolConnection:
        """As `peek_bound`, attaching first."""
        raise NotImplementedError

    def is_far(self, ref: FeatureRef) -> bool:
        """Whether a ref may be of another host, which the owner here is to reach, if it reaches any."""
        if ref.endpoint.startswith("/") or not ref.address or ref.pool_id == self.bound_pool:
            return False
        return self.peek_bound() is not None and ref.pool_id not in self._lost_pools

    async def bring(self, ref: FeatureRef) -> FeatureRef:
        """Have another host's feature fetched; return the ref of it here."""
        link = (self.peek_bound() or await self.bound()).link
        answer, _ = await link.request(Bring(link.number(), ref.to_bytes()))
        if not isinstance(answer, Reply):
            raise ProtocolError(f"the owner answered a fetch with {type(answer).__name__}")
        return FeatureRef.from_bytes(answer.ref)

    async def end_far(
        self, ref: FeatureRef, command: Literal["release", "discard"]
    ) -> FeatureRef | None:
        """Have a read paid, or all discarded; return the ref here that is to be paid instead, if any."""
        link = (self.peek_bound() or await self.bound()).link
        answer, _ = await link.request(EndFar(link.number(), ref.to_bytes(), command))
        if not isinstance(answer, Reply):
            raise ProtocolError(f"the owner answered a release with {type(answer).__name__}")
        return FeatureRef.from_bytes(answer.ref) if answer.ref else None
