"""The owners of this process that serve, by the thread whose loop each needs to answer."""

import os
import weakref
from collections.abc import Iterable
from typing import Protocol


class _Serves(Protocol):
    def _serves_here(self) -> Iterable[str]: ...


_owners: "weakref.WeakSet[_Serves]" = weakref.WeakSet()


def add(owner: _Serves) -> None:
    """Note an owner that is open; one that closed serves nothing."""
    _owners.add(owner)


def served_here(endpoints: Iterable[str]) -> str | None:
    """Return one of these endpoints whose owner's loop runs in this thread, if there is one."""
    paths = {os.path.realpath(endpoint): endpoint for endpoint in endpoints}
    if not paths:
        return None
    for owner in list(_owners):
        for served in owner._serves_here():  # noqa: SLF001 - the one caller that this method is for
            found = paths.get(os.path.realpath(served))
            if found is not None:
                return found
    return None
