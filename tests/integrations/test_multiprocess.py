"""prometheus_client's multi-process mode: one scrape answers for all processes of a server."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import featcache
from integrations.scraping import Scraped, parsed
from support.caches import filled, small

# A worker of a server: its figures are told by itself or, once it says so, by another worker.
WORKER = """
import asyncio, json, os, sys
import featcache, torch
from featcache.integrations import metrics
from integrations.scraping import answer

async def main(endpoint, gets):
    app = metrics.asgi_app()
    for _ in range(2):  # one after the other: what the first counted is not lost
        async with featcache.connect(endpoint) as client:
            metrics.register(client)
            for _ in range(gets):
                await client.get("kept")
            await client.get(await client.put(torch.zeros(256)))
    async with featcache.connect(endpoint) as client:
        metrics.register(client)
        for line in sys.stdin:
            if line == "scrape\\n":
                print(json.dumps(await answer(app)), flush=True)
            else:
                await answer(app)
                print("[]", flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


class Worker:
    """A process of its own, told by lines and answering each by one."""

    def __init__(self, folder: Path, endpoint: str, gets: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, endpoint, str(gets)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PROMETHEUS_MULTIPROC_DIR": str(folder),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )

    def say(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> int:
        self._process.communicate(timeout=30)
        return self._process.returncode


def figures(answered: Any) -> Scraped:
    status, text = answered
    assert status == 200
    return parsed(text)


@pytest.mark.timeout(120)  # each worker imports torch
async def test_a_scrape_of_one_worker_tells_of_all(tmp_path: Path) -> None:
    async with featcache.create(settings=small()) as owner:
        await owner.put(filled(40), key="kept")
        workers = [
            await asyncio.to_thread(Worker, tmp_path, owner.endpoint, gets) for gets in (3, 5)
        ]
        try:
            for worker in workers:  # has each write its figures
                await asyncio.to_thread(worker.say, "write")
            first, second = [
                figures(await asyncio.to_thread(worker.say, "scrape")) for worker in workers
            ]
        finally:
            ended = [await asyncio.to_thread(worker.end) for worker in workers]
        assert ended == [0, 0]
        pool = (owner._opened().pool.name, "cpu")
        for found in (first, second):
            assert found["featcache_gets_total"] == {pool: 2 * (3 + 1) + 2 * (5 + 1)}
            assert found["featcache_puts_total"] == {pool: 4}
            assert found["featcache_put_bytes_total"] == {pool: 4 * 1024}
            assert found["featcache_get_host_seconds_count"] == {pool: 20}
            assert found["featcache_get_host_seconds_bucket"][*pool, "+Inf"] == 20
            assert found["featcache_capacity_bytes"] == {pool: owner.statistics().capacity_bytes}
