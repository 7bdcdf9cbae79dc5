"""One target under Atheris, in a process of its own; the parent is `__main__.py`.

Atheris instruments what is imported under it, so featcache is imported here and nowhere before; what
featcache imports is there already, and stays as it is.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import atheris
import attrs  # noqa: F401 - see above, as the next ones
import msgspec  # noqa: F401
import structlog  # noqa: F401
import torch  # noqa: F401

with atheris.instrument_imports(include=["featcache"]):
    from featcache import events
    from fuzz import targets
    from fuzz.mutate import mutate_body

_BODY_AT: Final = {"ref": 1, "message": 1, "live": 25}
"""Where msgpack begins in the inputs of the targets that decode it."""


def mutator(target: str) -> Callable[[bytes, int, int], bytes]:
    """Mutate now the bytes, now what they mean."""
    at = _BODY_AT.get(target)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if at is not None and chance.random() < 0.6:
            body = mutate_body(data[at:], chance)
            if body is not None and at + len(body) <= most:
                return data[:at] + body
        mutated: bytes = atheris.Mutate(data, most)
        return mutated

    return mutate


def main(argv: list[str]) -> None:
    """Fuzz the target that the first argument names; the others are libFuzzer's."""
    target = argv.pop(1)
    run = targets.TARGETS[target]

    events.remove_hook(events.log_to_structlog)
    corpus, known = Path(argv[1]), 0

    def one(data: bytes) -> None:
        nonlocal known
        run(data)
        if len(targets.outcomes) > known:  # libFuzzer can't see this: the parent minimises it
            known = len(targets.outcomes)
            (corpus / f"outcome-{known:04}").write_bytes(data)

    atheris.Setup(argv, one, custom_mutator=mutator(target))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
