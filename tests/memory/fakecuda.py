"""A fake of `cuda.bindings.driver`, as far as featcache calls it, that keeps the driver's rules.

Device memory is real memory of this host (`fakememory`), so real bytes flow; streams do their work
when a test says so (`fakestreams`). One `FakeApi` is the driver of one process; two of them in this
process behave as two processes would, and one in a real child shares memory with those here.

Calls can be made to fail: `fail`. What is still open is in `leftovers`. A broken rule, where the real
driver's behaviour is not defined, is a `Broken` in the caller and stands in `broken`.

Stricter than the real one: calls on segments need a current context too, and registered host memory
has another address for devices than for the host.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from featcache.memory.cuda.driver import Driver
from memory.fakecalls import FakeCalls, uuid_of
from memory.fakememory import leftovers as memory_leftovers
from memory.fakepages import GRANULARITY_BYTES, Broken, Code, Refused, refuse_unless

__all__ = ["GRANULARITY_BYTES", "Broken", "Code", "FakeApi", "OnDevice", "driver_over", "uuid_of"]

_WITHOUT_CONTEXT = {"cuInit", "cuMemGetAllocationGranularity", "cuEventDestroy"}
_WITHOUT_CONTEXT_PREFIXES = ("cuDevice", "cuCtxPush", "cuCtxPop", "cuCtxGetCurrent", "cuCtxSet")


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU; its bytes are on the host, where the fake finds them."""

    api: "FakeApi"
    ordinal = 0

    def get_device(self) -> int:
        return self.ordinal

    def to(self, *where: Any, **how: Any) -> torch.Tensor:
        """Go to the first device: the only one that the code under test asks for."""
        return self.api.tensor(self.as_subclass(torch.Tensor).clone(), 0)


class FakeApi(FakeCalls):
    """The driver of one process, in the place of the module of bindings."""

    def __init__(
        self, visible: tuple[int, ...] = (0, 1), *, peers: bool = True, total_bytes: int = 1 << 30
    ) -> None:
        super().__init__(visible, peers, total_bytes)
        self.calls: list[str] = []
        self.broken: list[str] = []
        self.current: dict[int, int] = {}
        """Torch's current stream of each device, where it is not the default one."""
        self.foreign: set[int] = set()
        """Streams that neither the code under test nor torch made."""
        self.before: dict[str, Callable[[], None]] = {}
        """Called before the call of this name is, in its thread."""
        self._failures: list[tuple[int, Code]] = []
        self._named_failures: list[list[Any]] = []
        self._lost_at: int | None = None
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._kept: list[torch.Tensor] = []

    # --- what tests ask for ---------------------------------------------------------------------

    def tensor(self, value: torch.Tensor, ordinal: int = 0) -> OnDevice:
        """Return a tensor that is, for the fake, on a device: torch's own memory there."""
        storage = value.untyped_storage()
        if value.numel():
            self.memory.lend(storage.data_ptr(), storage.nbytes(), ordinal)
        self._kept.append(value)
        made = value.as_subclass(OnDevice)
        made.api, made.ordinal = self, ordinal
        return made

    def side_stream(self, ordinal: int = 0) -> int:
        """Return a new stream of torch's, and make it the current one of its device."""
        self.current[ordinal] = self.streams.new(ordinal, ours=False)
        return self.current[ordinal]

    def run(self, raw: int = 0, ordinal: int = 0) -> None:
        """Have one stream do its work, up to where it waits for another."""
        with self._lock:
            self.streams.run(self.streams.find(raw, ordinal))

    def step(self, raw: int = 0, ordinal: int = 0) -> None:
        """Have one stream do one piece of its work, which must not be a wait."""
        with self._lock:
            self.streams.step(self.streams.find(raw, ordinal))

    def run_all(self) -> None:
        """Have all streams do all their work."""
        with self._lock:
            for stream in list(self.streams.streams.values()):
                self.streams.drain(stream)

    def fail(self, call: str, nth: int = 1, code: Code = Code.CUDA_ERROR_UNKNOWN) -> None:
        """Have the nth of the calls of a name fail, from now on."""
        self._named_failures.append([call, nth, code])

    def fail_at(self, index: int, code: Code) -> None:
        """Have the call fail that will be at this index of `calls`."""
        self._failures.append((index, code))

    def lose(self, *, at: int = 0) -> None:
        """Have every call fail, from this index of `calls` on: a kernel faulted."""
        self._lost_at = at

    def end(self) -> None:
        """Take down all that is left, as the driver does when its process ends."""
        self.memory.end()

    def leftovers(self) -> dict[str, Any]:
        """Return what is still open, by kind; empty when nothing is."""
        found = memory_leftovers(self.memory)
        found["streams"] = [s for s in self.streams.streams.values() if s.ours]
        found["events"] = list(self.streams.events)
        found["contexts left current"] = self._stack[:]
        return {kind: what for kind, what in found.items() if what}

    # --- how a call goes --------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu") and f"_{name}" in dir(FakeCalls):
            return functools.partial(self._call, name)
        raise AttributeError(name)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        function: Callable[..., Any] = getattr(self, f"_{name}")
        nothing: tuple[Any, ...] = () if function.__annotations__["return"] is None else (None,)
        if name in self.before:
            self.before[name]()
        with self._lock:
            try:
                self._begin(name)
                value = function(*arguments)
            except Refused as refused:
                return refused.code, *nothing
            except Broken as broken:
                self.broken.append(f"{name}: {broken}")
                raise
        return (Code.CUDA_SUCCESS, value) if nothing else (Code.CUDA_SUCCESS,)

    def _begin(self, name: str) -> None:
        index = len(self.calls)
        self.calls.append(name)
        refuse_unless(os.getpid() == self._pid, Code.CUDA_ERROR_NOT_INITIALIZED)
        refuse_unless(self._ready or name == "cuInit", Code.CUDA_ERROR_NOT_INITIALIZED)
        lost = self._lost_at is not None and index >= self._lost_at
        refuse_unless(not lost, Code.CUDA_ERROR_ILLEGAL_ADDRESS)
        for at, code in self._failures:
            refuse_unless(at != index, code)
        for failure in self._named_failures:
            if failure[0] == name:
                failure[1] -= 1
                refuse_unless(failure[1] != 0, failure[2])
        if name not in _WITHOUT_CONTEXT and not name.startswith(_WITHOUT_CONTEXT_PREFIXES):
            refuse_unless(self._stack, Code.CUDA_ERROR_INVALID_CONTEXT)


def driver_over(api: FakeApi) -> Driver:
    """Return the driver as featcache calls it; what is on its devices is for torch on the CPU."""
    return Driver(
        api,
        current_stream=lambda ordinal: api.current.get(ordinal, 0),
        device=lambda ordinal: torch.device("cpu", ordinal),
        lasts=lambda ordinal: api.current.get(ordinal, 0) not in api.foreign,
    )
