"""What the data plane's thread does for a slab on a GPU: its context, UCX's support, the flush."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from featcache.errors import BackendUnavailable, system_errors
from featcache.memory.cuda.driver import Driver, load

_UCX_MODULE: Final = "libuct_cuda"
_MAPS: Final = Path("/proc/self/maps")
NO_UCX: Final = (
    "NIXL's UCX has no CUDA in this process, and would take GPU memory for host memory: install the "
    "nixl wheel of torch's CUDA (nixl-cu12 or nixl-cu13), and look at UCX_TLS and UCX_MODULE_DIR"
)


_NO_IPC: Final = {"TLS": "^cuda_ipc"}
"""For segments of virtual memory: UCX 1.23 has no descriptor of cuda_ipc for them, and a peer that is told of
one refuses all that this agent has registered (NIXL_ERR_NOT_ALLOWED, seen on H200). The bytes take its other
ways: a network card where the segment can be registered with one, else by the host."""


class PlaneGpu:
    """One GPU as a data plane's thread uses it; all calls are that thread's."""

    def __init__(
        self,
        ordinal: int,
        driver: Callable[[], Driver] = load,
        maps: Path = _MAPS,
        *,
        by_segments: bool = False,
    ) -> None:
        """`by_segments`: the slab is of segments that are mapped one by one, not one allocation."""
        self.ucx = _NO_IPC if by_segments else None
        """Variables of UCX."""
        self._ordinal = ordinal
        self._load = driver
        self._maps = maps
        self._flushed: Driver | None = None
        """The driver that is to flush each read, where the device needs that."""

    def enter(self) -> None:
        """Make the device's context the thread's current one.

        Before the agent is made: without one NIXL and UCX would take, and make, that of the first GPU.
        """
        driver = self._load()
        driver.enter(self._ordinal)
        self._flushed = driver if driver.needs_flush(self._ordinal) else None

    def check(self) -> None:
        """Raise BackendUnavailable unless UCX, which has an agent now, knows this memory as a GPU's."""
        with system_errors(BackendUnavailable, "UCX's modules can't be looked at"):
            loaded = self._maps.read_text(errors="replace")
        if _UCX_MODULE not in loaded:
            raise BackendUnavailable(NO_UCX)

    def landed(self) -> None:
        """Make what a read has written visible to all GPUs, as its completion alone may not.

        NIXL's completion says that a network card has written; a kernel that starts afterwards sees it
        without this only where the device orders such writes itself. Copies of UCX's own streams are
        complete when they are said to be.
        """
        if self._flushed is not None:
            self._flushed.flush_remote_writes()
