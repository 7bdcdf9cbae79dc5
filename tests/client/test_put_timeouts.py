"""The timeout of a client's put covers all that it waits for, not only its room."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import featcache
from featcache import FeatureClient, PutTimeout
from support.caches import filled, small

CALLS: dict[str, Callable[[FeatureClient], Awaitable[Any]]] = {
    "put": lambda client: client.put(filled(8), on_full="spill", timeout=0.01),
    "put_many": lambda client: client.put_many([filled(8)], on_full="spill", timeout=0.01),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_put_that_may_spill_waits_no_longer_for_a_spill_pool_that_does_not_answer(
    call: Callable[[FeatureClient], Awaitable[Any]], tmp_path: Path
) -> None:
    settings = small(attach_timeout=3.0)
    async with (
        featcache.create(settings=settings, spill="1MiB") as owner,
        featcache.connect(owner.endpoint, settings=settings) as client,
    ):
        (connection,) = client._opened().registry.connections
        answers, connection.spill_endpoint = connection.spill_endpoint, str(tmp_path / "other.sock")
        with socket.socket(socket.AF_UNIX) as stopped:
            stopped.bind(connection.spill_endpoint)
            stopped.listen()
            with pytest.raises(PutTimeout, match="not attached in time"):
                await call(client)
            await client.put(filled(8), timeout=0.01)  # its place in the line is free again
            patient = asyncio.create_task(client.put(filled(8), on_full="spill"))
            await asyncio.sleep(0)
            with pytest.raises(PutTimeout, match="behind the puts before it"):
                await client.put(filled(8), timeout=0.01)
            patient.cancel()
            await asyncio.wait([patient])
        connection.spill_endpoint = answers
        await client.put(filled(8), on_full="spill", timeout=30)
