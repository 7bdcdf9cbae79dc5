"""The bell: the owner's eventfd, which readers ring when they release while somebody waits for room."""

import contextlib
import os


class Doorbell:
    """The owner's eventfd, as a reader rings it. Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ring(self) -> None:
        """Wake the owner's recycler; an owner that is gone is no error of the reader's."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Ring no more. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
