"""What tests of whole engines ask of them: fresh images, right answers, how many were encoded."""

import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from featcache import blocking
from integrations.vllm.enginehost import MODULE, Answer, Engine

_seeds = count(1)
Engines = dict[str, Engine]


def fresh(number: int) -> list[int]:
    """Seeds of images that no engine has seen."""
    return [next(_seeds) for _ in range(number)]


def config(endpoint: Path, name: str, role: str, **extra: Any) -> dict[str, Any]:
    return {
        "ec_connector": "FeatcacheECConnector",
        "ec_connector_module_path": MODULE,
        "ec_role": role,
        "engine_id": name,
        "ec_connector_extra_config": {"endpoint": str(endpoint), **extra},
    }


def attached(engines: Engines) -> None:
    """Return when all engines have attached to the owner that is there now."""
    for name, engine in engines.items():
        if name not in ("plain", "ranks"):
            until(partial(engine.call, "attached"))


def until(holds: Callable[[], Any], patience_s: float = 30.0) -> None:
    give_up_s = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < give_up_s, "it did not come"


def right(engines: Engines, seeds: list[int], answers: list[Answer]) -> bool:
    """Whether these are the answers of the engine without a connector."""
    return answers == engines["plain"].ask(*seeds)


def encoded(engine: Engine, seeds: list[int], engines: Engines) -> int:
    """Ask an engine, hold its answers to those without a connector; return how many it encoded."""
    before = engine.encoded
    assert right(engines, seeds, engine.ask(*seeds))
    return engine.encoded - before


def kept(endpoint: Path, number: int) -> Callable[[], bool]:
    def reached() -> bool:
        with blocking.connect(str(endpoint)) as client:
            return client.statistics().keys >= number

    return reached
