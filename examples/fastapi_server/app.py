"""FastAPI, several uvicorn workers, one `featcache serve`: each picture is encoded once on the host.

    pip install 'featcache[cli]' fastapi uvicorn pillow
    export FEATCACHE_ENDPOINT=/tmp/featcache-pictures.sock
    featcache serve --capacity 1GiB &
    uvicorn --app-dir examples/fastapi_server app:app --workers 4

    curl --data-binary @cat.png http://127.0.0.1:8000/embeddings

The picture that a killed worker was encoding is encoded by another that wants it; uvicorn starts a new
worker. A cache that is down costs hits, never requests: while no owner is there each worker encodes for
itself, and it attaches to the next owner by itself (`reconnect=True`).
"""

import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypedDict

import anyio
import torch
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect
from torch import Tensor

import featcache
from encoder import VERSION, BadPicture, Encoder, encode, load

MAX_UPLOAD_BYTES = 32 * 2**20
OTHERS_S = 30.0  # for a feature that another worker makes; then this one makes its own
ROOM_S = 0.2  # for room for a feature that was made here; then it is not shared

log = logging.getLogger("uvicorn.error")


class State(TypedDict):
    """What requests find in `request.state`."""

    cache: featcache.FeatureClient
    encoder: Encoder
    encoding: CapacityLimiter
    counts: Counter[str]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[State]:
    """Uvicorn leaves this block at SIGTERM, once it has answered what it had accepted."""
    torch.set_num_threads(1)  # the workers are the parallelism
    encoder = await to_thread.run_sync(load)
    async with featcache.connect(os.environ["FEATCACHE_ENDPOINT"], reconnect=True) as cache:
        # encoding: one picture at a time; the others wait without a thread each
        yield State(cache=cache, encoder=encoder, encoding=CapacityLimiter(1), counts=Counter())


app = FastAPI(lifespan=lifespan)


@app.exception_handler(ClientDisconnect)
async def forget(*_: Any) -> Response:
    """The response to a client that has gone: nobody will see it."""
    return Response(status_code=499)


@app.post("/embeddings")
async def embeddings(request: Request) -> Any:
    """Encode the picture in the body, or find what any worker made of the same bytes."""
    data = await receive(request)
    return await unless_client_leaves(request, lambda: embed(request.state, data))


@app.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """What a load balancer asks for. Without a cache the worker is slower, not down."""
    state = request.state
    seen = state.cache.statistics()
    return {
        "worker": os.getpid(),
        "cache": state.cache.is_attached,
        "keys": seen.keys,
        "used_bytes": seen.used_bytes,
        "encoded": state.counts["encoded"],
        "cancelled": state.counts["cancelled"],
    }


async def embed(state: Any, data: bytes) -> dict[str, Any]:
    encoded = False

    async def make() -> Tensor:
        nonlocal encoded
        features = await to_thread.run_sync(encode, state.encoder, data, limiter=state.encoding)
        encoded = True
        state.counts["encoded"] += 1
        return features

    # In a thread: to hash 32 MiB takes more than ten milliseconds, in which nobody else is served.
    key = await to_thread.run_sync(featcache.content_key, VERSION + data)
    try:
        features = await get_or_make(state.cache, key, make)
    except BadPicture as error:
        raise HTTPException(415, str(error)) from error
    return {
        "worker": os.getpid(),
        "encoded": encoded,
        "shape": list(features.shape),
        "embedding": features.mean(dim=0).tolist(),
    }


async def get_or_make(
    cache: featcache.FeatureClient, key: bytes, make: Callable[[], Awaitable[Tensor]]
) -> Tensor:
    """`get_or_put` that goes on without the cache: the feature is then made here and not shared."""
    made: Tensor | None = None

    async def make_once() -> Tensor:
        nonlocal made
        made = await make()
        scope.deadline = anyio.current_time() + ROOM_S  # from here on it waits for room, if at all
        return made

    with anyio.CancelScope() as scope:
        try:
            found = await cache.get_or_put(key, make_once, timeout=OTHERS_S)
        except featcache.OwnerLost:
            pass  # the log has it, once
        except featcache.FeatcacheError as error:
            log.warning("not shared: %s", error)
        else:
            assert isinstance(found, Tensor)  # not a dict of tensors, as may be put too
            return found
    return await make() if made is None else made


async def receive(request: Request) -> bytes:
    too_large = HTTPException(413, f"an upload may have {MAX_UPLOAD_BYTES} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_UPLOAD_BYTES:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_UPLOAD_BYTES:  # one that did not say how long it is
            raise too_large
    return bytes(data)


async def unless_client_leaves(request: Request, work: Callable[[], Awaitable[Any]]) -> Any:
    """Cancel the work when the client closes its connection: neither FastAPI nor uvicorn does."""
    result: Any = await forget()
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
