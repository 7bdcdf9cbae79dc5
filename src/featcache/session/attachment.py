"""Attachments: one pool mapped in this process, how its bytes are waited for, and how it ends."""

import asyncio
import threading
import time

from featcache.errors import CacheClosed, StaleRef
from featcache.memory.slab import Mapping
from featcache.memory.unreachable import UnreachableSlab
from featcache.ref import FeatureRef
from featcache.session.holds import Holds, PageWords

_TURNING_S = 500e-6
"""Seconds of turns of the loop before sleeping, whose shortest is a millisecond: a GPU comes round to
another process's copy in a few hundred microseconds."""
_LONGEST_WAIT_S = 1e-3
_SPIN_S = 200e-6
_DOZE_S = 50e-6


class Attachment(Holds):
    """One pool as this session maps it."""

    # --- waiting ----------------------------------------------------------------------------------

    async def wait_ready(self, ref: FeatureRef) -> None:
        """Wait on the host until the bytes of a held ref are there."""
        sleep_from_s = time.monotonic() + _TURNING_S
        while not self.is_there(ref):
            self.check()
            if self._live[ref.slot] != ref.generation:
                raise StaleRef(f"ref {ref.slot}:{ref.generation} was discarded before it came")
            await asyncio.sleep(0 if time.monotonic() < sleep_from_s else _LONGEST_WAIT_S)

    def wait_ready_blocking(self, ref: FeatureRef, give_up_s: float) -> bool:
        """As `wait_ready`, in a thread that may block; False if they were not there by `give_up_s`."""
        doze_from_s = time.monotonic() + _SPIN_S
        while not self.is_there(ref):
            self.check()
            if self._live[ref.slot] != ref.generation:
                raise StaleRef(f"ref {ref.slot}:{ref.generation} was discarded before it came")
            now_s = time.monotonic()
            if now_s > give_up_s:
                return False
            if now_s > doze_from_s:
                time.sleep(_DOZE_S)
        return True

    async def drain(self, timeout_s: float) -> bool:
        """Wait on the host until `settled`, which the GPU brings about; return whether it did."""
        give_up_s = time.monotonic() + timeout_s
        while not self.settled:
            if time.monotonic() > give_up_s:
                return False
            await asyncio.sleep(_LONGEST_WAIT_S)
        return True

    async def wait_mapped(self, offset_bytes: int, nbytes: int) -> None:
        """Wait on the host until a part of the slab is mapped here."""
        while not self.is_mapped(offset_bytes, nbytes):
            self.check()
            await asyncio.sleep(_LONGEST_WAIT_S)

    # --- another way, and the end -----------------------------------------------------------------

    def fall_back_to_host(self, reason: str) -> Mapping:
        """Go on without a mapping, by way of the host; return the one there was, to be closed."""
        mapping, self.mapping = self.mapping, UnreachableSlab(self.mapping.device, reason)
        self._adopted = self._plain
        self._paid = self._released
        return mapping

    def forget(self) -> None:
        """Cut a forked child off: what it still ends changes nothing that its parent wrote."""
        self.refuse(CacheClosed("this process was forked from the one that attached the pool"))
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self.header = memoryview(bytes(8 * len(self.header))).cast("Q")
        self._held, self._released = (
            memoryview(bytearray(8 * self._slots)).cast("Q") for _ in range(2)
        )
        self._live = self._published = self._offset = self._nbytes = self._held
        self._paid = self._released
        self._in_flight.clear()
        words = max(self._slots, len(self._plain.granted))
        nowhere = memoryview(bytearray(8 * words)).cast("Q")
        self._plain = self._adopted = PageWords(nowhere, nowhere, nowhere)
        mapping, self.mapping = (
            self.mapping,
            UnreachableSlab(self.mapping.device, "this process forked"),
        )
        mapping.forget()
