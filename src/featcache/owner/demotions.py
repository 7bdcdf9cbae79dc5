"""On eviction put: what goes to make room is copied out of the slab, then stored in the tier."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Final

import torch

from featcache.control.turns import BYTES_SHIFT, EVICT_UNITS
from featcache.core.slots import Slot
from featcache.memory.slab import Order
from featcache.owner.tier_calls import TierCalls, TierError
from featcache.owner.tier_header import encode
from featcache.owner.tier_staging import Piece, Staging
from featcache.pool.pool import Pool
from featcache.ref import FeatureRef, TensorSpec

_now: Final = time.monotonic
CPU: Final = torch.device("cpu")
FAR_KEYS: Final = b"\xff\x00featcache."
"""Keys of the cache's own, under which copies of other hosts' features are kept: these stay out of a tier."""
_SMALL_BYTES: Final = EVICT_UNITS << BYTES_SHIFT
"""Copied at once even in a turn that is used up: it takes no longer than the eviction itself."""
_MAX_KEYS: Final = 1 << 16
_MAX_REMOVALS: Final = 1024


def whole(nbytes: int) -> TensorSpec:
    """Return the spec of a feature's bytes as they lie in its slot."""
    return TensorSpec(None, "uint8", (nbytes,), 0)


class Demotion:
    """A feature on its way from the slab to the tier.

    ::

        COPYING ──its bytes are in the staging memory──→ STAGED ──the tier has it, or failed──→ (none)
        (the slot has a grant: a large feature, or one     (found there by those who miss it)
        on a GPU, is copied in a thread; others at once)
    """

    __slots__ = ("copied", "dropped", "key", "piece", "ref")

    def __init__(self, key: bytes, ref: FeatureRef, piece: Piece) -> None:
        self.key = key
        self.ref = ref
        self.piece = piece
        self.copied: asyncio.Future[bool] | None = None
        """While it is COPYING, and after that: whether it was copied."""
        self.dropped = False
        """Whether its key was evicted by name meanwhile, or a newer feature of it."""


class Demotions:
    """The features of one pool that go to its tier, and what is known of what lies there."""

    def __init__(self, pool: Pool, calls: TierCalls) -> None:
        settings = pool.settings
        self.staging = Staging(settings.tier_bytes, pool.loop)
        self.clean: dict[int, int] = {}
        """By slot: the generation that came from the tier, which has it still."""
        self.on_demoted: Callable[[bytes], object] = lambda _: None
        """Told of each key that is evicted, before its bytes go."""
        self.demoted = self.dropped = 0
        self._pool = pool
        self._calls = calls
        self._staged: dict[bytes, Demotion] = {}
        self._in_progress = 0
        self._last: dict[bytes, asyncio.Task[None]] = {}
        """The last put or removal of each key: the next begins after it."""
        self._removals = 0
        self._removing: set[bytes] = set()
        """Keys of which the last of these is a removal that has not ended."""
        self._known: OrderedDict[bytes, None] = OrderedDict()
        """Keys under which the tier may have something."""
        self._forgotten: OrderedDict[bytes, None] = OrderedDict()
        """Keys whose copies in the tier are stale: no lookup reaches them until they are removed."""
        self._closed = False

    # --- out of the slab ------------------------------------------------------------------------------

    def take(self, slot: Slot, waits: bool) -> bool:
        """Take a feature that is evicted; return whether its slot is to be kept until it is copied.

        Called as the store decides, so nothing here calls the store; and nothing is raised: the eviction
        goes on whatever becomes of the bytes.
        """
        key = slot.key
        if self._closed or key is None or key.startswith(FAR_KEYS):
            return False
        try:
            return self._take(slot, key, waits=waits)
        except Exception as error:  # noqa: BLE001 - told; the feature is dropped, as without a tier
            self._calls.failed("put", key, f"{type(error).__name__}: {error}")
            self._outdate(key)
            return False

    def _take(self, slot: Slot, key: bytes, *, waits: bool) -> bool:
        self.on_demoted(key)
        index, pool = slot.index, self._pool
        if self.clean.pop(index, None) == slot.generation and key not in self._forgotten:
            return False
        self._supersede(key)
        slab, turn, nbytes = pool.slab, pool.turn, slot.nbytes
        most = pool.settings.inline_bytes if turn.left > 0 else _SMALL_BYTES
        here = not slab.deferred and (nbytes <= min(most, pool.settings.inline_bytes) or not waits)
        refused = self._why_refused(slot, copies=here or waits)
        piece = None if refused else self.staging.take(nbytes)
        if piece is None:
            return self._drop(key, nbytes, refused or "the staging memory is full: tier_bytes")
        demotion = Demotion(key, pool.kept[index], piece)
        order, offset_bytes = slab.order(CPU), slot.offset_bytes
        if here:
            try:
                slab.read(offset_bytes, whole(nbytes), piece.tensor, order)
            except BaseException:
                piece.release()
                raise
            turn.left -= nbytes >> BYTES_SHIFT
            self._begin(demotion, None, order)
            return False
        demotion.copied = pool.loop.create_future()
        self._begin(demotion, slot, order)
        return True

    def _why_refused(self, slot: Slot, *, copies: bool) -> str | None:
        """Return why a feature can't be demoted, if it can't."""
        if self._pool.words.published[slot.index] != slot.generation:
            return "its bytes had not come yet"
        if not copies:
            return "a put that does not wait needs its room"
        if self._in_progress >= self._pool.settings.tier_demotions:
            return f"{self._in_progress} are on their way: tier_demotions"
        return None

    def _drop(self, key: bytes, nbytes: int, reason: str) -> bool:
        self.dropped += 1
        self._calls.dropped(key, nbytes, reason)
        self._outdate(key)
        return False

    def _begin(self, demotion: Demotion, slot: Slot | None, order: Order) -> None:
        self._in_progress += 1
        self._staged[demotion.key] = demotion
        self._removing.discard(demotion.key)
        self._in_turn(demotion.key, lambda before: self._demote(demotion, slot, order, before))

    async def _demote(
        self,
        demotion: Demotion,
        slot: Slot | None,
        order: Order,
        before: "asyncio.Task[None] | None",
    ) -> None:
        key = demotion.key
        try:
            if slot is not None and not await self._copy_out(demotion, slot, order):
                self._lost(demotion)
                return
            if before is not None:
                await asyncio.wait([before])
            if not demotion.dropped:
                await self._store(demotion)
        finally:
            self._in_progress -= 1
            if self._staged.get(key) is demotion:
                del self._staged[key]
            demotion.piece.release()

    async def _copy_out(self, demotion: Demotion, slot: Slot, order: Order) -> bool:
        """Copy a feature out of the slab in a thread; its slot is kept until that is done."""
        pool, piece, copied = self._pool, demotion.piece, demotion.copied
        assert copied is not None, "it is copied in a thread"
        offset_bytes, spec = slot.offset_bytes, whole(slot.nbytes)

        def end(_: object) -> None:
            piece.release()
            self._end_copy(slot)

        piece.hold()  # the thread's
        done = abandoned = False
        try:
            await pool.offload.run(
                lambda: pool.slab.read(offset_bytes, spec, piece.tensor, order), end
            )
            done = True
        except asyncio.CancelledError:
            abandoned = True  # the thread is still copying: the slot goes when it is done
            raise
        except Exception as error:  # noqa: BLE001 - told; the feature is dropped, as without a tier
            self._calls.failed("put", demotion.key, f"{type(error).__name__}: {error}")
        finally:
            copied.set_result(done)
            if not abandoned:
                end(None)
        return done

    def _end_copy(self, slot: Slot) -> None:
        pool = self._pool
        if pool.closed:
            return
        pool.apply(pool.store.demoted(slot, _now()))
        if pool.store.queue.count:
            pool.collect()  # a put that waits for this room, or for more

    # --- into the tier --------------------------------------------------------------------------------

    async def _store(self, demotion: Demotion) -> None:
        key, tier = demotion.key, self._calls.tier
        header, loan = encode(key, demotion.ref), demotion.piece.lend(writable=False)
        try:
            await self._calls.write("put", key, lambda: tier.put(key, header, loan.view))
        except TierError:
            self._lost(demotion)
            return
        finally:
            loan.end()
        self.demoted += 1
        self.note_stored(key)
        if not demotion.dropped:
            self._forgotten.pop(key, None)

    def note_stored(self, key: bytes) -> None:
        """Note that the tier has something under a key."""
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > _MAX_KEYS:
            self._known.popitem(last=False)

    def _lost(self, demotion: Demotion) -> None:
        """Note that a feature did not arrive."""
        if self._staged.get(demotion.key) is demotion:
            del self._staged[demotion.key]
            self._outdate(demotion.key)

    def _outdate(self, key: bytes) -> None:
        """Hide the tier's copy of a key, if any: it is older than the feature that was lost."""
        if key not in self._staged and (key in self._known or key in self._last):
            self._remove(key)

    def _supersede(self, key: bytes) -> bool:
        """Drop what is on its way under a key; return whether anything was."""
        older = self._staged.pop(key, None)
        if older is not None:
            older.dropped = True
        return older is not None

    def forget(self, key: bytes) -> bool:
        """Remove the tier's copy of a key that was evicted by name; return whether there surely was one."""
        if self._closed:
            return False
        was_known = self._supersede(key) or key in self._known
        self.on_demoted(key)
        self._remove(key)
        return was_known

    def _remove(self, key: bytes) -> None:
        self._known.pop(key, None)
        self._forgotten[key] = None
        if len(self._forgotten) > _MAX_KEYS:
            self._forgotten.popitem(last=False)
        if self._removals >= _MAX_REMOVALS:
            self._calls.failed("remove", key, f"{self._removals} removals are on their way already")
        elif key not in self._removing:
            self._removals += 1
            self._removing.add(key)
            self._in_turn(key, lambda before: self._removal(key, before))

    async def _removal(self, key: bytes, before: "asyncio.Task[None] | None") -> None:
        tier = self._calls.tier
        try:
            if before is not None:
                await asyncio.wait([before])
            await self._calls.write("remove", key, lambda: tier.remove(key))
        except TierError:  # it stays forgotten: not looked up
            self._removing.discard(key)
            return
        finally:
            self._removals -= 1
        if self._last.get(key) is asyncio.current_task():
            self._removing.discard(key)
            self._forgotten.pop(key, None)

    def _in_turn(
        self, key: bytes, work: "Callable[[asyncio.Task[None] | None], Coroutine[Any, Any, None]]"
    ) -> None:
        """Begin a put or removal, which is told of the one before it of the same key."""
        task = self._pool.loop.create_task(work(self._last.get(key)))
        self._last[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))

    def _ended(self, key: bytes, task: "asyncio.Task[None]") -> None:
        if self._last.get(key) is task:
            del self._last[key]
        if not task.cancelled():
            task.exception()

    # --- looked up ------------------------------------------------------------------------------------

    def staged(self, key: bytes) -> Demotion | None:
        """Return the demotion of a key that is on its way: its bytes need not come from the tier."""
        return self._staged.get(key)

    def may_have(self, key: bytes) -> bool:
        """Whether the tier is to be asked for a key."""
        return key not in self._forgotten and not key.startswith(FAR_KEYS)

    async def close(self) -> None:
        """Take no more; what is on its way has its time to arrive, then it is given up."""
        self._closed = True
        tasks = list(self._last.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._pool.settings.tier_timeout)
            for task in late:
                task.cancel()
            await asyncio.wait(tasks)
        await self._pool.offload.drain()  # a thread may still copy out of the slab
