"""A client's puts: room from the owner's one queue, the bytes written here, then told to the owner.

Two round trips: `Reserve`, then `Publish`. Between them the slot is this session's alone. The bytes go
into a mapping of the slab that can be written, apart from the one that views are lent from. A word in
the session's page, stored behind the copy, says that they have landed.
"""

import asyncio
from typing import Any

import anyio

from featcache.client.connection import PoolConnection
from featcache.control import messages
from featcache.control.channel import close_all
from featcache.control.messages import ProtocolError, Reserved
from featcache.core.put_queue import Request
from featcache.errors import BackendUnavailable, FeatcacheError, PoolFull, PutTimeout
from featcache.ref import FeatureRef
from featcache.session.arguments import NOWAIT_RPC_TIMEOUT_S, parse_put
from featcache.session.offload import Offload
from featcache.session.staging import Staged
from featcache.settings import Settings


def wire_form(
    request: Request,
) -> tuple[int, int | list[str], float | None, bytes | None]:
    """Return what a put asks for as `messages.Room` says it, between its number and `waits`."""
    readers = request.readers
    owed = readers if isinstance(readers, int) else sorted(readers)
    return request.nbytes, owed, request.ttl_s, request.key


class ClientWriter:
    """Puts into the pool of one handle."""

    def __init__(self, connection: PoolConnection, settings: Settings, offload: Offload) -> None:
        self.connection = connection
        self._settings = settings
        self._offload = offload
        self._opening: asyncio.Task[None] | None = None
        self.puts = 0

    def stage(self, feature: Any, readers: Any, ttl: Any, key: Any) -> Staged:
        """Return what a put asks for, in the caller's thread.

        Raises:
            SettingsError: an argument makes no sense.
            BackendUnavailable: this client's device can't access the slab.

        """
        request, specs, packed = parse_put(feature, readers, ttl, key, self._settings)
        parts, order = self.connection.attachment.mapping.stage(packed)
        return Staged(request, specs, parts, order)

    async def put(self, staged: Staged, timeout_s: float | None, *, wait: bool) -> FeatureRef:
        """Copy a feature in and return its ref.

        Raises:
            FeatureTooLarge, PoolFull, PutTimeout, OwnerLost: as `FeatureClient.put`.

        """
        self.connection.attachment.check()
        at_once = timeout_s == 0  # not to wait: round trips take longer, and are no wait
        try:
            if timeout_s is None:  # a scope takes as long as a third of a round trip
                reserved = await self._reserve(staged.request, wait=wait)
            else:
                with anyio.fail_after(NOWAIT_RPC_TIMEOUT_S if at_once else timeout_s):
                    reserved = await self._reserve(staged.request, wait=wait and not at_once)
        except PoolFull as full:
            if not (at_once and wait):
                raise
            raise PutTimeout(f"{full}, within {timeout_s} s") from None
        except TimeoutError:
            raise PutTimeout(
                f"no room for {staged.request.nbytes} bytes within {timeout_s} s"
            ) from None
        return await self._fill(reserved, staged)

    async def _reserve(self, request: Request, *, wait: bool) -> Reserved:
        if not self.connection.attachment.mapping.writable:
            await self._open()
            self.connection.attachment.check()  # it may have been closed meanwhile
        link = self.connection.link
        answer, _ = await link.request(messages.Reserve(link.number(), *wire_form(request), wait))
        if not isinstance(answer, Reserved):
            raise ProtocolError(f"the owner answered a put with {type(answer).__name__}")
        return answer

    async def _fill(self, reserved: Reserved, staged: Staged) -> FeatureRef:
        """Write a slot that is this session's, and publish it; give it up if that fails."""
        attachment, parts, order = self.connection.attachment, staged.parts, staged.order
        mapping, at = attachment.mapping, reserved.offset_bytes
        try:
            nbytes = staged.request.nbytes
            attachment.begin_write(reserved.slot, reserved.generation, at, nbytes)
        except BaseException:  # closed meanwhile, or no room at all: nothing was written
            self._give_up(reserved, landed=True)
            raise
        wrote = False
        try:
            if not attachment.is_mapped(at, staged.request.nbytes):
                await attachment.wait_mapped(at, staged.request.nbytes)
            if mapping.blocking_write_bytes(parts) <= self._settings.inline_bytes:
                wrote = True
                mapping.write(at, parts, order)
            else:
                # From here the slot is the thread's, until it is done; if nobody awaits that, it is
                # given up then.
                wrote = True
                await self._offload.run(
                    lambda: mapping.write(at, parts, order),
                    lambda: self._withdraw(reserved, staged, wrote=True),
                )
            attachment.tell_written(reserved.slot, reserved.generation, order)
        except asyncio.CancelledError:
            if not wrote:
                self._withdraw(reserved, staged, wrote=False)
            raise
        except BaseException:
            self._withdraw(reserved, staged, wrote=wrote)
            raise
        try:
            return await self._publish(reserved, staged)
        except FeatcacheError:
            self._give_up(reserved, landed=False)  # refused: it is this session's still
            raise
        finally:
            attachment.end_write(reserved.slot, reserved.generation)

    async def _publish(self, reserved: Reserved, staged: Staged) -> FeatureRef:
        connection, request = self.connection, staged.request
        link, slot, generation = connection.link, reserved.slot, reserved.generation
        # Made first: what would be refused is refused before anybody can read it.
        ref = FeatureRef(
            *(connection.attachment.pool_id, connection.endpoint, slot, generation),
            *(reserved.offset_bytes, request.nbytes, staged.specs),
        )
        answer, _ = await link.request(
            messages.Publish(link.number(), slot, generation, staged.specs)
        )
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a put with {type(answer).__name__}")
        self.puts += 1
        return ref

    def _withdraw(self, reserved: Reserved, staged: Staged, *, wrote: bool) -> None:
        """Give a slot up. What a stream may still write there lands first."""
        attachment, order = self.connection.attachment, staged.order
        slot, generation = reserved.slot, reserved.generation
        landed = not (wrote and attachment.mapping.deferred and order is not None)
        if not landed:
            try:
                attachment.tell_written(slot, generation, order)
            except BackendUnavailable:
                landed = True  # a broken context: nothing comes any more
        self._give_up(reserved, landed=landed)
        attachment.end_write(slot, generation)

    def _give_up(self, reserved: Reserved, *, landed: bool) -> None:
        self.connection.link.tell(
            messages.GiveUpReserved(reserved.slot, reserved.generation, landed)
        )

    # --- the first time ---------------------------------------------------------------------------

    async def _open(self) -> None:
        """Map the slab for writing, once however many ask at once."""
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open_once())
            self._opening.add_done_callback(self._opened)
        await asyncio.shield(self._opening)

    def _opened(self, task: "asyncio.Task[None]") -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()  # seen: who asked may have given up

    async def _open_once(self) -> None:
        link, mapping = self.connection.link, self.connection.attachment.mapping
        answer, fds = await link.request(messages.OpenForWriting(link.number()))
        try:
            if not isinstance(answer, messages.WriteDescriptors):
                raise ProtocolError(f"the owner answered a writer with {type(answer).__name__}")
        except ProtocolError:
            close_all(fds)
            raise
        # The thread's, which closes them; if the loop is gone by then it does so all the same.
        await self._offload.run(lambda: _open_for_writing(mapping, fds), lambda: None)


def _open_for_writing(mapping: Any, fds: list[int]) -> None:
    try:
        mapping.open_for_writing(fds)
    finally:
        close_all(fds)
