"""Handlers of sessions' requests about refs of other hosts."""

from featcache.control.dispatch import Wait
from featcache.control.far import Bring, EndFar
from featcache.control.messages import Answer, Reply
from featcache.owner.sessions import Sessions
from featcache.pool.pool import Pool
from featcache.ref import FeatureRef


class FarRequests:
    """The part of `RequestHandlers` that leads to other hosts."""

    _pool: Pool
    _sessions: Sessions

    def _bring(self, session: int, message: Bring) -> Wait:
        return self._brought(session, message)

    async def _brought(self, session: int, message: Bring) -> Answer:
        ref, name = FeatureRef.from_bytes(message.ref), self._pool.pages[session].name
        local = await self._sessions.reach.bring(ref, session, name)
        return Reply(message.request, ref=local.to_bytes())

    async def _end_far(self, session: int, message: EndFar) -> Answer:
        ref, reach = FeatureRef.from_bytes(message.ref), self._sessions.reach
        if message.command == "discard":
            await reach.discard(ref)
            return Reply(message.request)
        name = self._pool.pages[session].name
        local = await reach.release(ref, session, name)
        return Reply(message.request, ref=b"" if local is None else local.to_bytes())
