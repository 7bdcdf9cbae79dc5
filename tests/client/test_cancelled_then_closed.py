"""A put is cancelled and its client closes, while the owner is too slow to have answered either."""

import asyncio
from typing import Any

import pytest

from featcache import FeatureCache, FeatureClient
from featcache.control.channel import Channel
from featcache.control.messages import decode_from_client
from support.caches import KIB, filled, spent, until
from support.keyed import party


def far_end(owner: FeatureCache) -> Channel:
    """The owner's end of its first session."""
    return owner._opened().main.server.sessions[1].channel


def near_end(client: FeatureClient) -> Channel:
    """The client's end of its only one."""
    (connection,) = client._opened().registry.connections
    return connection.link._channel


async def test_what_it_published_is_nobodys(
    no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, sent = asyncio.get_running_loop(), list[str]()
    async with party(1, ttl=None) as (owner, [client]):
        await client.release(await client.put(filled(KIB)))  # it is open for writing now
        channel, own = far_end(owner), near_end(client)
        send = own.send

        def watch(payload: bytes, *rest: Any) -> None:
            sent.append(type(decode_from_client(payload)).__name__)
            if sent[-1] == "Publish":
                loop.remove_reader(channel._fd)  # from here on the owner is slow
            send(payload, *rest)

        monkeypatch.setattr(own, "send", watch)
        put = asyncio.ensure_future(client.put(filled(KIB), readers=1, key="kept"))
        await until(lambda: "Publish" in sent)
        put.cancel()
        await asyncio.wait([put])
        assert put.cancelled()
        closing = asyncio.ensure_future(client.aclose())
        await until(lambda: "Goodbye" in sent)
        loop.add_reader(channel._fd, channel._readable)
        await closing
        assert await owner.evict("kept")
        await spent(owner)
