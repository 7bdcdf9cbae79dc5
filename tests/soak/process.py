"""What each process of a soak has: its place, its numbers, its chance, its device."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import torch

import featcache
from featcache import FeatcacheError, FeatureClient, FeatureRef, OwnerLost, Settings
from featcache.errors import AttachRefused, CacheClosed
from soak.board import Step, Word
from soak.content import Content, Feature, of_key, pack, unpack
from soak.plan import Place, Role, World
from support.leaks import difference, open_descriptors

_TAKE_S = 0.05
GPU_FILES = "/dev/nvidia"
"""What a CUDA context has open; it opens more as it pleases."""


class Fumble(Exception):
    """What a `make` raises by chance."""


class Process:
    """One process, from its fork to its death."""

    def __init__(self, world: World, place: Place, number: int) -> None:
        self.world = world
        self.place = place
        self.number = number
        self.row = world.board.rows[place.number]
        self.chance = random.Random(f"{world.seed}:{place.number}:{number}")
        self.inbox = world.mail.inbox(place)
        self.endpoint = world.endpoint(place.pool)
        self.open_first: Counter[str] = Counter()
        self.open_since: dict[str, int] = {}
        self._made = 0

    @property
    def stopping(self) -> bool:
        """Whether the storm is over."""
        return self.world.board.stopping > 0

    @property
    def device(self) -> str | None:
        """Where this process reads: on GPUs, by turns. CUDA is first used here, after the fork."""
        if self.world.device == "cpu":
            return None
        if self.place.role is Role.OWNER:
            return "cuda:0"
        return f"cuda:{self.place.number % torch.cuda.device_count()}"

    @property
    def made_on(self) -> str:
        """Where this process makes its features."""
        return self.device or "cpu"

    # --- numbers ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def at(self, step: Step, counted: Word | None = None) -> Iterator[None]:
        """Say at which step the process is; count it when it is done."""
        self.row[Word.AT] = step
        yield
        self.row[Word.AT] = Step.PAUSE
        if counted is not None:
            self.row.count(counted)
            self.row.count(Word.BEGUN)

    def check(self, content: Content, found: Feature, what: str) -> None:
        """Compare bytes that were read with those that were put."""
        if not content.is_right(found):
            self.row.count(Word.WRONG)
            self.world.board.fault(f"WRONG BYTES at {self.place}: {what} of {content}")

    @contextlib.contextmanager
    def tolerating(self) -> Iterator[None]:
        """Count the errors of one operation. Those that end the client go on to `served`."""
        try:
            yield
        except (OwnerLost, CacheClosed, AttachRefused):
            raise
        except FeatcacheError as error:
            self.row.error(error)
        except Fumble:
            pass
        except Exception as error:  # noqa: BLE001 - that none comes is what is tested
            self.outside(error)
        finally:
            self.row.beat()

    def outside(self, error: BaseException) -> None:
        """Count an error that is none of the tree."""
        limited = time.monotonic_ns() < self.row[Word.LIMITED_NS]
        self.row.count(Word.OUTSIDE_LIMITED if limited else Word.OUTSIDE)
        what = "under a limit" if limited else "OUTSIDE THE TREE"
        text = "".join(traceback.format_exception(error))
        self.world.board.fault(f"{what} at {self.place}:\n{text}")

    # --- features --------------------------------------------------------------------------------

    def content(self) -> Content:
        """A content that nobody else makes, as often small as large."""
        self._made += 1
        seed = (self.place.number << 52) + (self.number << 30) + self._made
        most = self.world.sizes.most_words
        return Content(seed, max(16, most >> self.chance.randrange(most.bit_length() - 4)))

    def key(self) -> tuple[str, Content]:
        """A key, some more often than others, and its content."""
        number = int(self.chance.paretovariate(0.6)) % 48
        return of_key(number, self.world.sizes.key_words)

    async def take(self) -> tuple[Content, FeatureRef] | None:
        """Wait a moment for the next message of the mailbox."""
        loop = asyncio.get_running_loop()
        try:
            message = await asyncio.wait_for(loop.sock_recv(self.inbox, 1 << 16), _TAKE_S)
        except (TimeoutError, OSError):
            self.row.beat()
            return None
        return unpack(message)

    def send(self, content: Content, ref: FeatureRef, places: list[Place]) -> int:
        """Send a ref to places; return how many got it."""
        message = pack(content, ref)
        return sum(self.world.mail.send(place, message) for place in places)

    async def pause(self, most_s: float = 0.004) -> None:
        """Leave the machine to others."""
        self.row.beat()
        await asyncio.sleep(self.chance.random() * most_s)


Act = Callable[[Process, FeatureClient], Awaitable[None]]


async def served(
    me: Process, act: Act, *, bound: bool = True, settings: Settings | None = None
) -> None:
    """Attach, act until the end, and attach anew whenever the owner is lost."""
    chosen = settings or me.world.sizes.settings()
    endpoint = me.endpoint if bound else None
    if me.device is not None and not me.place.mortal:
        _wake_gpus()
    while not me.stopping:
        try:
            me.row[Word.AT] = Step.ATTACH
            async with featcache.connect(
                endpoint, device=me.device, name=me.place.name, settings=chosen
            ) as client:
                me.row.count(Word.ATTACHES)
                ends_s = time.monotonic() + (1e9 if me.place.mortal else 5.0)
                while not me.stopping and time.monotonic() < ends_s:
                    with me.tolerating():
                        await act(me, client)
                me.row[Word.AT] = Step.CLOSE
        except FeatcacheError as error:
            me.row.error(error)
        except Exception as error:  # noqa: BLE001 - see tolerating
            me.outside(error)
        me.row[Word.AT] = Step.PAUSE
        if not me.place.mortal:
            note_descriptors(me)
        await me.pause(0.04)
    if me.open_since:
        me.world.board.fault(f"LEFT OPEN at {me.place}: {me.open_since}")


def _wake_gpus() -> None:
    """Make a context on each GPU, so that what the driver opens for one, eventfds too, is there at first.

    A reader that is bound to no pool may end its first client before it has met a ref.
    """
    for ordinal in range(torch.cuda.device_count()):
        assert not torch.zeros(1, device=f"cuda:{ordinal}").cpu().any()


def note_descriptors(me: Process) -> None:
    """Of a process that lasts: what it has open between two clients, more than at first."""
    gc.collect()
    try:
        now = open_descriptors()
    except OSError:  # a limit
        return
    me.open_first = me.open_first or now
    grown = {
        name: n
        for name, n in difference(me.open_first, now).items()
        if n > 0 and not name.startswith(GPU_FILES)
    }
    me.row[Word.FDS_LEFT] = sum(grown.values())
    me.open_since = grown
