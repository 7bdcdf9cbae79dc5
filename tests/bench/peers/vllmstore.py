"""vLLM's shared-memory object storage, with its own serializer, as its multimodal cache uses it.

Not a part of this repository: `--vllm-file` names `shm_object_storage.py` where a vllm wheel was
unpacked (of the wheel, that file and `vllm/v1/serial_utils.py` are enough). What the two import
from the rest of vllm is stood in for here; none of it is on the measured path but `tensor_data`, a
view of a tensor's bytes. The storage hands out (address, id, signature) for a key; these go to
the readers over a Unix socket. `get` returns a clone. Its `put` has no way to wait: it raises
MemoryError while the ring is full, and the owner here naps and tries again as the by-hand owner does.
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
import re
import socket
import struct
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch

from bench.peers import Cell, Sockets
from bench.peers.byhand import NAP
from bench.wire import recv_exactly

T = TypeVar("T")
REF = struct.Struct("<qqq32s")
END = -1
HEADROOM = 4096
"""for the serializer's header and the ring's own, per feature"""


def missing(cell: Cell) -> str | None:
    if cell.vllm_file is None:
        return "no --vllm-file"
    for path in (Path(cell.vllm_file), serial_utils(cell.vllm_file)):
        if not path.is_file():
            return f"no {path.name} where --vllm-file says"
    return None


def shared(_cell: Cell) -> Any:
    return get_context("spawn").Lock()


def serial_utils(vllm_file: str) -> Path:
    return Path(vllm_file).parents[2] / "v1" / "serial_utils.py"


def version(vllm_file: str) -> str:
    path = Path(vllm_file).parents[2] / "_version.py"
    found = path.is_file() and re.search(r"version = '([^']+)'", path.read_text())
    return found[1] if found else "unknown"


def _stand_in(name: str, **names: Any) -> None:
    module = sys.modules.setdefault(name, ModuleType(name))
    module.__dict__.update(names)
    parent, _, child = name.rpartition(".")
    if parent:
        _stand_in(parent)
        setattr(sys.modules[parent], child, module)


def _tensor_data(x: torch.Tensor) -> memoryview:
    return x.contiguous().view(-1).view(torch.uint8).numpy().data


def _load_file(name: str, path: str | Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load(vllm_file: str) -> ModuleType:
    """Imports the storage with the rest of vllm stood in for."""
    name = "vllm.distributed.device_communicators.shm_object_storage"
    if name in sys.modules:
        return sys.modules[name]
    _stand_in("vllm.logger", init_logger=logging.getLogger)
    _stand_in(
        "vllm.envs",
        VLLM_MSGPACK_ZERO_COPY_THRESHOLD=256,
        VLLM_ALLOW_INSECURE_SERIALIZATION=False,
    )
    fields = ["BaseMultiModalField", "MultiModalBatchedField", "MultiModalFieldConfig"]
    fields += ["MultiModalFieldElem", "MultiModalFlatField", "MultiModalKwargsItem"]
    fields += ["MultiModalKwargsItems", "MultiModalSharedField"]
    classes: dict[str, Any] = {field: type(field, (), {}) for field in fields}
    _stand_in("vllm.multimodal.inputs", NestedTensors=Any, **classes)
    _stand_in("vllm.utils.torch_utils", PIN_MEMORY=False)
    _stand_in("vllm.v1.utils", tensor_data=_tensor_data)
    _stand_in("vllm.distributed.device_communicators")
    others: dict[str, dict[str, Any]] = {
        "cloudpickle": {},
        "zmq": {"Frame": type("Frame", (), {})},
        "pydantic": {"GetCoreSchemaHandler": object},
        "pydantic_core": {"core_schema": SimpleNamespace(CoreSchema=object)},
    }
    for absent, names in others.items():
        if importlib.util.find_spec(absent) is None:
            _stand_in(absent, **names)
    _load_file("vllm.v1.serial_utils", serial_utils(vllm_file))
    return _load_file(name, vllm_file)


def _storage(cell: Cell, lock: Any, *handle: Any, create: bool = False) -> Any:
    assert cell.vllm_file is not None
    vllm = load(cell.vllm_file)
    return vllm.SingleWriterShmObjectStorage(
        max_object_size=cell.size + HEADROOM,
        n_readers=cell.readers,
        ring_buffer=vllm.SingleWriterShmRingBuffer(*handle, create=create),
        serde_class=vllm.MsgpackSerde,
        reader_lock=None if create else lock,
    )


class Owner:
    def __init__(self, cell: Cell, socks: Sockets) -> None:
        self.socks = socks
        self.storage = _storage(cell, None, cell.window * (cell.size + HEADROOM), None, create=True)
        self.count = 0
        self.hello = pickle.dumps(self.storage.ring_buffer.handle())

    def put(self, x: torch.Tensor) -> tuple[int, int, int]:
        self.count += 1
        key = str(self.count)
        while True:
            try:
                address, number = self.storage.put(key, x)
                break
            except MemoryError:
                time.sleep(NAP)
        return address, number, self.count

    def send(self, token: tuple[int, int, int]) -> None:
        self.broadcast(REF.pack(*token, bytes(self.storage.get_signature(str(token[2])))))

    def broadcast(self, data: bytes) -> None:
        for sock in self.socks:
            sock.sendall(data)

    def end(self) -> None:
        self.broadcast(REF.pack(END, 0, 0, b""))

    def close(self) -> None:
        self.storage.close()


class Reader:
    def __init__(self, cell: Cell, sock: socket.socket, hello: bytes, lock: Any) -> None:
        self.sock = sock
        self.storage = _storage(cell, lock, *pickle.loads(hello))

    def next(self) -> tuple[int, int, int, bytes] | None:
        ref = REF.unpack(recv_exactly(self.sock, REF.size))
        return None if ref[0] == END else ref

    def use(self, ref: tuple[int, int, int, bytes], consume: Callable[[torch.Tensor], T]) -> T:
        address, number, key, signature = ref
        return consume(self.storage.get(address, number, list(signature), str(key)))

    def close(self) -> None:
        self.storage.close()


def owner(cell: Cell, socks: Sockets, _shared: Any) -> Owner:
    return Owner(cell, socks)


def reader(cell: Cell, _index: int, sock: socket.socket, hello: bytes, lock: Any) -> Reader:
    return Reader(cell, sock, hello, lock)
