"""What a driver pins takes tens of milliseconds: it is done in threads, never in the owner's loop."""

import threading
from typing import Any

import pytest

from featcache.memory.cuda.mapping import CudaMapping
from support.caches import KIB, filled, raw, tensor
from support.fakegpu import fake_gpu, segmented


async def test_words_are_pinned_outside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    adopt, threads = CudaMapping.adopt, list[int]()

    def noted(mapping: CudaMapping, block: Any, words: memoryview) -> Any:
        threads.append(threading.get_ident())
        return adopt(mapping, block, words)

    monkeypatch.setattr(CudaMapping, "adopt", noted)
    with fake_gpu() as gpu:
        async with segmented(gpu) as (owner, client):
            own, others = owner.put_nowait(filled(KIB, 3)), owner.put_nowait(filled(KIB, 4))
            gpu.run()
            assert raw(tensor(owner.get_nowait(own))) == bytes([3]) * KIB
            assert raw(tensor(await client.get(others))) == bytes([4]) * KIB
            gpu.run()
    assert threads
    assert threading.get_ident() not in threads
