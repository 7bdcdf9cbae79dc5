"""The life of an object of the blocking API, whichever it is."""

from typing import Generic, NoReturn, Self

from featcache.api.arguments import no_pickle
from featcache.blocking.portal import A, Portal


class BlockingLife(Generic[A]):
    """Opened and closed with plain ``with``, over an object of the async API and its portal."""

    def __init__(self, inner: A) -> None:
        self._portal: Portal[A] = Portal(inner)

    def open(self) -> Self:
        """Open it; ``with`` does. Raises as the async form."""
        self._portal.open()
        return self

    def close(self) -> None:
        """Close it; ``with`` does. Idempotent; an `open` in another thread raises CacheClosed."""
        self._portal.close()

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed, in this process."""
        return self._portal.inner.is_open

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled; the error says how to reach the pool from another process."""
        no_pickle(self)

    def __repr__(self) -> str:
        return repr(self._portal)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()
