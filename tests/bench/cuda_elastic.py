"""Growth and shrinking under load: how long a put waits for a segment, and that memory comes back.

    PYTHONPATH=src python tests/bench/cuda_elastic.py --out elastic.json

Two readers stream small features all the while. Large ones make the slab grow, a segment for each; what
was put before, and a borrow that is held from beginning to end, must stay right. Then the slab is
emptied: by NVML, the GPU must have its memory back with the readers still attached. At last somebody
else fills the GPU: a put that needs a segment then waits, with an event that says why, and goes
through when there is room again.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import proofs
from bench.crew import Crew, until
from bench.elastic_stage import Stage
from bench.poison import pool_of
from bench.proofs import MIB, SLACK_BYTES, Proof, mib
from featcache.events import CommitFailed, PutWaited, SegmentsCommitted
from featcache.settings import parse_bytes

ANCHOR_BYTES = 4 * MIB
LEAVE_BYTES = 24 * MIB
GOAL_MS = 2.0


async def grow(stage: Stage, segments: int) -> list[float]:
    """Put features that need a segment each; return the ms that each waited, by segment."""
    waits_ms, puts_ms = [], []
    for _ in range(segments):
        stage.patterns.settle()
        stage.events.clear()
        began_s = time.monotonic()
        await stage.put(stage.large)
        puts_ms.append(1e3 * (time.monotonic() - began_s))
        added = sum(e.added_bytes for e in stage.events if isinstance(e, SegmentsCommitted))
        waits = [
            e.waited_s for e in stage.events if isinstance(e, PutWaited) and e.nbytes == stage.large
        ]
        if added and waits:
            waits_ms.append(1e3 * waits[0] / (added / stage.segment))
    stage.proof.details[f"{stage.backend}: ms of each put that grew, whole"] = [
        round(value, 3) for value in puts_ms
    ]
    return waits_ms


async def check_growth(stage: Stage, segments: int) -> int:
    """Grow under load, then have everything read; return the number of the borrow that is held."""
    borrowed = await stage.put(ANCHOR_BYTES)
    await stage.tell(0, "borrow", borrowed)
    await stage.open_gate()
    streamed = stage.read_by_all
    waits_ms = await grow(stage, segments)
    stage.proof.details[f"{stage.backend}: ms waited by segment"] = [round(w, 3) for w in waits_ms]
    stage.claim(
        "puts that grew the slab",
        len(waits_ms),
        f">= {segments // 2}",
        len(waits_ms) >= segments // 2,
    )
    if waits_ms:
        median_ms = statistics.median(waits_ms)
        if stage.backend == "host":  # whose pages are touched one by one
            stage.proof.note("host: wait for a segment, ms, median", round(median_ms, 3))
        else:
            name = "wait for a segment, ms, median"
            stage.claim(name, round(median_ms, 3), f"<= {GOAL_MS}", median_ms <= GOAL_MS)
        stage.proof.note(f"{stage.backend}: wait for a segment, ms, max", round(max(waits_ms), 3))
    stage.claim(
        "features streamed meanwhile",
        stage.read_by_all - streamed,
        "> 0",
        stage.read_by_all > streamed,
    )
    large = [number for number in stage.refs if number != borrowed]
    wrong_bytes = [await stage.tell(0, "read", number) for number in large][-1]
    stage.claim(
        "wrong bytes in what was put before later growths", wrong_bytes, "0", wrong_bytes == 0
    )
    wrong_bytes = await stage.tell(0, "look", borrowed)
    stage.claim("wrong bytes in the borrow, after growth", wrong_bytes, "0", wrong_bytes == 0)
    return borrowed


async def check_shrink(stage: Stage, borrowed: int) -> None:
    """Empty the slab but for the borrow: its memory goes back with both readers attached."""
    await stage.shut_gate()
    gpu = proofs.gpu_index(stage.proof.options.device)
    peak_bytes = (await stage.proof.nvml.settled() or [0] * (gpu + 1))[gpu]
    committed_bytes = stage.cache.statistics().committed_bytes
    for number in [number for number in stage.refs if number != borrowed]:
        await stage.tell(1, "release", number)
        del stage.refs[number]
    began_s = time.monotonic()
    await until(
        "the slab is one segment again",
        lambda: stage.cache.statistics().committed_bytes <= stage.segment,
        stage.proof.options.idle + 20,
    )
    stage.proof.note(
        f"{stage.backend}: s until the slab was small again", round(time.monotonic() - began_s, 2)
    )
    returned_bytes = committed_bytes - stage.cache.statistics().committed_bytes
    if len(stage.proof.nvml):
        left_bytes = (await stage.proof.nvml.settled())[gpu]
        found = f"{mib(peak_bytes - left_bytes)} of {mib(returned_bytes)}"
        holds = abs(peak_bytes - left_bytes - returned_bytes) <= SLACK_BYTES
        stage.claim("MiB that the GPU has back, readers attached", found, "all", holds)
    else:
        stage.proof.not_run(f"{stage.backend}: memory by NVML", "needs a GPU")
    await stage.open_gate()
    wrong_bytes = await stage.tell(0, "look", borrowed)
    stage.claim("wrong bytes in the borrow, after shrinking", wrong_bytes, "0", wrong_bytes == 0)


async def check_again(stage: Stage) -> None:
    """Segments that were given back can be committed again."""
    before = stage.cache.statistics().committed_bytes
    await grow(stage, 3)
    after = stage.cache.statistics().committed_bytes
    stage.claim("MiB grown after shrinking", mib(after - before), "> 0", after > before)
    for number in [number for number in stage.refs if number != min(stage.refs)]:
        await stage.tell(0, "read", number)
        await stage.tell(1, "release", number)
        del stage.refs[number]


# --- a GPU that is full ---------------------------------------------------------------------------


class Full:
    """Takes all of the GPU's memory but a little, by plain allocations of torch's.

    On a host slab, whose machine is better not filled, the slab's own commit is made to fail.
    """

    def __init__(self, stage: Stage) -> None:
        self._blocks: list[torch.Tensor] = []
        self._kind: Any = type(pool_of(stage.cache).slab)
        self._commit = getattr(self._kind, "commit", None)
        self._on_gpu = stage.backend != "host"

    def take(self) -> int:
        """Return the bytes that are left."""
        if not self._on_gpu:
            self._kind.commit = _no_memory
            return 0
        torch.cuda.empty_cache()
        for size in (4096 * MIB, 512 * MIB, 64 * MIB, 8 * MIB, 2 * MIB):
            while torch.cuda.mem_get_info()[0] > size + LEAVE_BYTES:
                try:
                    self._blocks.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                except torch.cuda.OutOfMemoryError:
                    break
        return int(torch.cuda.mem_get_info()[0])

    def return_lease(self) -> None:
        if not self._on_gpu:
            self._kind.commit = self._commit
        self._blocks.clear()
        if self._on_gpu:
            torch.cuda.empty_cache()


def _no_memory(*_: Any, **__: Any) -> None:
    raise MemoryError("as if there were none")


async def check_full(stage: Stage) -> None:
    """A put that needs a segment of a full GPU waits, and goes through when there is room."""
    await stage.shut_gate()
    cache, segment = stage.cache, stage.segment
    await until(
        "the slab is one segment again",
        lambda: cache.statistics().committed_bytes <= segment,
        stage.proof.options.idle + 20,
    )
    full = Full(stage)
    left_bytes = full.take()
    stage.claim("MiB left on the full GPU", mib(left_bytes), "< a segment", left_bytes < segment)
    stage.events.clear()
    putting = asyncio.create_task(stage.put(stage.large))
    try:
        await until("commit_failed", lambda: putting.done() or _failures(stage), 20)
        await asyncio.sleep(2.5)  # past a retry or two
        waits = not putting.done() and cache.statistics().waiters == 1
        stage.claim("put on a full GPU", "waits" if waits else repr(putting), "waits", waits)
        failures = _failures(stage)
        stage.claim("events commit_failed", len(failures), ">= 1", failures)
        stage.proof.details[f"{stage.backend}: commit_failed says"] = failures[:1]
    finally:
        full.return_lease()
    given_s = time.monotonic()
    number = await asyncio.wait_for(putting, 30)
    waited_ms = round(1e3 * (time.monotonic() - given_s), 1)
    stage.claim("put after memory came back, ms", waited_ms, "goes through", True)
    await stage.open_gate()
    wrong_bytes = await stage.tell(0, "read", number)
    stage.claim("wrong bytes in that put", wrong_bytes, "0", wrong_bytes == 0)
    await stage.tell(1, "release", number)
    del stage.refs[number]


def _failures(stage: Stage) -> list[str]:
    return [event.error for event in stage.events if isinstance(event, CommitFailed)]


# --- all of it ------------------------------------------------------------------------------------


async def scene(proof: Proof, backend: str, devices: list[str]) -> None:
    chosen = proof.options
    capacity = (chosen.segments + 4) * chosen.segment
    cache = featcache.create(
        device=chosen.device,
        capacity=capacity,
        segment=chosen.segment,
        initial=chosen.segment,
        idle=chosen.idle,
        settings=proofs.settings(backend, log_interval=0.0),
    )
    async with cache:
        stage = Stage(proof, backend, cache)
        note = stage.events.append
        featcache.events.add_hook(note)
        with Crew() as crew:
            await stage.attach(crew, devices)
            streaming = asyncio.create_task(stage.flow())
            borrowed = await check_growth(stage, chosen.segments)
            await check_shrink(stage, borrowed)
            await check_again(stage)
            await check_full(stage)
            wrong_bytes = await stage.tell(0, "leave", borrowed)
            wrong_bytes += await stage.tell(1, "release", borrowed)
            await stage.shut_gate()
            await until("all is recycled", lambda: not cache.statistics().used_bytes)
            streaming.cancel()
            for child in stage.children:
                child.tell("end")
                await child.ends()
        stage.claim("wrong bytes, both readers, all of it", wrong_bytes, "0", not wrong_bytes)
        proof.note(f"{backend}: small features streamed", stage.streamed)
    featcache.events.remove_hook(note)


async def body(proof: Proof) -> None:
    chosen = proof.options
    count = torch.cuda.device_count() if proofs.is_cuda(chosen.device) else 0
    other = "cuda:1" if count > 1 else chosen.device
    devices = (chosen.readers or f"{chosen.device},{other}").split(",")
    for backend in proofs.backends(chosen, default="vmm"):
        if backend == "ipc":
            proof.not_run("ipc", "one fixed segment")
            continue
        await scene(proof, backend, devices)
    if count == 1:
        proof.not_run("a reader on another GPU", "needs two GPUs")


def main() -> int:
    parser = proofs.options(__doc__, limit_s=300)
    parser.add_argument("--readers", help="two devices; the owner's and the next")
    parser.add_argument("--segment", type=parse_bytes, default=64 * MIB)
    parser.add_argument("--segments", type=int, default=24, help="to grow by")
    parser.add_argument("--idle", type=float, default=1.0)
    return proofs.run(body, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
