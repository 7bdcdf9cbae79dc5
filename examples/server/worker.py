"""A worker: reads refs of pictures from stdin and writes answers to stdout, in lines of JSON.

It has no event loop, so it takes featcache's blocking form. It ends when its stdin is closed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
import torch
from torch import Tensor

import featcache
import featcache.blocking


class Task(msgspec.Struct):
    """Look at the picture behind a ref."""

    number: int
    ref: bytes


class Answer(msgspec.Struct):
    """What was seen, or why nothing was. With no number: the worker is attached."""

    number: int | None
    result: Any = None
    error: str | None = None


def mean_colour(picture: Tensor) -> list[float]:
    return [round(value, 3) for value in picture.float().mean(dim=(0, 1)).tolist()]


def histogram(picture: Tensor) -> list[int]:
    """How many pixels are in each of eight steps of brightness."""
    brightness = picture.float().mean(dim=2)
    return [int(count) for count in torch.histc(brightness, bins=8, min=0, max=256).tolist()]


LOOKS: dict[str, Callable[[Tensor], Any]] = {"w0": mean_colour, "w1": histogram}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=LOOKS)
    parser.add_argument("endpoint")
    parser.add_argument("--delay", type=float, default=0.0)
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    torch.set_num_threads(1)
    look = LOOKS[options.name]
    with featcache.blocking.connect(options.endpoint, name=options.name) as cache:
        say(Answer(number=None))
        for line in sys.stdin.buffer:
            task = msgspec.json.decode(line, type=Task)
            try:
                with cache.borrow(featcache.FeatureRef.from_bytes(task.ref)) as picture:
                    assert isinstance(picture, Tensor)
                    time.sleep(options.delay)
                    answer = Answer(task.number, look(picture))
            except featcache.StaleRef as error:
                # The request was cancelled and its ref discarded: nobody waits for an answer.
                answer = Answer(task.number, error=str(error))
            say(answer)


def say(answer: Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
