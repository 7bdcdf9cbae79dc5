from __future__ import annotations

import io
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from examples.conftest import Start
    from support.programs import Program

# A picture of 400 x 300 takes 360 kB: the pool has room for two while the workers look at one.
OPTIONS = ("--port", 0, "--capacity", "900KiB", "--delay", 0.3, "--put-timeout", 0.2)


class Server:
    """A server that listens."""

    def __init__(self, example: Program) -> None:
        self.example = example
        self.client = httpx.Client(base_url=example.line("listening on "), timeout=20)

    def upload(self, picture: Path) -> httpx.Response:
        return self.client.post("/images", content=picture.read_bytes())

    def statistics(self) -> dict[str, int]:
        found: dict[str, int] = self.client.get("/statistics").json()
        return found

    def idle(self) -> dict[str, int]:
        """The statistics once the pool is empty again."""
        return self._until(lambda now: now["used_bytes"] == 0)

    def busy(self) -> dict[str, int]:
        """The statistics once a picture is in the pool."""
        return self._until(lambda now: now["used_bytes"] > 0)

    def close(self) -> None:
        self.client.close()

    def _until(self, wanted: Callable[[dict[str, int]], bool]) -> dict[str, int]:
        give_up = time.monotonic() + 10
        while not wanted(now := self.statistics()):
            assert time.monotonic() < give_up, now
            time.sleep(0.01)
        return now


@pytest.fixture(scope="module")
def server(start: Start, pictures: list[Path]) -> Iterator[Server]:
    with start("server", *OPTIONS) as example, closing(Server(example)) as server:
        yield server
        # What had begun is finished before it stops.
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.upload, pictures[0])
            server.busy()
            example.signal(signal.SIGTERM)
            assert asked.result().status_code == 200
        assert example.ends() == 0


@pytest.mark.parametrize("form", [True, False], ids=["form", "bare"])
def test_workers_answer_an_upload(server: Server, pictures: list[Path], form: bool) -> None:
    data = pictures[0].read_bytes()
    if form:
        response = server.client.post("/images", files={"image": ("colour.png", data)})
    else:
        response = server.client.post("/images", content=data)
    assert response.status_code == 200
    pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32)
    answer = response.json()
    assert answer["w0"] == pytest.approx(pixels.mean(axis=(0, 1)).tolist(), abs=1e-2)
    assert len(answer["w1"]) == 8
    assert sum(answer["w1"]) == 400 * 300
    now = server.idle()
    assert now["puts"] == now["recycled"]


def test_bad_uploads_are_refused(server: Server) -> None:
    large = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(large, "PNG")
    answers = {
        "no picture": server.client.post("/images", content=b"GIF89a, or so it says"),
        "no file": server.client.post("/images", files={"image": (None, "a field")}),
        "no length": server.client.post("/images", content=iter([b"x"])),
        "too large": server.client.post("/images", content=large.getvalue()),
        "other way": server.client.get("/images"),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == {
        "no picture": 415,
        "no file": 400,
        "no length": 411,
        "too large": 413,
        "other way": 405,
    }
    assert all(answer.json()["error"] for answer in answers.values())
    server.idle()


def test_a_full_pool_tells_clients_to_come_back(server: Server, pictures: list[Path]) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(server.upload, [pictures[0]] * 6))
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]
    assert server.idle()["waited"] > 0


def test_a_client_that_leaves_takes_its_picture_along(server: Server, pictures: list[Path]) -> None:
    before = server.idle()
    data = pictures[0].read_bytes()
    url = server.client.base_url
    with socket.create_connection((url.host, url.port)) as connection:
        head = f"POST /images HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        server.busy()
    now = server.idle()
    assert now["puts"] == before["puts"] + 1
    assert now["recycled"] == before["recycled"] + 1


def test_a_killed_worker_is_replaced(server: Server, pictures: list[Path]) -> None:
    worker = next(child for child in server.example.children() if "w1" in child.cmdline())
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.upload, pictures[0])
        server.busy()
        worker.kill()
        assert asked.result().status_code == 503
    give_up = time.monotonic() + 30
    while server.upload(pictures[0]).status_code != 200:
        assert time.monotonic() < give_up
        time.sleep(0.1)
    now = server.idle()
    assert now["puts"] == now["recycled"]


def test_no_worker_outlives_a_killed_server(start: Start, pictures: list[Path]) -> None:
    with start("server", *OPTIONS) as example, closing(Server(example)) as server:
        assert len(example.children()) == 2
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.upload, pictures[0])
            server.busy()
            example.signal(signal.SIGKILL)
            assert isinstance(asked.exception(), httpx.TransportError)
        example.assert_no_children()
