"""Waiting on the host: for bytes to come, segments to be mapped, words to land; and the doorbell."""

import asyncio
import contextlib
import os
import time

from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment

_YIELD_S = 500e-6
"""Spin-then-sleep: yield to the loop for 500 us, then sleep in 1 ms steps. A GPU comes round to
another process's copy in a few hundred microseconds, and the loop's shortest sleep is a millisecond."""
_SLEEP_S = 1e-3
_SPIN_S = 200e-6  # the same in a thread that may block: spin, then doze
_DOZE_S = 50e-6


async def wait_ready(attachment: Attachment, ref: FeatureRef) -> None:
    """Return once the bytes of a pinned ref are there; StaleRef if it is revoked before."""
    sleep_from_s = time.monotonic() + _YIELD_S
    while not attachment.is_ready(ref):
        attachment.check_coming(ref)
        await asyncio.sleep(0 if time.monotonic() < sleep_from_s else _SLEEP_S)


def wait_ready_blocking(attachment: Attachment, ref: FeatureRef, give_up_s: float) -> bool:
    """As `wait_ready`, in a thread that may block; False if they were not there by `give_up_s`."""
    doze_from_s = time.monotonic() + _SPIN_S
    while not attachment.is_ready(ref):
        attachment.check_coming(ref)
        now_s = time.monotonic()
        if now_s > give_up_s:
            return False
        if now_s > doze_from_s:
            time.sleep(_DOZE_S)
    return True


async def wait_mapped(attachment: Attachment, offset_bytes: int, nbytes: int) -> None:
    """Return once a part of the slab is mapped here."""
    while not attachment.is_mapped(offset_bytes, nbytes):
        attachment.check()
        await asyncio.sleep(_SLEEP_S)


async def drain(attachment: Attachment, timeout_s: float) -> bool:
    """Return True once every signalled word has landed, which the GPU brings about; False if late."""
    give_up_s = time.monotonic() + timeout_s
    while not attachment.settled:
        if time.monotonic() > give_up_s:
            return False
        await asyncio.sleep(_SLEEP_S)
    return True


class Doorbell:
    """The owner's eventfd, rung by readers that release while a put waits. Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ring(self) -> None:
        """Wake the owner's recycler; an owner that is gone is no error of the reader's."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Close the eventfd. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        """Close what nobody closed, as the words' mappings are: the two belong together."""
        self.close()
