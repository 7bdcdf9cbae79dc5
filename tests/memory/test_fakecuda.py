"""The fake driver refuses what the real one refuses: tests over it are worth no more than this."""

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from featcache.memory.cuda.driver import Driver, DriverError
from featcache.memory.words import SessionWords
from memory.fakecuda import GRANULARITY_BYTES as SIZE
from memory.fakecuda import Broken, FakeApi, driver_over


class Segment:
    """A driver with one segment mapped in a range of four, and a page of host memory."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api
        self.driver: Driver = driver_over(api)
        self.at = self.driver.reserve(4 * SIZE)
        self.handle = self.driver.create(0, SIZE)
        self.driver.map(self.at, SIZE, self.handle)
        self.page = torch.zeros(8, dtype=torch.int64)
        self.stream = api.CUstream(0)

    def copy(self, target: int, source: int, nbytes: int = 16) -> None:
        (code,) = self.api.cuMemcpyAsync(target, source, nbytes, self.stream)
        assert code == 0

    def word(self, address: int) -> None:
        (code,) = self.api.cuStreamWriteValue64(self.stream, address, 1, 0)
        if code:
            self.driver.fail("cuStreamWriteValue64", code)

    def close(self) -> None:
        self.api.run_all()
        self.driver.unmap(self.at, SIZE)
        self.driver.release(self.handle)
        self.driver.unreserve(self.at, 4 * SIZE)


@pytest.fixture
def one(api: FakeApi) -> Iterator[Segment]:
    with driver_over(api).on(0):
        made = Segment(api)
        yield made
        api.broken.clear()
        made.close()


REFUSED: dict[str, Callable[[Segment], object]] = {
    "mapping over a mapping": lambda s: s.driver.map(s.at, SIZE, s.handle),
    "mapping outside the range": lambda s: s.driver.map(s.at + 4 * SIZE, SIZE, s.handle),
    "mapping across its end": lambda s: s.driver.map(s.at + 3 * SIZE, 2 * SIZE, s.handle),
    "mapping between granules": lambda s: s.driver.map(s.at + SIZE + 4096, SIZE, s.handle),
    "mapping more than there is": lambda s: s.driver.map(s.at + SIZE, 2 * SIZE, s.handle),
    "creating half a granule": lambda s: s.driver.create(0, SIZE // 2),
    "reserving half a granule": lambda s: s.driver.reserve(SIZE // 2),
    "unmapping half": lambda s: s.driver.unmap(s.at, SIZE // 2),
    "unmapping too much": lambda s: s.driver.unmap(s.at, 2 * SIZE),
    "unmapping nothing": lambda s: s.driver.unmap(s.at + SIZE, SIZE),
    "access to what is not mapped": lambda s: s.driver.allow(s.at, 2 * SIZE, [0], write=True),
    "access for no device": lambda s: s.driver.allow(s.at, SIZE, [2], write=True),
    "giving back a range in use": lambda s: s.driver.unreserve(s.at, 4 * SIZE),
    "giving back half a range": lambda s: s.driver.unreserve(s.at, 2 * SIZE),
    "freeing a segment": lambda s: s.driver.free(s.at),
    "a legacy handle of a segment": lambda s: s.driver.ipc_export(s.at),
    "importing what is none": lambda s: s.driver.import_(0),
    "unregistering what is not": lambda s: s.driver.unregister(s.page.data_ptr()),
    "a device's address of what is not": lambda s: s.driver.device_address(s.page.data_ptr()),
    "registering what is not mapped": lambda s: s.driver.register(4096, 4096),
    "registering what can't be written": lambda s: s.driver.register(s.at + SIZE, 4096),
    "a word that is not aligned": lambda s: s.word(s.at + 4),
    "another context's stream": lambda s: s.driver.finish(s.api.CUstream(s.api.side_stream(1))),
    "a stream that is none": lambda s: s.driver.finish(s.api.CUstream(12345)),
    "following no event": lambda s: s.driver.follow(s.stream, s.api.CUstream(12345)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(one: Segment, what: str) -> None:
    one.driver.allow(one.at, SIZE, [0], write=True)
    with pytest.raises(DriverError):
        REFUSED[what](one)
    assert one.api.broken == []


def _release_twice(driver: Driver) -> None:
    handle = driver.create(0, SIZE)
    driver.release(handle)
    driver.release(handle)


BROKEN: dict[str, Callable[[Segment], object]] = {
    "a write before access": lambda s: s.copy(s.at, s.page.data_ptr()),
    "a read before access": lambda s: s.copy(s.page.data_ptr(), s.at),
    "a write across the end": lambda s: s.copy(s.at + SIZE - 8, s.page.data_ptr()),
    "a write to where nothing is": lambda s: s.copy(s.at + SIZE, s.page.data_ptr()),
    "a copy within the host": lambda s: s.copy(s.page.data_ptr(), s.page.data_ptr() + 32),
    "a word by the host's address": lambda s: s.word(s.page.data_ptr()),
    "a word where nothing is": lambda s: s.word(s.at + SIZE),
    "a handle released twice": lambda s: _release_twice(s.driver),
    "a stream that is torch's": lambda s: s.driver.end_stream(s.api.CUstream(s.api.side_stream())),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_rule_is_broken(one: Segment, what: str) -> None:
    with pytest.raises(Broken):
        BROKEN[what](one)
    assert len(one.api.broken) == 1


def test_access_is_for_each_device_and_kind(one: Segment) -> None:
    one.driver.allow(one.at, SIZE, [0], write=False)
    one.copy(one.page.data_ptr(), one.at)
    with pytest.raises(Broken, match="may not"):
        one.copy(one.at, one.page.data_ptr())
    with one.driver.on(1), pytest.raises(Broken, match="may not"):
        one.copy(one.page.data_ptr(), one.at)
    one.driver.allow(one.at, SIZE, [1], write=True)
    with one.driver.on(1):
        one.copy(one.at, one.page.data_ptr())
        one.word(one.at)


def test_in_flight(one: Segment) -> None:
    one.driver.allow(one.at, SIZE, [0], write=True)
    page, fd = SessionWords.create(1)
    base = ctypes.addressof(ctypes.c_char.from_buffer(page.whole))
    one.driver.register(base, page.whole.nbytes)
    with pytest.raises(DriverError, match="ALREADY_REGISTERED"):
        one.driver.register(base, page.whole.nbytes)
    legacy = one.driver.allocate(SIZE)
    one.word(one.driver.device_address(base) + 16)
    one.copy(legacy, one.at)
    ends: list[Callable[[], None]] = [
        partial(one.driver.unregister, base),
        partial(one.driver.unmap, one.at, SIZE),
        partial(one.driver.free, legacy),
    ]
    for end in ends:
        with pytest.raises(Broken, match="in flight"):
            end()
    assert page.whole[2] == 0
    one.driver.synchronize(0)
    assert page.whole[2] == 1
    one.driver.unregister(base)
    one.driver.free(legacy)
    os.close(fd)


def test_without_a_context(api: FakeApi) -> None:
    driver = driver_over(api)
    for call in (driver.stream, lambda: driver.allocate(SIZE), lambda: driver.create(0, SIZE)):
        with pytest.raises(DriverError, match="INVALID_CONTEXT"):
            call()


def test_leftovers(api: FakeApi) -> None:
    driver = driver_over(api)
    with driver.on(0):
        stream, event = driver.stream(), driver.mark(api.CUstream(0))
        address, handle = driver.reserve(SIZE), driver.create(0, SIZE)
        driver.map(address, SIZE, handle)
        fd = driver.export(handle)
        legacy = driver.allocate(SIZE)
        assert api.leftovers().keys() == {
            *("handles", "reservations", "regions", "descriptors", "streams", "events"),
            "contexts left current",
        }
        driver.end_stream(stream)
        driver.drop(event)
        driver.unmap(address, SIZE)
        driver.unreserve(address, SIZE)
        driver.release(handle)
        driver.free(legacy)
    assert list(api.leftovers()) == ["descriptors"]
    os.close(fd)


def test_what_a_memory_is_is_seen_wherever_it_is_mapped(api: FakeApi, peer_api: FakeApi) -> None:
    ours, theirs = driver_over(api), driver_over(peer_api)
    with ours.on(0), theirs.on(1):
        handle = ours.create(0, SIZE)
        fd = ours.export(handle)
        imported = theirs.import_(fd)
        spots = []
        for driver, one in ((ours, handle), (theirs, imported)):
            spots.append(driver.reserve(SIZE))
            driver.map(spots[-1], SIZE, one)
            driver.allow(spots[-1], SIZE, [0, 1], write=True)
        ctypes.memmove(spots[0] + 5, b"seen", 4)
        assert ctypes.string_at(spots[1] + 5, 4) == b"seen"
        for driver, one, at in ((ours, handle, spots[0]), (theirs, imported, spots[1])):
            driver.release(one)  # the mapping keeps it
            assert ctypes.string_at(spots[1] + 5, 4) == b"seen"
            driver.unmap(at, SIZE)
            driver.unreserve(at, SIZE)
    os.close(fd)
