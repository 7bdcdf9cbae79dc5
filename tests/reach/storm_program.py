"""One host of the soak: it makes features and reads those of others, in batches. Run by `soak`.

What a feature is, its size and its bytes, is told by its seed, so that whoever reads it knows what is right.
"""

import asyncio
import contextlib
import json
import random
import sys
import time
import zlib
from collections import Counter
from typing import Any, Final

import torch

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef
from featcache.errors import FeatcacheError, OwnerLost, StaleRef

KIB, MIB = 1 << 10, 1 << 20
_WINDOW: Final = 12
"""Features that are read at once."""
_TRIES: Final = 200
_AGAIN_S: Final = 0.1


def size_of(seed: int) -> int:
    """Most are small; some have one byte, some some megabytes."""
    dice = random.Random(-seed)
    return dice.randint(1, dice.choices([16 * KIB, 256 * KIB, 3 * MIB], [0.85, 0.12, 0.03])[0])


def content(seed: int) -> bytes:
    """The bytes of a feature."""
    return random.Random(seed).randbytes(size_of(seed))


def crc(feature: object) -> int:
    """The checksum of what was read."""
    assert isinstance(feature, torch.Tensor)
    return zlib.crc32(feature.numpy().tobytes())


class StormHost:
    """What the driver asks of a host."""

    def __init__(self, owner: FeatureCache, ranks: list[FeatureClient]) -> None:
        self._owner = owner
        self._ranks = ranks

    async def answer(self, asked: dict[str, Any]) -> Any:
        return await getattr(self, f"do_{asked.pop('do')}")(**asked)

    async def do_make(self, first: int, count: int, readers: int) -> list[str]:
        """Put features of so many seeds, each to be read so often."""
        refs = list[str]()
        for seed in range(first, first + count):
            made = torch.frombuffer(bytearray(content(seed)), dtype=torch.uint8)
            refs.append((await self._owner.put(made, readers=readers)).to_bytes().hex())
        return refs

    async def do_read(self, refs: list[tuple[str, int]]) -> dict[str, Any]:
        """Have every rank read each of these refs; return how that ended."""
        ended: Counter[str] = Counter()
        longest_s = 0.0
        waiting = iter(refs)

        async def some() -> None:
            nonlocal longest_s
            for data, seed in waiting:
                ref, right = FeatureRef.from_bytes(bytes.fromhex(data)), zlib.crc32(content(seed))
                each = (self._read(rank, ref, right, seed) for rank in self._ranks)
                for how, slowest_s in await asyncio.gather(*each):
                    ended.update(how)
                    longest_s = max(longest_s, slowest_s)

        await asyncio.gather(*(some() for _ in range(_WINDOW)))
        return {"ended": dict(ended), "longest_s": longest_s}

    async def _read(
        self, rank: FeatureClient, ref: FeatureRef, right: int, seed: int
    ) -> tuple[list[str], float]:
        """Read once, again if the home was lost meanwhile; return what was met, and the longest call."""
        met, longest_s = list[str](), 0.0
        for number in range(_TRIES):
            since_s = time.monotonic()
            try:
                how = await self._once(rank, ref, right, seed + number)
            except StaleRef:
                how = "stale"  # this host's lease had ended, and so what it had begun was paid
            except OwnerLost as error:
                how = "OwnerLost" if "another owner" not in str(error) else "its home has ended"
            except FeatcacheError as error:
                how = f"{type(error).__name__}: {error}"
            longest_s = max(longest_s, time.monotonic() - since_s)
            met.append(how)
            if how not in {"OwnerLost", "cancelled"}:
                break
            if how == "OwnerLost":
                await asyncio.sleep(_AGAIN_S)
        return met, longest_s

    async def _once(self, rank: FeatureClient, ref: FeatureRef, right: int, choice: int) -> str:
        how = choice % 10
        if how == 0:
            async with rank.borrow(ref) as lent:
                return "borrowed" if crc(lent) == right else "WRONG"
        if how == 1:
            await rank.release(ref)
            return "released"
        if how == 2:
            reading = asyncio.ensure_future(rank.get(ref))
            done, _ = await asyncio.wait([reading], timeout=random.random() * 0.004)
            if not done and reading.cancel():
                with contextlib.suppress(asyncio.CancelledError):
                    return "got" if crc(await reading) == right else "WRONG"
                return "cancelled"
            return "got" if crc(await reading) == right else "WRONG"
        return "got" if crc(await rank.get(ref)) == right else "WRONG"

    async def do_left(self) -> dict[str, int]:
        """Return what is in use, pinned, owed or in quarantine: nothing, once all is over."""
        now, beyond = self._owner.statistics(), self._owner._opened().beyond
        assert beyond is not None
        assert beyond.peers is not None
        homes = beyond.homes._homes.values()
        return {
            "bytes": now.used_bytes,
            "slots": now.slots_used,
            "quarantined": sum(home.traffic.quarantined for home in beyond.homes._homes.values()),
            "unacknowledged": sum(len(home.ledger) for home in homes),
            "begun": sum(len(peer.begun) for peer in beyond.peers._peers.values()),
        }

    async def do_slots(self) -> list[str]:
        """Return what is known of the slots in use, to find why they are."""
        pool, beyond = self._owner._opened().pool, self._owner._opened().beyond
        assert beyond is not None
        copies = {copy.key: copy for copy in beyond.reads._copies.values()}
        told = list[str]()
        for slot in pool.store.table.slots:
            if slot.state.name != "FREE":
                names = ("state", "reads_left", "grants", "idle", "of", "due_s", "ttl_s", "born_s")
                known = [f"{name}={getattr(slot, name)}" for name in names]
                copy = copies.get(slot.key or slot.wanted_key or b"")
                if copy is not None:
                    known.append(f"copy over={copy.over} home={copy.home} given={len(copy.given)}")
                told.append(f"{slot.label} {' '.join(known)} now={time.monotonic()}")
        return told

    async def do_counts(self) -> dict[str, int]:
        beyond = self._owner._opened().beyond
        assert beyond is not None
        return beyond.counts()


async def main(listen: str, ranks: int) -> None:
    """Serve lines until they end."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=64 * MIB)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    settings = featcache.Settings(
        capacity="96MiB",
        segment="8MiB",
        recycle_interval=0.01,
        peer_timeout=2.0,
        peer_lease=4.0,
        ttl=20.0,
    )
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        owner = await enter(featcache.create(settings=settings, listen=listen))
        clients = [await enter(featcache.connect(owner.endpoint)) for _ in range(ranks)]
        host = StormHost(owner, clients)
        print(json.dumps({"result": owner.address}), flush=True)  # noqa: T201 - its answers
        while line := await lines.readline():
            answer = {"result": await host.answer(json.loads(line))}
            print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
