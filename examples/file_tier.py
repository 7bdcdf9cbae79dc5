"""The simplest tier: a folder. What the pool evicts is a file there, and comes back when it is missed.

    PYTHONPATH=examples FILE_TIER=/var/cache/features featcache serve --tier file_tier:from_environment

It removes nothing by itself: bound the folder from outside, by age say. Files can go at any time.
"""

import asyncio
import os
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path

from featcache.tier import MakeRoom

LENGTH_BYTES = 4


class FileTier:
    """A `featcache.tier.Tier` over a folder: each feature a file, of its header's length, header and data."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    async def put(self, key: bytes, header: bytes, data: memoryview) -> None:
        await asyncio.to_thread(self._write, self._path(key), header, data)

    async def get(self, key: bytes, room: MakeRoom) -> int | None:
        try:
            file, header = await asyncio.to_thread(self._open, self._path(key))
        except FileNotFoundError:
            return None
        with file:
            view = await room(header)  # memory in the pool's own slab
            return await asyncio.to_thread(file.readinto, view)

    async def has(self, key: bytes) -> bool:
        return await asyncio.to_thread(self._path(key).exists)

    async def remove(self, key: bytes) -> None:
        await asyncio.to_thread(self._path(key).unlink, missing_ok=True)

    async def close(self) -> None:
        """Do nothing: no file is open between calls."""

    def _path(self, key: bytes) -> Path:
        return self.folder / blake2b(key, digest_size=20).hexdigest()

    def _open(self, path: Path) -> tuple[BufferedReader, bytes]:
        file = path.open("rb")
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        return file, file.read(length)

    def _write(self, path: Path, header: bytes, data: memoryview) -> None:
        # Written beside it and then renamed: a reader finds all of it or nothing.
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            file.write(len(header).to_bytes(LENGTH_BYTES, "little"))
            file.write(header)
            file.write(data)
        unfinished.replace(path)


def from_environment() -> FileTier:
    """Make the tier of ``featcache serve --tier file_tier:from_environment``."""
    return FileTier(os.environ["FILE_TIER"])
