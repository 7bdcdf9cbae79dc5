"""Handlers of sessions' requests that name a key: lookups, claims, shares, commands."""

from typing import Final

from featcache.control import many, messages
from featcache.control.dispatch import Wait
from featcache.control.messages import Answer
from featcache.control.turns import WAKE_UNITS
from featcache.errors import FeatcacheError, at_member
from featcache.owner.keys import Claim, Granted, Lookups
from featcache.pool.page import SessionPage
from featcache.pool.pool import Pool
from featcache.ref import FeatureRef
from featcache.session.arguments import not_found, parse_readers

_GRANT_BYTES: Final = 24
"""Bytes of a grant in an answer, besides its ref."""


class KeyRequests:
    """The part of `RequestHandlers` that leads to the directory."""

    _pool: Pool
    _lookups: Lookups
    _wire_refs: dict[int, tuple[FeatureRef, bytes]]
    """Refs of features under keys, in wire form, by slot: as `Pool.kept`, each with its very ref."""

    def _page(self, session: int) -> SessionPage:
        raise NotImplementedError

    def _find(self, session: int, message: messages.Find) -> Answer | Wait:
        page = self._page(session)
        granted = None if message.counted else self._lookups.find(message.key, page)
        if granted is not None:
            return self._granted(message.request, granted)
        if message.waits or (message.makes and not self._lookups.is_claimed(message.key)):
            return self._wait_for_key(session, message)
        if message.makes or self._lookups.sources is None:
            raise not_found(message.key)
        return self._find_elsewhere(session, message)

    async def _find_elsewhere(self, session: int, message: messages.Find) -> Answer:
        found = await self._lookups.find_elsewhere(message.key, self._page(session))
        return self._granted(message.request, found)

    async def _wait_for_key(self, session: int, message: messages.Find) -> Answer:
        found = await self._lookups.wait_for_key(
            *(message.key, self._page(session)), can_make=message.makes, waits=message.waits
        )
        if isinstance(found, Claim):
            return messages.ClaimGranted(message.request, found.number)
        return self._granted(message.request, found)

    def _granted(self, request: int, granted: Granted) -> messages.Granted:
        grant, ref = granted
        known = self._wire_refs.get(ref.slot)
        if known is None or known[0] is not ref:  # a slot's next feature has another ref
            known = self._wire_refs[ref.slot] = ref, ref.to_bytes()
        return messages.Granted(request, grant.index, grant.serial, known[1])

    def _share(self, session: int, message: messages.Share) -> Answer | Wait:
        readers = parse_readers(message.readers, self._pool.settings.readers, least=1)
        ref = self._lookups.share_now(message.key, readers, message.ttl_s)
        if ref is not None:
            return messages.Reply(message.request, ref=ref.to_bytes())
        self._pool.turn.left -= WAKE_UNITS  # a task of its own
        return self._share_later(session, message, readers)

    async def _share_later(
        self, session: int, message: messages.Share, readers: int | frozenset[str]
    ) -> Answer:
        ref = await self._lookups.share(
            *(message.key, readers, message.ttl_s, self._page(session)), waits=message.waits
        )
        return messages.Reply(message.request, ref=ref.to_bytes())

    def _find_many(self, session: int, message: many.FindMany) -> Answer | Wait:
        if self._lookups.sources is None:
            return self._find_many_here(session, message)
        return self._find_many_elsewhere(session, message)

    async def _find_many_elsewhere(self, session: int, message: many.FindMany) -> Answer:
        assert self._lookups.sources is not None, "there are some"
        await self._lookups.sources.bring_many(message.keys)
        return self._find_many_here(session, message)

    def _find_many_here(self, session: int, message: many.FindMany) -> Answer:
        """Grant the first so many, as far as the answer goes."""
        page, keys, turn = self._page(session), message.keys, self._pool.turn
        granted, found = list[Granted](), list[tuple[int, int, bytes] | None]()
        left_bytes = message.answer_bytes
        try:
            for key in keys:
                one = self._lookups.find(key, page)
                left_bytes -= 1
                if one is not None:
                    granted.append(one)
                    wire = self._granted(message.request, one)
                    found.append((wire.index, wire.serial, wire.ref))
                    left_bytes -= len(wire.ref) + _GRANT_BYTES
                    if left_bytes < 0 and len(found) > 1:
                        found.pop()
                        self._lookups.return_lease(page, granted.pop().grant)
                        break
                else:
                    found.append(None)
        except FeatcacheError as error:
            for each in granted:
                self._lookups.return_lease(page, each.grant)
            raise at_member(error, len(found)) from None
        turn.left -= len(found) // 2
        return many.GrantedMany(message.request, found)

    def _contains_many(self, _: int, message: many.ContainsMany) -> Answer | Wait:
        if self._lookups.sources is None:
            return many.Contained(message.request, self._lookups.contains_many(message.keys))
        return self._contained_elsewhere(message)

    async def _contained_elsewhere(self, message: many.ContainsMany) -> Answer:
        assert self._lookups.sources is not None, "there are some"
        flags = await self._lookups.sources.contains_many(message.keys)
        return many.Contained(message.request, flags)

    def _command(self, session: int, message: messages.KeyCommand) -> Answer | Wait:
        flag = self._lookups.command(message.command, message.key, session)
        if flag or message.command != "contains" or self._lookups.sources is None:
            return messages.Reply(message.request, flag=flag)
        return self._contains_elsewhere(message)

    async def _contains_elsewhere(self, message: messages.KeyCommand) -> Answer:
        assert self._lookups.sources is not None, "there are some"
        [flag] = await self._lookups.sources.contains_many([message.key])
        return messages.Reply(message.request, flag=flag)
