"""A tier in Mooncake Store: what a pool evicts lies in the memory of a whole cluster, and comes back.

::

    tier = MooncakeTier("10.0.0.1:50051")           # the address of a mooncake_master
    async with featcache.create(capacity="8GiB", tier=tier) as cache: ...

or ``featcache serve --tier featcache.integrations.mooncake:from_environment``. It needs the extra
``mooncake`` (Mooncake 0.3.13 without CUDA; other builds of it serve as well) and the system's libibverbs,
librdmacm, libnuma and liburing. Each feature is one object: the length of its header, header, data.
"""

import asyncio
import ctypes
import importlib
import os
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, Final, TypeVar

from featcache import BackendUnavailable, SettingsError
from featcache.settings import parse_bytes
from featcache.tier import MakeRoom

T = TypeVar("T")
_LENGTH: Final = struct.Struct("<I")
_FIRST_BYTES: Final = 4096
"""Read of each object before its room is asked for: the headers of all but very large dicts are shorter."""
_MAX_HEADER_BYTES: Final = 128 << 10
_NOT_THERE: Final = -704
"""Mooncake's code of a key under which nothing is."""
_THREADS: Final = 4
_DIAL_S: Final = 5.0
_VARIABLES: Final = {
    "master": "MOONCAKE_MASTER",
    "metadata": "MOONCAKE_TE_META_DATA_SERVER",
    "host": "MOONCAKE_LOCAL_HOSTNAME",
    "segment": "MOONCAKE_GLOBAL_SEGMENT_SIZE",
    "buffer": "MOONCAKE_LOCAL_BUFFER_SIZE",
    "protocol": "MOONCAKE_PROTOCOL",
    "device": "MOONCAKE_DEVICE",
}


class MooncakeTier:
    """A `featcache.tier.Tier` over one client of a Mooncake Store.

    The store evicts by itself when it is full, and replicates as it is configured. Several pools can share
    one: equal keys have to mean equal features.
    """

    def __init__(
        self,
        master: str,
        *,
        metadata: str = "P2PHANDSHAKE",
        host: str = "127.0.0.1",
        segment: int | str = "1GiB",
        buffer: int | str = "64MiB",
        protocol: str = "tcp",
        device: str = "",
        prefix: str = "featcache/",
    ) -> None:
        """Connect to a store; this takes a moment, so do it before the cache serves.

        Args:
            master: the address of ``mooncake_master``, ``host:port``.
            metadata: Mooncake's metadata server; by default its clients find each other without one.
            host: the name or address at which other clients reach this one.
            segment: bytes of this process's memory that the store may use; 0 is none.
            buffer: bytes of the client's own buffer: a feature must fit.
            protocol: ``"tcp"`` or ``"rdma"``.
            device: the RDMA devices, by name; empty is all.
            prefix: of this pool's keys in the store.

        Raises:
            BackendUnavailable: Mooncake is not installed, or the store does not answer.
            SettingsError: a size is invalid.

        """
        segment_bytes = parse_bytes(segment, "segment", minimum=0)
        buffer_bytes = parse_bytes(buffer, "buffer")
        try:
            store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
        except ImportError as error:
            raise BackendUnavailable(
                f"Mooncake can't be imported ({error}): pip install 'featcache[mooncake]', and "
                "libibverbs1, librdmacm1, libnuma1 and liburing2 of the system"
            ) from error
        _check_master(master)
        code = store.setup(host, metadata, segment_bytes, buffer_bytes, protocol, device, master)
        if code:
            raise BackendUnavailable(f"no Mooncake Store at {master}: its client returned {code}")
        self._store: Any = store
        self._prefix = prefix
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="featcache-mooncake")

    async def put(self, key: bytes, header: bytes, data: memoryview) -> None:
        """Store a feature, in place of what is there."""
        head = _LENGTH.pack(len(header)) + header
        code = await self._run(lambda: self._store.upsert_parts(self._name(key), head, data))
        _check(code)

    async def get(self, key: bytes, room: MakeRoom) -> int | None:
        """Read a feature straight into the cache's memory."""
        name = self._name(key)
        head = await self._run(lambda: self._head(name))
        if head is None:
            return None
        header, at, nbytes = head
        view = await room(header)
        if view.nbytes != nbytes:
            raise ValueError(f"the object has {nbytes} bytes of data, not {view.nbytes}")
        return await self._run(lambda: self._read(name, view, at))

    async def has(self, key: bytes) -> bool:
        """Whether something is stored under a key."""
        return bool(await self._run(lambda: self._store.is_exist(self._name(key)) == 1))

    async def remove(self, key: bytes) -> None:
        """Remove what is stored under a key, also while it is read."""
        code = await self._run(lambda: self._store.remove(self._name(key), True))
        if code != _NOT_THERE:
            _check(code)

    async def close(self) -> None:
        """Leave the store, and take this process's part of it along."""
        await self._run(self._store.close)
        self._threads.shutdown(wait=False)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _name(self, key: bytes) -> str:
        # The header has the whole key, and the cache compares it.
        return self._prefix + blake2b(key, digest_size=20).hexdigest()

    # --- in threads -------------------------------------------------------------------------------

    def _head(self, name: str) -> tuple[bytes, int, int] | None:
        """Return an object's header, where its data begins, and the data's size."""
        size_bytes = self._store.get_size(name)
        if size_bytes < _LENGTH.size:
            if size_bytes not in {_NOT_THERE, 0}:
                _check(size_bytes)
            return None
        first = bytearray(min(size_bytes, _FIRST_BYTES))
        self._read(name, memoryview(first), 0)
        at = _LENGTH.size + min(_LENGTH.unpack_from(first)[0], _MAX_HEADER_BYTES)
        if at > size_bytes:
            raise ValueError("the object is no feature: it is shorter than its header")
        if at > len(first):
            first = bytearray(at)
            self._read(name, memoryview(first), 0)
        return bytes(first[_LENGTH.size : at]), at, size_bytes - at

    def _read(self, name: str, into: memoryview, at: int) -> int:
        """Read a part of an object; return its bytes. The buffer refers to the view until that is done."""
        nbytes = into.nbytes
        if not nbytes:
            return 0
        buffer = (ctypes.c_char * nbytes).from_buffer(into)
        address = ctypes.addressof(buffer)
        _check(self._store.register_buffer(address, nbytes))
        try:
            told = self._store.get_into_ranges([address], [[name]], [[[0]]], [[[at]]], [[[nbytes]]])
        finally:
            self._store.unregister_buffer(address)
        read = int(told[0][0][0])
        _check(read)
        return read


def _check_master(master: str) -> None:
    """Raise unless somebody listens there: Mooncake's client would try for minutes."""
    host, _, port = master.rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError(f"master={master!r} is no address: host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_DIAL_S).close()
    except OSError as error:
        raise BackendUnavailable(f"no Mooncake Store at {master}: {error}") from error


def _check(code: int) -> None:
    if code < 0:
        raise OSError(f"Mooncake returned {code}")


def from_environment() -> MooncakeTier:
    """Return the tier that Mooncake's own variables describe, ``MOONCAKE_MASTER`` first of all."""
    given = {
        name: os.environ[variable]
        for name, variable in _VARIABLES.items()
        if variable in os.environ
    }
    if "master" not in given:
        raise SettingsError(
            "MOONCAKE_MASTER is not set: the address of a mooncake_master, host:port"
        )
    return MooncakeTier(given.pop("master"), **given)
