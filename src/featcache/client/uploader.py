"""A client's puts where its device can't access the slab: into host memory, from where the owner copies."""

from typing import Any

import anyio
import msgspec

from featcache.client.connection import PoolConnection
from featcache.client.writer import ClientWriter, wire_form
from featcache.control import messages
from featcache.control.messages import ProtocolError
from featcache.core.put_queue import Request
from featcache.errors import PoolFull, PutTimeout
from featcache.ref import FeatureRef
from featcache.session.arguments import NOWAIT_RPC_TIMEOUT_S
from featcache.session.staging import Staged
from featcache.settings import Settings


class Uploader:
    """As `ClientWriter`, by way of the writer of the pool on the host beside the one of `handle`."""

    def __init__(
        self, connection: PoolConnection, beside: ClientWriter, settings: Settings
    ) -> None:
        self.connection = connection
        self.beside = beside
        self._settings = settings
        self.puts = 0

    def stage(self, feature: Any, readers: Any, ttl: Any, key: Any) -> Staged:
        """Return what a put asks for, in the caller's thread."""
        return self.beside.stage(feature, readers, ttl, key)

    async def put(self, staged: Staged, timeout_s: float | None, *, wait: bool) -> FeatureRef:
        """Copy a feature in and return its ref, as `ClientWriter.put`."""
        request = staged.request
        there = Request(request.nbytes, 1, self._settings.relay_ttl)
        at_once = timeout_s == 0  # as in `ClientWriter.put`
        try:
            with anyio.fail_after(NOWAIT_RPC_TIMEOUT_S if at_once else timeout_s):
                ref = await self.beside.put(
                    msgspec.structs.replace(staged, request=there),
                    timeout_s if at_once else None,
                    wait=True,
                )
                try:
                    return await self._upload(ref, request, wait=wait and not at_once)
                except BaseException:
                    # Held by the owner's copy as long as that goes on.
                    self.beside.connection.link.discard_soon(ref.slot, ref.generation)
                    raise
        except PoolFull as full:
            if not (at_once and wait):
                raise
            raise PutTimeout(f"{full}, within {timeout_s} s") from None
        except TimeoutError:
            raise PutTimeout(f"no room for {request.nbytes} bytes within {timeout_s} s") from None

    async def _upload(self, ref: FeatureRef, request: Request, *, wait: bool) -> FeatureRef:
        link = self.connection.link
        answer, _ = await link.request(
            messages.Upload(link.number(), *wire_form(request), wait, ref.to_bytes())
        )
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a put with {type(answer).__name__}")
        self.puts += 1
        return FeatureRef.from_bytes(answer.ref)
