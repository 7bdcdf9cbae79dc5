"""vLLM's `ECCPUConnector` without an engine or a GPU: its classes, with the host in the place of its device.

An engine with it needs vLLM's second model runner, which needs Triton with a backend for the machine. Its
classes need a device's streams, events and one operation, `swap_blocks_batch`, that copies a list of pieces.
Here streams and events are none, and that operation is a `memmove` of each piece: what is timed is its own
bookkeeping and one copy each way, as on a host. Its copies are in the step's thread, as there is no stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import uuid
from types import SimpleNamespace
from typing import Any

import torch

WIDTH = 4096


class _Ended:
    """A stream, or an event on one, on which all has ended."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def record(self, _: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _moved(sources: Any, targets: Any, sizes: Any, **_: Any) -> None:
    for source, target, size in zip(
        sources.tolist(), targets.tolist(), sizes.tolist(), strict=True
    ):
        ctypes.memmove(target, source, size)


def connectors(transfer: Any, capacity_bytes: int) -> tuple[Any, Any]:
    """Return its scheduler's and its worker's half."""
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
    from vllm.distributed.ec_transfer.ec_connector.cpu import worker as workers
    from vllm.distributed.ec_transfer.ec_connector.cpu.connector import ECCPUConnector
    from vllm.platforms import current_platform

    workers.swap_blocks_batch = _moved
    workers.get_tensor_model_parallel_rank = lambda: 0
    workers.get_pcp_group = lambda: SimpleNamespace(rank_in_group=0)
    workers.torch = SimpleNamespace(
        **{name: getattr(torch, name) for name in ("empty", "int8", "uint8", "Tensor")},
        Event=_Ended,
    )
    workers.current_platform = SimpleNamespace(
        Stream=_Ended,
        stream=contextlib.nullcontext,
        current_stream=_Ended,
        device_type=current_platform.device_type,
    )
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    transfer.ec_connector_extra_config["ec_cpu_bytes"] = capacity_bytes
    transfer.mm_encoder_output_widths = {"image": WIDTH}
    config: Any = SimpleNamespace(
        use_v2_model_runner=True,
        instance_id=f"bench-{uuid.uuid4()}",
        model_config=SimpleNamespace(
            model="m",
            dtype=torch.float32,
            multimodal_config=None,
            get_inputs_embeds_size=lambda: WIDTH,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            prefill_context_parallel_size=1,
            distributed_executor_backend="mp",
            data_parallel_index=0,
        ),
        ec_transfer_config=transfer,
    )
    return (
        ECCPUConnector(config, ECConnectorRole.SCHEDULER),
        ECCPUConnector(config, ECConnectorRole.WORKER),
    )
