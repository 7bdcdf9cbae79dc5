"""Caches inherited by a forked child: it releases its copies and touches nothing of its parent's.

The child shares its parent's sockets, eventfds and mappings. Were it to keep them, a dead parent's
memory would stay pinned and its sockets open; were it to use them, it would speak for the parent.
"""

import os
import weakref
from typing import Protocol


class _Forgets(Protocol):
    def _forget(self) -> None: ...


_open: "weakref.WeakSet[_Forgets]" = weakref.WeakSet()


def watch(cache: _Forgets) -> None:
    """Have `cache._forget()` called in every child that is forked while the cache is alive."""
    _open.add(cache)


def _after_fork_in_child() -> None:
    for cache in list(_open):
        cache._forget()  # noqa: SLF001 - the one caller that this private method is for
    _open.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
