"""`featcache serve` and uvicorn with two workers, as their users start them."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from PIL import Image

import featcache
from examples.waiting import SERVE, until
from featcache import blocking

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="fastapi is not installed")
uvicorn = pytest.importorskip("uvicorn")

if TYPE_CHECKING:
    from examples.conftest import Start
    from support.programs import Program

WORKERS = 2
FOLDER = Path(__file__).parents[2] / "examples" / "fastapi_server"


class Service:
    """An owner, and uvicorn with workers that share it."""

    def __init__(self, start: Start, endpoint: Path) -> None:
        self.start = start
        self.endpoint = endpoint
        self.owner_life = ExitStack()
        self.server_life = ExitStack()
        self.start_owner()
        arguments = ("--app-dir", FOLDER, "--workers", WORKERS, "--port", 0, "--no-access-log")
        program = Path(uvicorn.__file__).with_name("__main__.py")
        self.server: Program = self.server_life.enter_context(start(program, *arguments, "app:app"))
        said = until(lambda: re.search(r"running on (http://\S+)", self.server.errors()))
        assert said is not None
        self.url = said[1]

    def start_owner(self) -> None:
        arguments = ("serve", "--capacity", "8MiB")  # at FEATCACHE_ENDPOINT
        self.owner: Program = self.owner_life.enter_context(self.start(SERVE, *arguments))
        assert self.owner.line("featcache serves ") == str(self.endpoint)

    def post(self, data: bytes) -> Any:
        """The answer to an upload, over a connection of its own: any worker's."""
        return httpx.post(f"{self.url}/embeddings", content=data, timeout=30)

    def embed(self, data: bytes) -> dict[str, Any]:
        answer = self.post(data)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def head(self, size: int) -> socket.socket:
        """A connection over which the head of an upload was sent."""
        url = httpx.URL(self.url)
        head = f"POST /embeddings HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {size}\r\n\r\n"
        connection = socket.create_connection((url.host, url.port))
        connection.sendall(head.encode())
        return connection

    def workers(self, cache: bool = True) -> dict[int, dict[str, Any]]:
        """What each worker says of itself, once all are there and have the cache, or have none."""
        found: dict[int, dict[str, Any]] = {}

        def all_said() -> bool:
            try:
                said = httpx.get(f"{self.url}/health", timeout=30).json()
            except httpx.TransportError:  # a worker that was just killed had it
                return False
            if said["cache"] == cache:
                found[said["worker"]] = said
            for worker in [one for one in found if not is_running(one)]:
                del found[worker]
            return len(found) == WORKERS

        until(all_said)
        return found

    def look(self) -> featcache.Snapshot:
        with blocking.observe(str(self.endpoint)) as observer:
            return observer.snapshot()

    def misses(self) -> int:
        """Lookups of all workers that found nothing, also those that wait since then."""
        return self.look().statistics.misses

    def close(self) -> None:
        self.server_life.close()
        self.owner_life.close()


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def service(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        endpoint = tmp_path_factory.mktemp("fa") / "pool.sock"
        endpoint.parent.chmod(0o700)
        patch.setenv("FEATCACHE_ENDPOINT", str(endpoint))
        service = Service(start, endpoint)
        yield service
        service.close()


@pytest.fixture(scope="module")
def photographs(pictures: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in pictures]


def variant(data: bytes, number: int) -> bytes:
    """The same picture in another file: what follows the end of an image is not looked at."""
    return data + bytes([number])


def test_each_picture_is_encoded_once_for_all_workers(
    service: Service, photographs: list[bytes]
) -> None:
    assert len(service.workers()) == WORKERS
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(service.embed, photographs * 8))
    assert sum(answer["encoded"] for answer in answers) == len(photographs)
    for picture in range(len(photographs)):
        vectors = {tuple(one["embedding"]) for one in answers[picture :: len(photographs)]}
        assert len(vectors) == 1
    workers = service.workers().values()
    assert sum(one["encoded"] for one in workers) == len(photographs)
    until(lambda: {one["keys"] for one in service.workers().values()} == {len(photographs)})


def test_bad_uploads_are_refused_and_leave_nothing(service: Service) -> None:
    before = service.workers()
    answer = service.post(b"GIF89a, or so it says")
    assert answer.status_code == 415
    assert answer.json()["detail"]
    with service.head(33 * 2**20) as connection:  # refused before its body is read
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
    after = service.workers()
    assert {one["keys"] for one in after.values()} == {one["keys"] for one in before.values()}


def key_of(data: bytes) -> bytes:
    return featcache.content_key(b"toy-vit-1\0" + data)


def test_a_client_that_leaves_is_not_worked_for(service: Service, photographs: list[bytes]) -> None:
    data = variant(photographs[0], 1)
    before = sum(one["cancelled"] for one in service.workers().values())

    def make() -> Any:  # a worker that asks meanwhile waits
        misses = service.misses()
        with service.head(len(data)) as connection:
            connection.sendall(data)
            until(lambda: service.misses() > misses)
        until(lambda: sum(w["cancelled"] for w in service.workers().values()) == before + 1)
        raise NotImplementedError

    with blocking.connect(str(service.endpoint)) as cache, pytest.raises(NotImplementedError):
        cache.get_or_put(key_of(data), make)
    assert service.embed(data)["encoded"]


def test_what_a_killed_worker_was_making_is_made_by_the_next(service: Service) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8000, 7500)).save(file, "PNG")  # which takes long to decode
    workers, misses = service.workers(), service.misses()
    made = torch.zeros(3)
    with ThreadPoolExecutor(2) as pool, blocking.connect(str(service.endpoint)) as cache:
        asked = pool.submit(service.post, file.getvalue())
        until(lambda: service.misses() > misses)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        found = pool.submit(cache.get_or_put, key_of(file.getvalue()), lambda: made)
        until(lambda: service.misses() > misses + 1)
        assert not found.done()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert found.result() is made
        assert isinstance(asked.exception(), httpx.TransportError)
    replaced = service.workers()  # by uvicorn
    assert not set(replaced) & set(workers)
    pids = {one.pid for one in service.look().sessions}
    assert pids == set(replaced)


def test_requests_go_on_without_the_owner_and_share_again_with_the_next(
    service: Service, photographs: list[bytes]
) -> None:
    service.workers()
    service.owner.signal(signal.SIGKILL)
    data = variant(photographs[2], 3)
    assert service.embed(data)["encoded"]
    service.workers(cache=False)
    assert service.embed(data)["encoded"]
    service.start_owner()
    service.workers()
    service.embed(data)
    assert not service.embed(data)["encoded"]


def test_sigterm_finishes_what_was_accepted_and_leaves_nothing(
    service: Service, photographs: list[bytes]
) -> None:
    workers = service.workers()
    data = variant(photographs[0], 4)
    with ThreadPoolExecutor(1) as pool, blocking.connect(str(service.endpoint)) as cache:

        def make() -> torch.Tensor:
            misses = service.misses()
            asked.append(pool.submit(service.embed, data))
            until(lambda: service.misses() > misses)
            service.server.signal(signal.SIGTERM)
            until(lambda: "Shutting down" in service.server.errors())
            return torch.ones(196, 192)

        asked: list[Future[dict[str, Any]]] = []
        cache.get_or_put(key_of(data), make)
        assert asked[0].result()["embedding"] == [1.0] * 192
    assert service.server.ends() == 0, service.server.errors()
    assert not any(map(is_running, workers))
    seen = service.look()
    assert seen.sessions == ()
    assert seen.statistics.readers_lost == 0  # each said goodbye
    service.owner.signal(signal.SIGTERM)
    assert service.owner.ends() == 0
    assert not service.endpoint.exists()
