from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from examples.conftest import Example, Start

# A picture of 400 x 300 takes 360 kB: the pool has room for two while the workers look at one.
OPTIONS = ("--port", 0, "--capacity", "900KiB", "--delay", 0.3, "--put-timeout", 0.2)


class Server:
    """A server that listens."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.address = example.line("listening on ")

    def upload(self, picture: Path) -> httpx.Response:
        return httpx.post(f"{self.address}/images", content=picture.read_bytes(), timeout=20)


@pytest.fixture(scope="module")
def server(start: Start, pictures: list[Path]) -> Iterator[Server]:
    with start("server", *OPTIONS) as example:
        server = Server(example)
        yield server
        # What had begun is finished before it stops.
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.upload, pictures[0])
            time.sleep(0.15)
            example.process.send_signal(signal.SIGTERM)
            assert asked.result().status_code == 200
        assert example.ends() == 0


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=20) as client:
        yield client


def statistics_when_idle(client: httpx.Client) -> dict[str, int]:
    give_up = time.monotonic() + 5
    while True:
        now: dict[str, int] = client.get("/statistics").json()
        if not now["used_bytes"]:
            return now
        assert time.monotonic() < give_up, now
        time.sleep(0.02)


@pytest.mark.parametrize("form", [True, False], ids=["form", "bare"])
def test_workers_answer_an_upload(client: httpx.Client, pictures: list[Path], form: bool) -> None:
    data = pictures[0].read_bytes()
    if form:
        response = client.post("/images", files={"image": ("colour.png", data)})
    else:
        response = client.post("/images", content=data)
    assert response.status_code == 200
    pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32)
    answer = response.json()
    assert answer["w0"] == pytest.approx(pixels.mean(axis=(0, 1)).tolist(), abs=1e-2)
    assert len(answer["w1"]) == 8
    assert sum(answer["w1"]) == 400 * 300
    now = statistics_when_idle(client)
    assert now["puts"] == now["recycled"]


def test_bad_uploads_are_refused(client: httpx.Client) -> None:
    large = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(large, "PNG")
    answers = {
        "no picture": client.post("/images", content=b"GIF89a, or so it says"),
        "no file": client.post("/images", data={"a": "b"}, files={}),
        "no length": client.post("/images", content=iter([b"x"])),
        "too large": client.post("/images", content=large.getvalue()),
        "other way": client.get("/images"),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == {
        "no picture": 415,
        "no file": 415,
        "no length": 411,
        "too large": 413,
        "other way": 405,
    }
    assert all(answer.json()["error"] for answer in answers.values())
    statistics_when_idle(client)


def test_a_full_pool_tells_clients_to_come_back(client: httpx.Client, pictures: list[Path]) -> None:
    data = pictures[0].read_bytes()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: client.post("/images", content=data), range(6)))
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]
    assert statistics_when_idle(client)["waited"] > 0


def test_a_client_that_leaves_takes_its_picture_along(
    client: httpx.Client, pictures: list[Path]
) -> None:
    before = statistics_when_idle(client)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/images", content=pictures[0].read_bytes(), timeout=0.15)
    now = statistics_when_idle(client)
    assert now["puts"] == before["puts"] + 1
    assert now["recycled"] == before["recycled"] + 1


def test_a_killed_worker_is_replaced(server: Server, pictures: list[Path]) -> None:
    worker = next(child for child in server.example.children() if "w1" in child.cmdline())
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.upload, pictures[0])
        time.sleep(0.15)
        worker.kill()
        assert asked.result().status_code == 503
    give_up = time.monotonic() + 30
    while server.upload(pictures[0]).status_code != 200:
        assert time.monotonic() < give_up
        time.sleep(0.1)
    with httpx.Client(base_url=server.address) as client:
        now = statistics_when_idle(client)
    assert now["puts"] == now["recycled"]


def test_no_worker_outlives_a_killed_server(start: Start, pictures: list[Path]) -> None:
    with start("server", *OPTIONS) as example:
        server = Server(example)
        assert len(example.children()) == 2
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.upload, pictures[0])
            time.sleep(0.15)
            example.process.kill()
            assert isinstance(asked.exception(), httpx.TransportError)
        example.assert_no_children()
