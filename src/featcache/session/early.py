"""Refs that are met before their publish: a client's put does not wait for its owner."""

import threading
from collections.abc import Callable

from featcache.errors import MalformedRef, StaleRef
from featcache.memory.slab import Order, PageWords
from featcache.memory.words import RoomClaim, fence_loads
from featcache.ref import FeatureRef


class EarlyPins:
    """The part of an `Attachment` that pins what is not live yet, and waits until it is."""

    _live: memoryview
    _offset: memoryview
    _nbytes: memoryview
    _reserved: memoryview
    _plain: PageWords
    _lock: threading.Lock
    _early: dict[tuple[int, int], bool]
    """Those that were pinned before their publish had come; whether it has come since."""
    _ring: Callable[[], object]
    hear: Callable[[], object] | None
    """In the owner: handles what sessions have told by now."""
    comes: Callable[[int, int], bool | None] | None
    """In the owner, which knows who has claimed what: whether a publish is on its way; None if not here."""
    _own_puts: dict[int, FeatureRef]
    """By slot: the ref of this session's last put there, which it need not wait for."""

    def check(self) -> None:
        raise NotImplementedError

    def unpin(self, ref: FeatureRef, *, pays: bool, order: Order = None) -> None:
        raise NotImplementedError

    def is_ready(self, ref: FeatureRef) -> bool:
        raise NotImplementedError

    def is_mapped(self, offset_bytes: int, nbytes: int) -> bool:
        raise NotImplementedError

    def _why_stale(self, index: int, generation: int) -> str:
        raise NotImplementedError

    def _is_coming(self, index: int, generation: int) -> bool:
        """Whether a ref that is not live may be: its writer's publish is on its way, or has just come.

        The owner stores `live` before it clears `reserved`. So here `reserved` is looked at first: if it
        is clear, a publish that came is found in `live`. A pin that is stored before `reserved` is found
        set is as safe as one before `live`: the owner looks for pins only after it has cleared both.
        """
        if self._reserved[index] & RoomClaim.GENERATION == generation:
            return True
        fence_loads()
        return self._live[index] == generation

    def _pin_early(self, ref: FeatureRef) -> bool:
        """Go on with a pin of a ref that is not live, as `pin`: revoked, or not published yet."""
        index, generation = key = ref.slot, ref.generation
        if not self._is_coming(index, generation):
            self.unpin(ref, pays=False)
            raise StaleRef(self._why_stale(index, generation))
        # The publish may have come, and not be read yet; or stand in its writer's page, whose loop is held
        # and has rung for nobody: then this is who rings.
        if self.hear is not None:
            self.hear()
            if not self._still_comes(
                index, generation
            ):  # room that nobody has claimed: a forged ref
                self.unpin(ref, pays=False)
                raise StaleRef(self._why_stale(index, generation))
        else:
            self._ring()
        with self._lock:
            self._early.setdefault(key, False)
        # Its own it need not wait for: it has seen the bytes land, and knows their extent.
        own = self._own_puts.get(index) == ref and self._plain.written[index] == generation
        try:
            return (own and self.is_mapped(ref.offset_bytes, ref.nbytes)) or self.is_ready(ref)
        except MalformedRef:
            self.unpin(ref, pays=False)
            raise

    def _still_comes(self, index: int, generation: int) -> bool:
        if self._live[index] == generation:
            return True
        comes = None if self.comes is None else self.comes(index, generation)
        return self._live[index] == generation or (
            self._is_coming(index, generation) if comes is None else comes
        )

    def _has_come(self, ref: FeatureRef) -> bool:
        """Whether the publish of a ref that was pinned early has come; MalformedRef if it is another's."""
        key = ref.slot, ref.generation
        if not self._early[key]:
            if self._live[ref.slot] != ref.generation:
                return False
            fence_loads()  # the extent was stored before
            self._early[key] = True
        if self._offset[ref.slot] != ref.offset_bytes or self._nbytes[ref.slot] != ref.nbytes:
            raise MalformedRef("the ref's extent is not its slot's: it was forged or damaged")
        return True

    def check_coming(self, ref: FeatureRef) -> None:
        """Raise StaleRef if a pinned ref was revoked before its bytes came; as `check` besides."""
        self.check()
        index, generation = ref.slot, ref.generation
        if not self._still_comes(index, generation):
            raise StaleRef(self._why_stale(index, generation))
