from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from examples.waiting import until

if TYPE_CHECKING:
    from examples.conftest import Start
    from support.programs import Program

# Pictures of 400 x 300 take 360 kB: with three of them the slab is 93 % full.
OPTIONS = ("--port", 0, "--capacity", "1.1MiB")
ENDED = {0, -signal.SIGTERM}  # uvicorn ends by the signal, once it is done


class Server:
    def __init__(self, example: Program) -> None:
        self.example = example
        said = until(lambda: re.search(r"running on (http://\S+)", example.errors()))
        assert said is not None
        self.client = httpx.Client(base_url=said[1], timeout=30)

    def upload(self, picture: Path) -> httpx.Response:
        return self.client.post("/pictures", content=picture.read_bytes())

    def once(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What is said of the pressure, once it is so."""

        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = self.client.get("/pressure").json()
            return found if holds(found) else None

        found = until(look)
        assert found is not None
        return found

    def idle(self) -> dict[str, Any]:
        return self.once(lambda now: now["used_bytes"] == 0)

    def started(self, picture: Path) -> None:
        until(lambda: self.upload(picture).status_code == 200)

    @contextmanager
    def stopped_model(self) -> Iterator[psutil.Process]:
        """While it stands still nothing is read."""
        (model,) = self.example.children()
        model.suspend()
        yield model
        with suppress(psutil.NoSuchProcess):
            model.resume()

    @contextmanager
    def full(self, picture: Path) -> Iterator[list[Any]]:
        """While the model stands still with three pictures before it: the answers that they will get."""
        with ThreadPoolExecutor(3) as pool, self.stopped_model():
            asked = [pool.submit(self.upload, picture) for _ in range(3)]
            self.once(lambda now: now["level"] == "high")
            yield asked

    def close(self) -> None:
        self.client.close()


@pytest.fixture(scope="module")
def server(start: Start, pictures: list[Path]) -> Iterator[Server]:
    with start("admission_control.py", *OPTIONS) as example, closing(Server(example)) as server:
        server.started(pictures[0])
        yield server
        # What was let in is answered before it stops.
        with server.full(pictures[0]) as asked:
            example.signal(signal.SIGTERM)
            until(lambda: "Shutting down" in example.errors())
        assert [each.result().status_code for each in asked] == [200] * 3
        assert example.ends() in ENDED


def says(url: httpx.URL, size: int) -> str:
    """What the server says to the head of an upload, with no byte of its body sent."""
    head = f"POST /pictures HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {size}\r\n\r\n"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode())
        return connection.recv(1 << 16).decode()


def test_under_pressure_a_request_is_refused_before_its_body_is_read(
    server: Server, pictures: list[Path]
) -> None:
    server.idle()
    with server.full(pictures[0]) as asked:
        said = says(server.client.base_url, 1_000_000)
        assert said.startswith("HTTP/1.1 503 ")
        after = re.search(r"^retry-after: (\d+)\r$", said, re.MULTILINE)
        assert after is not None
        assert int(after[1]) >= 1
    assert [each.result().status_code for each in asked] == [200] * 3
    assert server.upload(pictures[0]).status_code == 200


def test_a_crowd_is_told_to_come_back_and_no_queue_grows(
    server: Server, pictures: list[Path]
) -> None:
    before = server.idle()
    with server.full(pictures[0]) as asked, ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(server.upload, [pictures[0]] * 9))
        assert {answer.status_code for answer in answers} == {503}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
        assert server.once(lambda _: True)["waiters"] == 0
    assert [each.result().status_code for each in asked] == [200] * 3
    after = server.idle()
    assert after["puts"] == after["recycled"] == before["puts"] + 3


def test_those_let_in_together_wait_a_moment_for_room(server: Server, pictures: list[Path]) -> None:
    server.idle()
    with ThreadPoolExecutor(5) as pool, server.stopped_model():
        asked = [pool.submit(server.upload, pictures[0]) for _ in range(5)]
        server.once(lambda now: now["level"] in {"high", "exhausted"})
        until(lambda: sum(each.done() for each in asked) == 2)
    assert sorted(each.result().status_code for each in asked) == [200, 200, 200, 503, 503]
    server.idle()


def test_a_client_that_leaves_takes_its_picture_along(server: Server, pictures: list[Path]) -> None:
    before = server.idle()
    data = pictures[0].read_bytes()
    url = server.client.base_url
    head = f"POST /pictures HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(data)}\r\n\r\n"
    with server.stopped_model():
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(head.encode() + data)
            server.once(lambda now: now["used_bytes"] > 0)
        server.once(lambda now: now["discarded"] == before["discarded"] + 1)
    assert server.idle()["recycled"] == before["recycled"] + 1
    assert server.upload(pictures[0]).status_code == 200


def test_a_killed_model_is_replaced(server: Server, pictures: list[Path]) -> None:
    server.idle()
    with server.full(pictures[0]) as asked:
        (model,) = server.example.children()
        model.kill()
        assert [each.result().status_code for each in asked] == [503] * 3
    server.started(pictures[0])
    assert server.idle()["level"] == "normal"


def test_bad_pictures_are_refused(server: Server) -> None:
    answer = server.client.post("/pictures", content=b"GIF89a, or so it says")
    assert answer.status_code == 415
    assert answer.json()["error"]
    assert says(server.client.base_url, 33 * 2**20).startswith("HTTP/1.1 413 ")
    server.idle()


def test_the_model_does_not_outlive_a_killed_server(start: Start, pictures: list[Path]) -> None:
    with start("admission_control.py", *OPTIONS) as example, closing(Server(example)) as server:
        server.started(pictures[0])
        with server.full(pictures[0]) as asked:
            example.signal(signal.SIGKILL)
            assert all(isinstance(each.exception(), httpx.TransportError) for each in asked)
        example.assert_no_children()
