"""What every process of an application is told of the transport by `register`."""

from typing import Final

import attrs

NAME: Final = "featcache"
"""What `ray.method(tensor_transport=...)` and `ray.put(..., _tensor_transport=...)` are given."""


@attrs.frozen(kw_only=True)
class Config:
    """The owner's socket, and how long an object waits there for room (None: without end)."""

    endpoint: str
    put_timeout_s: float | None
