"""A client's puts where its device can't access the slab: staged through the owner's host pool."""

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from featcache.client.connection import PoolConnection
from featcache.client.deadlines import left, within
from featcache.client.puts_here import wire_form
from featcache.client.writer import ClientWriter
from featcache.control import messages
from featcache.control.messages import ProtocolError
from featcache.core.put_queue import Request
from featcache.errors import at_member
from featcache.ref import FeatureRef
from featcache.session.staging import InLoop, Staged
from featcache.settings import Settings


class Uploader:
    """As `ClientWriter`, over the writer of the host pool beside the connection's pool."""

    def __init__(
        self, connection: PoolConnection, host_pool: ClientWriter, settings: Settings
    ) -> None:
        self.connection = connection
        self.host_pool = host_pool
        self._settings = settings
        self.puts = 0

    def stage(self, feature: Any, readers: Any, ttl: Any, key: Any = None) -> Staged:
        """Validate a put in the caller's thread."""
        return self.host_pool.stage(feature, readers, ttl, key)

    async def put(self, staged: Staged, timeout_s: float | None, *, wait: bool) -> FeatureRef:
        """Copy a feature in and return its ref, as `ClientWriter.put`."""
        if timeout_s is None:
            return await self._put(staged, timeout_s, None, wait=wait)
        return await within(
            timeout_s,
            wait,
            staged.request.nbytes,
            lambda waits, deadline_s: self._put(staged, timeout_s, deadline_s, wait=waits),
        )

    @property
    def published(self) -> int:
        """Features that were put here."""
        return self.puts

    puts_here = False

    def put_here(self, staged: Staged, in_loop: InLoop) -> FeatureRef | None:
        """Return None: its puts are all the loop's."""

    stages_at_call = False
    """What goes through host memory is copied there by the CPU."""

    async def put_many(
        self, staged: Sequence[Staged], timeout_s: float | None, *, wait: bool
    ) -> list[FeatureRef]:
        """Put one after the other; if one fails, those before it are taken back."""
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        refs: list[FeatureRef] = []
        try:
            for each in staged:
                # 0 has a time of its own, so what is left of another is never 0.
                left_s = left(give_up_s) if give_up_s is not None and timeout_s else timeout_s
                refs.append(await self.put(each, left_s, wait=wait))
        except BaseException as error:
            link = self.connection.link
            for ref in refs:  # its key too, unless another has put there since
                link.undo_soon(ref.slot, ref.generation)
            at_member(error, len(refs))
            raise
        return refs

    async def _put(
        self, staged: Staged, timeout_s: float | None, deadline_s: float | None, *, wait: bool
    ) -> FeatureRef:
        left_s = None if deadline_s is None else left(deadline_s)
        in_host = Request(staged.request.nbytes, 1, self._settings.relay_ttl)
        ref = await self.host_pool.put(
            msgspec.structs.replace(staged, request=in_host),
            0.0 if timeout_s == 0 else left_s,
            wait=True,
        )
        try:
            return await self._upload(ref, staged.request, deadline_s, wait=wait)
        except BaseException:
            # The owner's copy pins it for as long as that goes on.
            self.host_pool.connection.link.discard_soon(ref.slot, ref.generation)
            raise

    async def _upload(
        self, ref: FeatureRef, request: Request, deadline_s: float | None, *, wait: bool
    ) -> FeatureRef:
        link, left_s = self.connection.link, None if deadline_s is None else left(deadline_s)
        answer, _ = await link.request(
            messages.Upload(*(link.number(), *wire_form(request), wait, ref.to_bytes(), left_s))
        )
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a put with {type(answer).__name__}")
        self.puts += 1
        return FeatureRef.from_bytes(answer.ref)
