"""The engines that tests of whole engines share: an engine takes longer to start than most tests."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.vllm import tiny_llava
from integrations.vllm.enginehost import Engine
from integrations.vllm.fleet import Engines, attached, config
from integrations.vllm.owners import Owner


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fc-") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def endpoint(folder: Path) -> Path:
    return folder / "owner.sock"


@pytest.fixture(scope="session")
def engines(folder: Path, endpoint: Path) -> Iterator[Engines]:
    """Seven engines that start side by side, with no owner yet; each rank of `ranks` is a process."""
    model = tiny_llava.write(folder / "model", weights=True)
    # A long wait: on a busy machine an engine takes its time, and one encoder is what is to be seen.
    extra = {"peer_wait": 60.0, "connect_wait": 0.0}
    roles = {
        "producer": "ec_producer",
        "first": "ec_consumer",
        "second": "ec_consumer",
        "left": "ec_both",
        "right": "ec_both",
    }
    started = {"plain": Engine(model)}
    for name, role in roles.items():
        started[name] = Engine(model, config(endpoint, name, role, **extra))
    started["ranks"] = Engine(
        model,
        config(endpoint, "ranks", "ec_consumer", **extra),
        processes=True,
        tensor_parallel_size=2,
        disable_log_stats=False,
    )
    try:
        for engine in started.values():
            engine.ready()
        yield started
    finally:
        for engine in started.values():
            engine.close()


@pytest.fixture
def owner(endpoint: Path, engines: Engines) -> Iterator[Owner]:
    with Owner(endpoint) as serving:
        attached(engines)
        yield serving
