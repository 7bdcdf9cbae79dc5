"""Tensor-parallel ranks with pyzmq and `featcache.blocking`: features by the slab, refs by the socket.

    pip install featcache pyzmq pillow scikit-image
    python examples/tensor_parallel_zmq.py [--ranks 4] [--rounds 10] [--device cuda]

No process has an event loop. The scheduler puts a picture's patches once for all ranks, and sends each
the ref, 100 bytes; each rank borrows the patches and multiplies them with its shard of an MLP, and the
scheduler adds up what comes back (an all-reduce does, where the next layer is sharded too). A rank that
is killed is started again, and what it had not answered is done anew.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import signal
import sys
import tempfile
from collections import deque
from contextlib import ExitStack, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

import numpy as np
import torch
import zmq
from PIL import Image
from torch import Tensor
from torch.nn import functional

import featcache
from featcache import blocking

SIDE, PATCH, HIDDEN = 224, 16, 2048
WIDTH = 3 * PATCH * PATCH
WINDOW = 4  # requests at the ranks at once
PUT_S, ANSWER_S = 10, 30  # for room, and for an answer: a rank that takes longer hangs
SHIPPED = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")


# --- a rank ----------------------------------------------------------------------------------------


def shard(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the first weight and columns of the second; rank 0 of 1 has all."""
    generator = torch.Generator().manual_seed(11)
    up = torch.randn(HIDDEN, WIDTH, generator=generator) / WIDTH**0.5
    down = torch.randn(WIDTH, HIDDEN, generator=generator) / HIDDEN**0.5
    return up.chunk(ranks)[rank], down.chunk(ranks, dim=1)[rank].contiguous()


def mlp(patches: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return functional.linear(functional.gelu(functional.linear(patches, up)), down)


def run_rank(rank: int, ranks: int, device: str, endpoint: str, address: str) -> None:
    """Runs in the rank's process, until it is told to stop, or the scheduler is gone."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # ctrl-c is for the scheduler, which stops the ranks
    torch.set_num_threads(1)
    place = f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device
    up, down = (weight.to(place) for weight in shard(rank, ranks))
    scheduler = multiprocessing.parent_process()
    assert scheduler is not None
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        socket = stack.enter_context(context.socket(zmq.DEALER))
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IDENTITY, b"%d" % rank)
        socket.connect(address)
        # Named, so that what it owes is paid for it if it dies.
        cache = blocking.connect(endpoint, device=place, name=f"tp{rank}")
        stack.enter_context(cache)
        socket.send(b"")
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(scheduler.sentinel, zmq.POLLIN)
        while scheduler.sentinel not in dict(poller.poll()):
            number, data = socket.recv_multipart()
            if not data:
                break
            with suppress(featcache.StaleRef):  # taken back: another rank was lost, it comes again
                with cache.borrow(featcache.FeatureRef.from_bytes(data)) as patches:
                    assert isinstance(patches, Tensor)
                    part = mlp(patches, up, down)
                socket.send_multipart([number, part.cpu().numpy().data])


# --- the scheduler ---------------------------------------------------------------------------------


class RankLost(Exception):
    """A rank's process ended, or does not answer."""


class Ranks:
    """The ranks' processes, and the socket to them."""

    def __init__(self, count: int, device: str, endpoint: str) -> None:
        self.count = count
        self.device = device
        self.endpoint = endpoint
        self.names = [f"tp{rank}" for rank in range(count)]
        self.processes: dict[int, BaseProcess] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ranks-"))  # mode 0700
            context = stack.enter_context(zmq.Context())
            self.socket = stack.enter_context(context.socket(zmq.ROUTER))
            self.socket.setsockopt(zmq.LINGER, 0)
            self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a new process under the rank's number
            self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self.address = f"ipc://{folder}/ranks"
            self.socket.bind(self.address)
            stack.callback(self.stop)
            self.start()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def start(self) -> None:
        """Start those that are not there; return when all are attached. RankLost if one can't."""
        missing = set(range(self.count)) - set(self.processes)
        for rank in missing:
            given = (rank, self.count, self.device, self.endpoint, self.address)
            spawn = multiprocessing.get_context("spawn")
            process = spawn.Process(target=run_rank, args=given, name=f"tp{rank}")
            process.start()
            self.processes[rank] = process
        while missing:
            rank, *answer = self.receive()
            if answer == [b""]:  # else what was asked before
                missing.discard(rank)

    def send(self, number: int, ref: featcache.FeatureRef) -> None:
        data = ref.to_bytes()
        for rank in range(self.count):
            self.socket.send_multipart([b"%d" % rank, b"%d" % number, data])

    def receive(self) -> tuple[int, *tuple[bytes, ...]]:
        """The next message; RankLost if a rank has ended, or none came for too long."""
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        for process in self.processes.values():
            poller.register(process.sentinel, zmq.POLLIN)
        ready = dict(poller.poll(ANSWER_S * 1000))
        ended = [rank for rank, one in self.processes.items() if one.sentinel in ready]
        if ended or not ready:
            raise RankLost(self.remove(ended or [*self.processes]))
        identity, *message = self.socket.recv_multipart()
        return int(identity), *message

    def remove(self, ranks: list[int]) -> str:
        """Forget processes that have ended; those that hang are killed first."""
        told = []
        for rank in ranks:
            process = self.processes.pop(rank)
            process.kill()
            process.join()
            told.append(f"{process.name} ended with exit code {process.exitcode}")
        return ", ".join(told)

    def stop(self) -> None:
        for rank, process in self.processes.items():
            with suppress(zmq.ZMQError):  # it has not connected yet
                self.socket.send_multipart([b"%d" % rank, b"", b""])
            process.join(5)
        self.remove([*self.processes])


class Request:
    """A picture whose patches the ranks have, and their parts so far."""

    def __init__(self, picture: int, ref: featcache.FeatureRef) -> None:
        self.picture = picture
        self.ref = ref
        self.parts: dict[int, Tensor] = {}


class Scheduler:
    def __init__(self, cache: blocking.FeatureCache, ranks: Ranks) -> None:
        self.cache = cache
        self.ranks = ranks
        self.numbers = itertools.count()
        self.pending: dict[int, Request] = {}
        self.restarts = 0

    def run(self, pictures: list[Tensor]) -> list[Tensor]:
        """The product of each picture's patches."""
        todo = deque(range(len(pictures)))
        products: dict[int, Tensor] = {}
        while todo or self.pending:
            try:
                while todo and len(self.pending) < WINDOW:
                    self.send(todo[0], pictures[todo[0]])
                    todo.popleft()
                self.gather(products)
            except RankLost as error:
                print(f"{error}: starting it again", file=sys.stderr, flush=True)
                todo.extendleft(self.take_back())
                self.restarts += 1
                self.ranks.start()
        return [products[picture] for picture in range(len(pictures))]

    def send(self, picture: int, patches: Tensor) -> None:
        try:
            ref = self.cache.put(patches, readers=self.ranks.names, timeout=PUT_S)
        except featcache.PutTimeout as error:  # which says who holds the room
            raise RankLost(f"{error}; {self.ranks.remove([*self.ranks.processes])}") from error
        number = next(self.numbers)
        self.pending[number] = Request(picture, ref)
        with suppress(zmq.ZMQError):  # a rank is not there, which `receive` will tell
            self.ranks.send(number, ref)

    def gather(self, products: dict[int, Tensor]) -> None:
        rank, *answer = self.ranks.receive()
        request = self.pending.get(int(answer[0] or b"-1"))
        if request is None:
            return  # of before a restart
        part = np.frombuffer(answer[1], dtype=np.float32).reshape(-1, WIDTH)
        request.parts[rank] = torch.from_numpy(part.copy())
        if len(request.parts) == self.ranks.count:
            ordered = [request.parts[rank] for rank in range(self.ranks.count)]
            products[request.picture] = torch.stack(ordered).sum(dim=0)
            del self.pending[int(answer[0])]

    def take_back(self) -> list[int]:
        """Discard what is at the ranks: no byte stays, whoever had read it. The pictures, last first."""
        for request in self.pending.values():
            with suppress(featcache.StaleRef):
                self.cache.discard(request.ref)
        pictures = [request.picture for request in reversed(self.pending.values())]
        self.pending.clear()
        return pictures


def load(path: Path) -> Tensor:
    """A picture's patches, one a row."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB").resize((SIDE, SIDE))))
    patches = pixels.float().div(255).unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
    return patches.reshape(-1, WIDTH)


def shipped() -> list[Path]:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        sys.exit("install scikit-image for its pictures, or name files with --images")
    return [Path(package.origin).parent / "data" / name for name in SHIPPED]


def main() -> int:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--ranks", type=int, default=2)
    add("--rounds", type=int, default=3, help="how often all pictures are done")
    add("--capacity", default="64MiB", help="of the slab (default: %(default)s)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--images", type=Path, nargs="+", help="files, in place of scikit-image's")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves all blocks
    device = "cuda:0" if options.device == "cuda" else "cpu"
    pictures = [load(path).to(device) for path in options.images or shipped()]
    expected = [mlp(picture.cpu(), *shard(0, 1)) for picture in pictures]
    right = True
    with (
        blocking.create(device=device, capacity=options.capacity) as cache,
        Ranks(options.ranks, options.device, cache.endpoint) as ranks,
    ):
        scheduler = Scheduler(cache, ranks)
        for number in range(options.rounds):
            products = scheduler.run(pictures)
            error = max((a - b).abs().max().item() for a, b in zip(products, expected, strict=True))
            right = right and error < 1e-3
            print(
                f"round {number}: {len(products)} pictures, largest error {error:.1e}", flush=True
            )
        seen = cache.statistics()
        print(f"ranks restarted {scheduler.restarts} times, {seen.used_bytes} bytes left")
    return 0 if right and not seen.used_bytes else 1


if __name__ == "__main__":
    sys.exit(main())
