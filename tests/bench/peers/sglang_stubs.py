"""Stands in for the parts of sglang that its pool's files import, so that they run unchanged.

The packages have no code of their own, only the folder where the unpacked files are; the names below
are the only ones that those files take from the rest of sglang, with sglang's defaults behind them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

POOL_MIB = 1024  # SGLANG_MM_FEATURE_CACHE_MB
RECYCLE_INTERVAL_S = 0.05  # SGLANG_MM_ITEM_MEM_POOL_RECYCLE_INTERVAL_SEC
STREAM_ORDERED = "sglang.srt.multimodal.transport.cuda_ipc"
ONE_FILE = "sglang.srt.utils.cuda_ipc_transport_utils"


def is_stream_ordered(folder: Path) -> bool:
    return (folder / (STREAM_ORDERED.replace(".", "/") + ".py")).is_file()


def load(folder: Path, *, readers: int, rank: int) -> Any:
    """The pool's module, in a process that is this one of so many tensor-parallel ranks."""
    for name in ("sglang", "sglang.srt", "sglang.srt.multimodal", "sglang.srt.utils"):
        _package(name, folder)
    _package("sglang.srt.multimodal.transport", folder)
    utils = sys.modules["sglang.srt.utils"]
    utils.__dict__["log_info_on_rank0"] = lambda *_: None
    _module("sglang.srt.environ", envs=_envs())
    parallel = SimpleNamespace(tp_rank=rank, tp_size=readers, attn_dp_enabled=False, nnodes=1)
    _module("sglang.srt.runtime_context", get_parallel=lambda: parallel)
    arguments = SimpleNamespace(tp_size=readers)
    _module("sglang.srt.server_args", get_global_server_args=lambda: arguments)
    return importlib.import_module(STREAM_ORDERED if is_stream_ordered(folder) else ONE_FILE)


def _envs() -> SimpleNamespace:
    def fixed(value: object) -> SimpleNamespace:
        return SimpleNamespace(get=lambda: value)

    return SimpleNamespace(
        SGLANG_MM_FEATURE_CACHE_MB=fixed(POOL_MIB),
        SGLANG_MM_ITEM_MEM_POOL_RECYCLE_INTERVAL_SEC=fixed(RECYCLE_INTERVAL_S),
    )


def _package(name: str, folder: Path) -> None:
    module = _module(name)
    module.__path__ = [str(folder.joinpath(*name.split(".")))]


def _module(name: str, **names: object) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    return module
