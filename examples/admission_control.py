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
import math
import os
import signal
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager, suppress
from functools import partial
from multiprocessing import get_context, parent_process
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


# --- the model's process ---------------------------------------------------------------------------

model_cache: blocking.FeatureClient


def attach(endpoint: str) -> None:
    """Runs once in the model's process."""
    global model_cache  # noqa: PLW0603 - the pool's functions have nothing else to share
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # ctrl-c is for the server, which ends this process
    torch.set_num_threads(1)
    model_cache = blocking.connect(endpoint, name="model").open()


def end_with_parent() -> None:
    """An executor's process waits for work for ever, also when a SIGKILL has ended who would send it."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def look(data: bytes, delay: float) -> list[float]:
    """Stands for a model: the mean colour. Leaving the block pays the read, and frees the bytes."""
    with model_cache.borrow(featcache.FeatureRef.from_bytes(data)) as picture:
        assert isinstance(picture, Tensor)
        time.sleep(delay)
        return [round(value, 3) for value in picture.float().mean(dim=(0, 1)).tolist()]


# --- the server ------------------------------------------------------------------------------------


class Service:
    """The slab, the model, and how long it takes."""

    def __init__(self, cache: featcache.FeatureCache, delay: float) -> None:
        self.cache = cache
        self.delay = delay
        self.seconds = 0.1  # that the model takes for a picture, as lately measured
        self.waiting = 0  # pictures that the model has before it
        self.model = self.start_model()

    def start_model(self) -> ProcessPoolExecutor:
        given = (self.cache.endpoint,)
        return ProcessPoolExecutor(1, get_context("spawn"), initializer=attach, initargs=given)

    async def admit(self) -> None:
        """Raise 503 while the slab is nearly full of what the model has not read yet."""
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
        model = self.model
        begun, before = time.monotonic(), self.waiting
        loop = asyncio.get_running_loop()
        try:
            seen = await loop.run_in_executor(model, look, ref.to_bytes(), self.delay)
        except BrokenProcessPool as error:  # its process was killed; what its name owed is paid
            if self.model is model:  # the first who sees it starts another
                self.model = self.start_model()
            raise self.refusal(error) from error
        except featcache.OwnerLost as error:  # this server's own pool, closed while it stops
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
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"an upload may have {MAX_BYTES} bytes")
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
    figures = {name: getattr(seen, name) for name in ("used_bytes", "puts", "recycled", "waiters")}
    return JSONResponse({"level": str(cache.pressure.level), "pid": os.getpid(), **figures})


def application(options: argparse.Namespace) -> Starlette:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with featcache.create(capacity=options.capacity) as cache:
            service = Service(cache, options.delay)
            try:
                yield {"service": service}
            finally:  # in a thread: the model says goodbye to this loop's owner as it ends
                await to_thread.run_sync(partial(service.model.shutdown, cancel_futures=True))

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
