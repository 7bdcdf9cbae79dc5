"""The application: an uploaded picture is decoded, put once for the workers, and looked at.

A client that goes away, or a worker that takes too long, leaves nothing behind: the ref is
discarded. While the pool is full, requests wait a little and are then told to come back (503).
"""

import argparse
import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import numpy as np
import torch
from anyio import to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

import featcache
from worker import LOOKS
from workers import Worker, WorkerLost

WORKERS = tuple(LOOKS)
MAX_UPLOAD_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000


async def receive(request: Request) -> bytes:
    """The uploaded file, of a form or bare."""
    size = request.headers.get("content-length")
    if size is None:
        raise HTTPException(411, "say how long the upload is (Content-Length)")
    if int(size) > MAX_UPLOAD_BYTES:
        raise HTTPException(413, f"an upload may have {MAX_UPLOAD_BYTES} bytes")
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await request.body()
    async with request.form(max_files=1) as form:
        for value in form.values():
            if isinstance(value, UploadFile):
                return await value.read()
    raise HTTPException(400, "the form has no file")


def decode(data: bytes) -> Tensor:
    """The picture as bytes in the shape (height, width, 3)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise HTTPException(413, f"a picture may have {MAX_PIXELS} pixels")
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(415, "not a picture that can be read") from error


async def look(request: Request, picture: Tensor) -> JSONResponse:
    """Put the picture for all workers and gather what they answer."""
    cache: featcache.FeatureCache = request.state.cache
    workers: list[Worker] = request.state.workers
    options: argparse.Namespace = request.state.options
    try:
        ref = await cache.put(picture, readers=WORKERS, timeout=options.put_timeout)
    except featcache.PutTimeout as error:
        raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
    except featcache.FeatureTooLarge as error:
        raise HTTPException(413, str(error)) from error
    answered = False
    try:
        with anyio.fail_after(options.timeout):
            answers = await asyncio.gather(*(worker.ask(ref) for worker in workers))
        answered = True
    except TimeoutError as error:
        raise HTTPException(504, "the workers took too long") from error
    except WorkerLost as error:
        raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
    finally:
        if not answered:  # a timeout, a lost worker, or the client has gone: take the ref back
            with anyio.CancelScope(shield=True), suppress(featcache.StaleRef):
                await cache.discard(ref)
    return JSONResponse(dict(zip(WORKERS, answers, strict=True)))


def refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def forget(*_: object) -> Response:
    """The response to a client that has gone: nobody will see it."""
    return Response(status_code=499)


async def post_image(request: Request) -> Response:
    picture = await to_thread.run_sync(decode, await receive(request))
    response = forget()

    async def watch_client() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch_client)
        try:
            response = await look(request, picture)
        except HTTPException as error:
            response = refuse(request, error)
        group.cancel_scope.cancel()
    return response


async def get_statistics(request: Request) -> Response:
    now = request.state.cache.statistics()
    names = ("capacity_bytes", "used_bytes", "puts", "recycled", "waited", "waiters", "sessions")
    return JSONResponse({name: getattr(now, name) for name in names})


def application(options: argparse.Namespace) -> Starlette:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with featcache.create(capacity=options.capacity) as cache:
            workers = [Worker(name, cache.endpoint, options.delay) for name in WORKERS]
            async with anyio.create_task_group() as group:
                for worker in workers:
                    group.start_soon(worker.run)
                with anyio.fail_after(60):
                    for worker in workers:
                        await worker.attached.wait()
                yield {"cache": cache, "workers": workers, "options": options}
                group.cancel_scope.cancel()

    return Starlette(
        routes=[
            Route("/images", post_image, methods=["POST"]),
            Route("/statistics", get_statistics),
        ],
        exception_handlers={HTTPException: refuse, ClientDisconnect: forget},
        lifespan=lifespan,
    )
