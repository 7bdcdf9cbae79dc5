"""Admission control by pressure: 503 with Retry-After, instead of a queue without end.

    pip install featcache starlette uvicorn pillow
    python examples/admission_control.py [--port 8000] [--capacity 64MiB]

    curl --data-binary @cat.png http://127.0.0.1:8000/pictures

A picture is put into the slab, and a model in a process of its own reads it. The model is slower than
clients can be, so the slab fills. A queue would then only grow: every request in it would wait longer
than its client does. Here a request waits for a moment, at most, and is then told when to come back,
before its body is even read.
"""

import argparse
import asyncio
import io
import itertools
import logging
import math
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import anyio
import numpy as np
import torch
import uvicorn
from anyio import to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

import featcache
from featcache import blocking

ADMIT_BELOW = "high"  # 90 % of the slab in use; "elevated" is 75 %
MOMENT_S = 0.1  # how long a request waits for the pressure to fall
PUT_S = 1.0  # how long one that was let in waits for room: others were let in with it
MAX_BYTES, MAX_PIXELS = 32 * 2**20, 64_000_000

log = logging.getLogger("uvicorn.error")


# --- the model's process ---------------------------------------------------------------------------


def run_model(endpoint: str, pipe: Connection, delay: float) -> None:
    """Stands for a model: the mean colour of what each ref names. Ends when its server has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c is for the server, which closes the pipe
    torch.set_num_threads(1)
    with blocking.connect(endpoint, name="model") as cache, suppress(EOFError, ConnectionError):
        while True:
            number, data = pipe.recv()
            answer = None
            with suppress(featcache.StaleRef):  # its client has left: nobody waits for an answer
                # Leaving the block pays the read, and so frees the bytes.
                with cache.borrow(featcache.FeatureRef.from_bytes(data)) as picture:
                    assert isinstance(picture, Tensor)
                    time.sleep(delay)
                    colour = picture.float().mean(dim=(0, 1)).tolist()
                answer = [round(value, 3) for value in colour]
            pipe.send((number, answer))


# --- the server ------------------------------------------------------------------------------------


class ModelLost(Exception):
    """The model's process has ended; another is being started."""


class Model:
    """The model's process, started again should it die, and the answers that it owes."""

    def __init__(self, endpoint: str, delay: float) -> None:
        self.given = endpoint, delay
        self.pipe: Connection | None = None  # there while the process is
        self.numbers = itertools.count()
        self.waiting: dict[int, asyncio.Future[list[float]]] = {}

    async def ask(self, ref: featcache.FeatureRef) -> list[float]:
        if self.pipe is None:
            raise ModelLost("the model is being started again")
        number = next(self.numbers)
        answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self.waiting[number] = answer
        try:
            self.pipe.send((number, ref.to_bytes()))  # 100 bytes: it does not block
            return await answer
        except ConnectionError as error:
            raise ModelLost("the model's process has ended") from error
        finally:
            del self.waiting[number]

    async def run(self) -> None:
        endpoint, delay = self.given
        spawn = get_context("spawn")
        while True:
            self.pipe, theirs = spawn.Pipe()
            process = spawn.Process(target=run_model, args=(endpoint, theirs, delay))
            await to_thread.run_sync(process.start)
            theirs.close()  # so that ours ends when the model does
            try:
                await self.listen(self.pipe)
            finally:
                self.pipe.close()  # at which the model ends
                self.pipe = None
                for answer in self.waiting.values():
                    if not answer.done():
                        answer.set_exception(ModelLost("the model's process has ended"))
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(process.join, 5)
                    process.kill()
            log.error("the model ended with exit code %s: starting another", process.exitcode)
            await anyio.sleep(0.2)

    async def listen(self, pipe: Connection) -> None:
        """Hand out answers until the process ends."""
        with suppress(EOFError, ConnectionError):
            while True:
                await anyio.wait_readable(pipe)
                number, answer = pipe.recv()
                waiting = self.waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)


class Service:
    """The slab, the model, and how long it takes."""

    def __init__(self, cache: featcache.FeatureCache, delay: float) -> None:
        self.cache = cache
        self.model = Model(cache.endpoint, delay)
        self.seconds = 0.1  # that the model takes for a picture, as lately measured
        self.waiting = 0  # pictures that the model has before it

    async def admit(self) -> None:
        """Raise 503 while the slab is nearly full of unread images."""
        try:
            await self.cache.pressure.below(ADMIT_BELOW, timeout=MOMENT_S)
        except featcache.GetTimeout as error:
            raise self.refusal(error) from error

    def refusal(self, error: Exception) -> HTTPException:
        """Tell the client to come back when what is before it may be done."""
        after = {"Retry-After": str(max(1, math.ceil(self.waiting * self.seconds)))}
        return HTTPException(503, f"too busy: {error}", headers=after)

    async def answer(self, picture: Tensor) -> list[float]:
        try:
            ref = await self.cache.put(picture, readers=["model"], timeout=PUT_S)
        except (featcache.PutTimeout, featcache.PoolFull) as error:
            raise self.refusal(error) from error
        except featcache.FeatureTooLarge as error:
            raise HTTPException(413, str(error)) from error
        answered = False
        self.waiting += 1
        try:
            answer = await self.ask_model(ref)
            answered = True
            return answer
        finally:
            self.waiting -= 1
            if not answered:  # the client has left, or the model died: nobody will read it
                with anyio.CancelScope(shield=True), suppress(featcache.StaleRef):
                    await self.cache.discard(ref)

    async def ask_model(self, ref: featcache.FeatureRef) -> list[float]:
        begun, before = time.monotonic(), self.waiting
        try:
            seen = await self.model.ask(ref)
        except ModelLost as error:  # what its name owed is paid
            raise self.refusal(error) from error
        self.seconds += 0.2 * ((time.monotonic() - begun) / before - self.seconds)
        return seen


def decode(data: bytes) -> Tensor:
    """The picture as bytes in the shape (height, width, 3)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise HTTPException(413, f"a picture may have {MAX_PIXELS} pixels")
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(415, "not a picture that can be read") from error


async def receive(request: Request) -> bytes:
    too_large = HTTPException(413, f"an upload may have {MAX_BYTES} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_BYTES:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:  # one that did not say how long it is
            raise too_large
    return bytes(data)


def forget(*_: object) -> Response:
    """The response to a client that has gone: nobody will see it."""
    return Response(status_code=499)


def refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def post_picture(request: Request) -> Response:
    service: Service = request.state.service
    await service.admit()
    picture = await to_thread.run_sync(decode, await receive(request))
    response = forget()

    async def watch_client() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch_client)
        try:
            response = JSONResponse({"colour": await service.answer(picture)})
        except HTTPException as error:  # out of the group it would be in an ExceptionGroup
            response = refuse(request, error)
        group.cancel_scope.cancel()
    return response


async def get_pressure(request: Request) -> Response:
    cache: featcache.FeatureCache = request.state.service.cache
    seen = cache.statistics()
    names = ("used_bytes", "puts", "recycled", "discarded", "waiters")
    figures = {name: getattr(seen, name) for name in names}
    return JSONResponse({"level": str(cache.pressure.level), "pid": os.getpid(), **figures})


def application(options: argparse.Namespace) -> Starlette:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with featcache.create(capacity=options.capacity) as cache:
            service = Service(cache, options.delay)
            async with anyio.create_task_group() as group:
                group.start_soon(service.model.run)
                yield {"service": service}
                group.cancel_scope.cancel()

    return Starlette(
        routes=[
            Route("/pictures", post_picture, methods=["POST"]),
            Route("/pressure", get_pressure),
        ],
        exception_handlers={HTTPException: refuse, ClientDisconnect: forget},
        lifespan=lifespan,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 for one that is free")
    add("--capacity", default="64MiB", help="of the slab (default: %(default)s)")
    add("--delay", type=float, default=0.0, help="seconds that the model takes, to see it fill")
    options = parser.parse_args()
    host, port = options.host, options.port
    uvicorn.run(application(options), host=host, port=port, timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
