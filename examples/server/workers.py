"""The server's side of its workers: processes that are asked over pipes, in lines of JSON."""

import asyncio
import itertools
import sys
from pathlib import Path
from typing import Any

import anyio
import msgspec
import structlog

import featcache
from worker import Answer, Task

log = structlog.get_logger("server")


class WorkerLost(Exception):
    """A worker's process ended."""


class Worker:
    """A worker process, started again should it die, and the answers that it still owes."""

    def __init__(self, name: str, endpoint: str, delay: float) -> None:
        self.name = name
        program = Path(__file__).with_name("worker.py")
        self.command = [sys.executable, str(program), name, endpoint, f"--delay={delay}"]
        self.attached = anyio.Event()
        self.stdin: asyncio.StreamWriter | None = None  # there while the worker is attached
        self.numbers = itertools.count()
        self.waiting: dict[int, asyncio.Future[Any]] = {}

    async def ask(self, ref: featcache.FeatureRef) -> Any:
        if self.stdin is None:
            raise WorkerLost(f"worker {self.name} is being started again")
        number = next(self.numbers)
        answer = self.waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self.stdin.write(msgspec.json.encode(Task(number, ref.to_bytes())) + b"\n")
            return await answer
        finally:
            del self.waiting[number]

    async def run(self) -> None:
        while True:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # ctrl-c is for the server alone, which then closes stdin
            )
            try:
                await self.listen(process)
            finally:
                await self.end(process)
            if not self.attached.is_set():
                raise WorkerLost(f"worker {self.name} ended before it could attach")
            log.error("worker lost, starting another", worker=self.name, code=process.returncode)
            await anyio.sleep(0.5)

    async def listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            message = msgspec.json.decode(line, type=Answer)
            if message.number is None:
                self.stdin = process.stdin
                self.attached.set()
                continue
            answer = self.waiting.get(message.number)
            if answer is None or answer.done():
                continue  # the request has gone
            if message.error is None:
                answer.set_result(message.result)
            else:
                answer.set_exception(WorkerLost(f"worker {self.name}: {message.error}"))

    async def end(self, process: asyncio.subprocess.Process) -> None:
        """Close the worker's stdin, at which it ends."""
        self.stdin = None
        for answer in self.waiting.values():
            if not answer.done():
                answer.set_exception(WorkerLost(f"worker {self.name} is gone"))
        assert process.stdin is not None
        process.stdin.close()
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(5):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
