"""What keeps a model up to date: one look a refresh, at most one under way, and a new owner waited for."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final, Literal, cast

import anyio

import featcache
from featcache import FeatcacheError, KeysPage, Observer, OwnerUnreachable
from featcache.cli.top.model import Model, Seen

MOST_CELLS: Final = 4096
KEYS: Final = 256
"""Keys of the page that is looked at."""
_PATIENT_S: Final = 86400.0
"""An owner that is stopped is waited for: the frame says since when."""
_GOODBYE_S: Final = 0.3
_REDIAL_S: Final = 1.0
_SOONEST_S: Final = 0.25
"""Between two looks where a key of the keyboard asks for one."""
_SLOW_S: Final = 0.2
_OLDEST_MAP_S: Final = 30.0
clock: Final = time.monotonic


async def look_once(observer: Observer, model: Model, cells: int) -> None:
    """Look at everything that a frame shows."""
    snapshot = await observer.snapshot()
    slab = await observer.map(max(1, min(cells, MOST_CELLS)))
    keys = await _keys(observer, model) if model.view == "keys" else None
    model.saw(Seen(snapshot=snapshot, slab=slab, keys=keys), clock())


async def _keys(observer: Observer, model: Model) -> KeysPage:
    order = cast("Literal['size', 'age', 'hits']", model.orders["keys"])
    return await observer.keys(order, limit=KEYS)


class Watch:
    """Looks at the owner of an endpoint, again and again."""

    def __init__(
        self, model: Model, cells: Callable[[], int], changed: Callable[[], object]
    ) -> None:
        """`cells` tells how many cells the map has; `changed` is called when there is something new."""
        self._model = model
        self._cells = cells
        self._changed = changed
        self._observer: Observer | None = None
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look soon: something else is to be seen, or the frame is frozen no more."""
        self._wake.set()

    async def evict(self, key: bytes) -> bool:
        """Drop a key; return whether it was there."""
        if self._observer is None:
            raise featcache.OwnerLost("there is no owner")
        return await self._observer.evict(key)

    async def run(self) -> None:
        """Look until cancelled. Raises the error of the first attachment: later ones are tried again."""
        model = self._model
        attached = False
        model.since_s = clock()
        while True:
            try:
                if model.link != "lost":
                    model.asking(clock())
                observer = featcache.observe(
                    model.endpoint, name="featcache top", timeout=_PATIENT_S
                )
                await observer.open()
                attached = True
                await self._follow(observer)
            except FeatcacheError as error:
                if not attached:
                    raise
                again = model.link == "lost" and isinstance(error, OwnerUnreachable)
                model.lost(model.why if again else _why(error), clock())
                self._changed()
            await asyncio.sleep(_REDIAL_S)

    async def _follow(self, observer: Observer) -> None:
        self._observer = observer
        try:
            while True:
                began_s = clock()
                await self._look(observer, began_s)
                await self._pause(began_s)
        finally:
            self._observer = None
            # A stopped owner takes no goodbye: it sees the socket close when it goes on.
            with anyio.move_on_after(_GOODBYE_S, shield=True), contextlib.suppress(FeatcacheError):
                await observer.aclose()

    async def _look(self, observer: Observer, began_s: float) -> None:
        model = self._model
        self._wake.clear()
        model.asking(began_s)
        snapshot = await observer.snapshot()
        model.saw(Seen(snapshot=snapshot), clock())
        if model.frozen:
            return
        if model.slab is None or clock() - began_s > _SLOW_S:
            self._changed()
        # Looks cost the owner time, which it gives itself back by answering later. The map is what costs
        # most in a pool of many slots: where answers come late, it is seldom asked for.
        late = clock() - began_s > model.interval_s
        slab = keys = None
        if model.view == "keys":
            model.asking(clock())
            keys = await _keys(observer, model)
        if not late or clock() - model.slab_at_s > _OLDEST_MAP_S:
            model.asking(clock())
            slab = await observer.map(max(1, min(self._cells(), MOST_CELLS)))
        model.answered(clock())
        model.see_more(slab, keys, clock())
        self._changed()

    async def _pause(self, began_s: float) -> None:
        """Wait for the next refresh, or for `wake`; while the frame is frozen, for as long as it is."""
        model = self._model
        # An owner that answers late gets some rest as well.
        due_s = max(began_s + model.interval_s, clock() + min(model.interval_s, _SOONEST_S))
        while model.frozen or clock() < due_s:
            left_s = None if model.frozen else due_s - clock()
            with anyio.move_on_after(left_s):
                await self._wake.wait()
                self._wake.clear()
                due_s = min(due_s, began_s + _SOONEST_S)


def _why(error: FeatcacheError) -> str:
    """Return what became of the owner, without its endpoint."""
    text = " ".join(str(error).split())
    return text.rpartition("is gone: ")[2] or type(error).__name__
