"""FastAPI, several uvicorn workers, one `featcache serve`: each picture is encoded once on the host.

    pip install 'featcache[cli]' fastapi uvicorn pillow
    export FEATCACHE_ENDPOINT=/tmp/featcache-pictures.sock
    featcache serve --capacity 1GiB &
    uvicorn --app-dir examples/fastapi_server app:app --workers 4

    curl --data-binary @cat.png http://127.0.0.1:8000/embeddings

Workers come and go, and so does the owner: a killed worker's claims pass on to the others, and while
there is no owner every worker encodes for itself.
"""

import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypedDict

import anyio
import torch
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Request, Response
from torch import Tensor

import featcache
from encoder import VERSION, BadPicture, Encoder, encode, load
from shared import SharedCache

MAX_UPLOAD_BYTES = 32 * 2**20


class State(TypedDict):
    """What requests find in `request.state`."""

    cache: SharedCache
    encoder: Encoder
    encoding: CapacityLimiter
    counts: Counter[str]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[State]:
    """uvicorn leaves this block at SIGTERM, once it has answered what it had accepted."""
    torch.set_num_threads(1)  # the workers are the parallelism
    cache = SharedCache(os.environ["FEATCACHE_ENDPOINT"])
    async with anyio.create_task_group() as group:
        group.start_soon(cache.stay_connected)
        yield State(
            cache=cache,
            encoder=await to_thread.run_sync(load),
            encoding=CapacityLimiter(1),  # pictures at a time
            counts=Counter(),
        )
        group.cancel_scope.cancel()  # which says goodbye to the owner


app = FastAPI(lifespan=lifespan)


@app.post("/embeddings")
async def embeddings(request: Request) -> Any:
    """Encode the picture in the body, or find what any worker made of the same bytes."""
    data = await receive(request)
    return await unless_client_leaves(request, lambda: embed(request, data))


@app.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """What a load balancer asks for. Without a cache the worker is slower, not down."""
    state = request.state
    client = state.cache.client
    seen = featcache.Statistics() if client is None else client.statistics()
    return {
        "worker": os.getpid(),
        "cache": client is not None,
        "keys": seen.keys,
        "used_bytes": seen.used_bytes,
        "encoded": state.counts["encoded"],
        "cancelled": state.counts["cancelled"],
    }


async def embed(request: Request, data: bytes) -> dict[str, Any]:
    state = request.state
    encoded = False

    async def make() -> Tensor:
        nonlocal encoded
        features = await to_thread.run_sync(encode, state.encoder, data, limiter=state.encoding)
        encoded = True
        state.counts["encoded"] += 1
        return features

    # In a thread: to hash 32 MiB takes more than ten milliseconds, in which nobody else is served.
    key = await to_thread.run_sync(featcache.content_key, VERSION.encode() + b"\0" + data)
    try:
        features = await state.cache.get_or_make(key, make)
    except BadPicture as error:
        raise HTTPException(415, str(error)) from error
    return {
        "worker": os.getpid(),
        "encoded": encoded,
        "shape": list(features.shape),
        "embedding": features.mean(dim=0).tolist(),
    }


async def receive(request: Request) -> bytes:
    """The body, given up as soon as it is too long, whatever its length was said to be."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_UPLOAD_BYTES:
            raise HTTPException(413, f"an upload may have {MAX_UPLOAD_BYTES} bytes")
    return bytes(data)


async def unless_client_leaves(request: Request, work: Callable[[], Awaitable[Any]]) -> Any:
    """Cancel the work when the client closes its connection: neither FastAPI nor uvicorn does."""
    result: Any = Response(status_code=499)  # which nobody will see
    error: HTTPException | None = None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        request.state.counts["cancelled"] += 1
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            result = await work()
        except HTTPException as refused:  # out of the group it would be in an ExceptionGroup
            error = refused
        group.cancel_scope.cancel()
    if error is not None:
        raise error
    return result
