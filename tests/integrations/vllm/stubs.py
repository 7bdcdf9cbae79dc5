"""As much of vLLM's modules as the connector's imports, for machines to which its wheel can't be taken.

Only for the GPU proof, which drives the connector's classes with no engine. Where vLLM is, it is used.
"""

import enum
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class Base:
    """The part of vLLM's base class that runners and schedulers reach through."""

    def __init__(self, vllm_config: Any, role: Role) -> None:
        self._vllm_config, self.role = vllm_config, role
        self._connector_metadata: Any = None
        chosen = vllm_config.ec_transfer_config.ec_role
        self.is_producer, self.is_consumer = chosen != "ec_consumer", chosen != "ec_producer"

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._connector_metadata = metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None


class Told:
    """A metadata class."""


@dataclass
class Stats:
    data: dict[str, Any] = field(default_factory=dict)


def install() -> None:
    """Put the stubs in place of vLLM, unless it is there."""
    if find_spec("vllm") is not None:
        return
    connector = "vllm.distributed.ec_transfer.ec_connector"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {"model_parallel_is_initialized": lambda: False},
        "vllm.distributed.ec_transfer": {},
        connector: {},
        f"{connector}.base": {
            "ECConnectorBase": Base,
            "ECConnectorRole": Role,
            "ECConnectorMetadata": Told,
            "ECConnectorWorkerMetadata": Told,
        },
        f"{connector}.metrics": {"ECConnectorStats": Stats, "ECConnectorPromMetrics": object},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__path__ = []  # a package
        vars(module).update(members)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


def config(endpoint: str, engine: str, role: str, ranks: int) -> Any:
    """As much of a VllmConfig as the connector looks at."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model="proof", dtype="bfloat16", multimodal_config=None),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, data_parallel_rank=0),
        ec_transfer_config=SimpleNamespace(
            engine_id=engine,
            ec_role=role,
            ec_connector_extra_config={"endpoint": endpoint, "connect_wait": 30.0},
        ),
    )
