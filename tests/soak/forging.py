"""Forged refs with right checksums, and forged frames from peers that attached as one should."""

from __future__ import annotations

import array
import asyncio
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from featcache import FeatureClient, FeatureRef, MalformedRef
from featcache.control import messages
from featcache.control.messages import VERSION, Hello, encode
from soak.board import Step, Word
from soak.content import Content, Feature, is_one_feature
from soak.plan import TTL_S
from soak.process import Process

# --- refs ------------------------------------------------------------------------------------------


async def forge_refs(me: Process, cache: FeatureClient) -> None:
    """Take a ref, try forgeries of it, and read it at last."""
    taken = await me.take()
    if taken is None:
        return
    content, ref = taken
    for _ in range(8):
        with me.tolerating(), me.at(Step.FORGE, Word.FORGED_REFS):
            try:
                await _try_forged(me, cache, content, forged(me.chance, ref))
            finally:
                me.row.count(Word.FORGED_REFS)
    with me.tolerating(), me.at(Step.GET, Word.GETS):
        me.check(content, await cache.get(ref, timeout=5), "get after forgeries")
    await me.pause()


async def _try_forged(me: Process, cache: FeatureClient, content: Content, ref: FeatureRef) -> None:
    """Read a forged ref: the only bytes that it may give are of the feature that it came to name."""
    way = me.chance.randrange(4)
    found: Any = None
    if way == 0:
        found = await cache.get(ref, timeout=1)
    elif way == 1:
        found = cache.get_nowait(ref)
    elif way == 2:
        async with cache.borrow(ref, timeout=1) as view:
            found = _clone(view)
    else:
        await cache.release(ref, timeout=1)
    if found is not None and not content.is_right(found) and not is_one_feature(found):
        me.row.count(Word.WRONG)
        me.world.board.fault(f"BYTES OF A FORGED REF at {me.place}: {ref}")


def _clone(view: Feature) -> Feature:
    if isinstance(view, torch.Tensor):
        return view.clone()
    return {name: part.clone() for name, part in view.items()}


def forged(chance: random.Random, ref: FeatureRef) -> FeatureRef:
    """Another ref, with a right checksum; raises MalformedRef for one that can't be."""
    if chance.random() < 0.3:
        body = bytearray(ref.to_bytes()[7:])
        for _ in range(chance.randint(1, 3)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        head = struct.pack("<3sI", b"fR\x01", zlib.crc32(body))
        found = FeatureRef.from_bytes(head + bytes(body))
        if found.specs != ref.specs and found.nbytes == ref.nbytes:
            raise MalformedRef("another view of the same extent is no forgery")
        return found
    near = chance.choice((-256, -1, 1, 256, 4096))
    changes: list[dict[str, Any]] = [
        {"slot": chance.randrange(1024)},
        {"slot": chance.randrange(1 << 32)},
        {"generation": max(1, ref.generation + chance.choice((-1, 1, 2, 1 << 40)))},
        {"offset_bytes": max(0, ref.offset_bytes + near)},
        {"offset_bytes": chance.randrange(1 << 48)},
        {"nbytes": ref.nbytes + abs(near)},
        {"nbytes": 1 << chance.randrange(20, 48)},
        {"pool_id": chance.randbytes(16)},
        {"endpoint": "/nowhere/" + "x" * chance.randrange(90), "pool_id": chance.randbytes(16)},
    ]
    return msgspec.structs.replace(ref, **(chance.choice(changes) | chance.choice([{}, *changes])))


# --- frames ----------------------------------------------------------------------------------------


async def forge_frames(me: Process) -> None:
    """Attach some times, send what no client sends, and hang up. The process ends then.

    A session that hung up without a goodbye is quarantined until its process is dead, so a process
    that went on would have all of them.
    """
    for _ in range(6):
        if me.stopping:
            return
        with me.tolerating():
            await asyncio.to_thread(_vandalise, me)
        await me.pause(0.01)


def _vandalise(me: Process) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(0.5)
        try:
            sock.connect(me.endpoint)
            if me.chance.random() < 0.85:
                greet(sock)
                if me.chance.random() < 0.5:
                    sock.recv(4096)  # its descriptors are dropped by the kernel
            for _ in range(me.chance.randint(1, 40)):
                with me.at(Step.FORGE, Word.FORGED_FRAMES):
                    _send(sock, *forged_frame(me.chance))
        except OSError:  # the owner has hung up, as it should
            me.row.count(Word.FORGED_FRAMES)


def greet(sock: socket.socket) -> None:
    """Say hello as one should."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        _send(sock, _frame(encode(Hello(VERSION, None, "cpu")), 1), [pidfd])
    finally:
        os.close(pidfd)


def _send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)


def _frame(payload: bytes, count: int = 0, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack("<2sBBI", b"fc", VERSION, count, size) + payload


def forged_frame(chance: random.Random) -> tuple[bytes, list[int]]:
    """A frame that is wrong in some way, or right and out of place; with its descriptors."""
    payload = encode(_message(chance))
    count = chance.choice((1, 3, 64, 65, 200))
    mutated = bytearray(payload)
    for _ in range(chance.randint(1, 4)):
        mutated[chance.randrange(len(mutated))] = chance.randrange(256)
    plain = [
        (35, _frame(payload)),
        (25, _frame(bytes(mutated))),
        (10, _frame(chance.randbytes(chance.randrange(200)))),
        (5, chance.randbytes(chance.randrange(1, 200))),
        (5, _frame(b"", 0, chance.randrange(1 << 32))),
        (5, _frame(chance.randbytes(64 << 10))),
        (5, _frame(payload)[: chance.randrange(1, 8 + len(payload))]),
        (10, _frame(payload, chance.choice((0, count)))),
    ]
    (at,) = chance.choices(range(len(plain)), [weight for weight, _ in plain])
    return plain[at][1], [1] * count if at == len(plain) - 1 else []


def _message(chance: random.Random) -> Any:
    """A message of a client; none that publishes, so that a vandal leaves nothing that lasts."""
    number, word = chance.randrange(64), chance.randrange(1 << 63)
    key = chance.choice((b"key-0", b"key-1", chance.randbytes(8)))
    kinds: list[Callable[[], Any]] = [
        lambda: Hello(VERSION, "again", "cpu"),
        lambda: messages.Discard(number, chance.randrange(1024), word),
        lambda: messages.Relay(number, chance.randbytes(60)),
        lambda: messages.Find(number, key, waits=chance.random() < 0.5, makes=True),
        lambda: messages.Cancel(number),
        lambda: messages.ReleaseClaim(key, word),
        lambda: messages.KeyCommand(number, key, "pin"),
        lambda: messages.KeyCommand(number, key, "contains"),
        lambda: messages.Reserve(number, 1 << chance.randrange(24), 1, TTL_S, None, True),
        lambda: messages.Reserve(number, 256, ["nobody"] * 3, TTL_S, key, False),
        lambda: messages.Upload(number, 256, 1, TTL_S, None, False, chance.randbytes(60)),
        lambda: messages.HostPool(number),
        lambda: messages.OpenForWriting(number),
        lambda: messages.GiveUpReserved(chance.randrange(1024), word, True),
        lambda: messages.TailUnmapped(chance.randrange(100)),
        messages.Farewell,
        messages.Closing,
    ]
    return chance.choice(kinds)()
