"""Readers in processes of their own."""

import asyncio
import signal

import pytest
import torch

import featcache
from support import children
from support.caches import KIB, MIB, filled, full, small, spent, tensor, until
from support.processes import Server


@pytest.fixture(scope="module")
def processes() -> Server:
    return Server()


class Reader:
    """A process that reads what it is told to."""

    def __init__(self, processes: Server, endpoint: str, name: str) -> None:
        self._pipe, there = processes.Pipe()
        self._process = processes.Process(
            target=children.read_refs, args=(endpoint, name, there), daemon=True
        )
        self._process.start()
        there.close()

    def tell(self, order: tuple[str, bytes] | None) -> None:
        self._pipe.send(order)

    async def hear(self) -> object:
        return await asyncio.to_thread(self._pipe.recv)

    async def leave(self) -> int | None:
        self.tell(None)
        await asyncio.to_thread(self._process.join)
        self._pipe.close()
        return self._process.exitcode


async def test_two_named_readers_in_other_processes(processes: Server) -> None:
    names = ["tp0", "tp1"]
    async with featcache.create(settings=small(capacity=4 * MIB)) as owner:
        readers = [Reader(processes, owner.endpoint, name) for name in names]
        assert [await reader.hear() for reader in readers] == ["ready", "ready"]
        assert owner.statistics().sessions == 2
        nbytes = 300 * KIB
        for turn in range(30):  # the slab holds 13 of them: later ones must wait
            ref = await owner.put(filled(nbytes, turn), readers=names)
            for reader, how in zip(readers, ("get", "borrow"), strict=True):
                reader.tell((how, ref.to_bytes()))
        for turn in range(30):
            assert [await reader.hear() for reader in readers] == [turn * nbytes] * 2
        await spent(owner)
        assert owner.statistics().reads_paid == 60
        assert [await reader.leave() for reader in readers] == [0, 0]
        await until(lambda: owner.statistics().sessions == 0)
        assert owner.statistics().readers_lost == 0


async def test_a_reader_that_writes_to_its_view_harms_itself_only(
    processes: Server,
) -> None:
    async with featcache.create(settings=small()) as owner:
        ref = await owner.put(filled(KIB, 4), readers=2, ttl=None)
        process = processes.Process(
            target=children.write_into_view, args=(owner.endpoint, ref.to_bytes()), daemon=True
        )
        process.start()
        await asyncio.to_thread(process.join)
        assert process.exitcode == -signal.SIGSEGV
        await until(lambda: owner.statistics().readers_lost == 1)
        assert torch.equal(tensor(await owner.get(ref)), filled(KIB, 4))
        await spent(owner)  # its read was begun, so it was paid for it
        await owner.get(await full(owner))
