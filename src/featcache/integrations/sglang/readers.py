"""Who owes the reads of a feature: the scheduler ranks that its request goes to."""

from typing import Any

import msgspec


class Readers(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The ranks of one request, as its proxies tell them.

    Where the tokenizer knows which processes they are, each has a name, and what a dead rank owes is paid
    at once. With data parallelism a request goes to one group of several, and with pipelines to one stage
    or more; then any `count` processes owe a read each, and what a dead one never began waits for the ttl.
    """

    count: int
    group: str | None = None
    """What the names of the ranks begin with; None if the reads are anybody's."""

    def owed(self) -> int | list[str]:
        """Return the `readers` of a put."""
        if self.group is None:
            return self.count
        return [self.name_of(rank) or "" for rank in range(self.count)]

    def name_of(self, rank: int) -> str | None:
        """Return the name of a rank's session, None if it needs none.

        Raises:
            RuntimeError: there is no such rank.

        """
        if not 0 <= rank < self.count:
            raise RuntimeError(f"consumer rank {rank} is outside [0, {self.count})")
        return None if self.group is None else f"{self.group}.{rank}"


def readers_of(server: str, count: int, parallel: Any) -> Readers:
    """Return the readers of a server's requests; `parallel` is SGLang's parallel context, or None."""
    one_group = all(getattr(parallel, size, 1) == 1 for size in ("dp_size", "pp_size"))
    return Readers(count, f"sglang-{server}" if one_group else None)
