"""A TCP proxy before an owner: the network between two hosts, to be cut by a test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec

from featcache import FeatureRef
from featcache.reach.secret import parse_address
from featcache.ref import path_of


class Network:
    """Forwards bytes both ways; cut, it takes them and forwards nothing."""

    def __init__(self, target: str) -> None:
        self.target = parse_address(target)
        self.address = ""
        self.connections = 0
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Drop what is sent from now on: no end is told."""
        self._flows.clear()

    def mend(self) -> None:
        """Deliver what is sent, also what was kept meanwhile."""
        self._flows.set()

    def reset(self) -> None:
        """Break all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    def ref(self, ref: FeatureRef) -> FeatureRef:
        """Return a ref whose home is behind this network."""
        return msgspec.structs.replace(ref, endpoint=self.address + path_of(ref.endpoint))

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connections += 1
        self._writers.add(writer)
        try:
            await self._flows.wait()
            with contextlib.suppress(OSError):
                there, back = await asyncio.open_connection(self.target.host, self.target.port)
                self._writers.add(back)
                await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        finally:
            writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._flows.wait()
                sink.write(data)
        sink.close()


@contextlib.asynccontextmanager
async def network(target: str) -> AsyncIterator[Network]:
    """A network before an owner's address."""
    made = Network(target)
    running: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(made.forward(reader, writer))
        running.add(task)
        task.add_done_callback(running.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    made.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        made.mend()
        made.reset()
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        made.reset()
        await asyncio.sleep(0)  # transports close in the turn after
