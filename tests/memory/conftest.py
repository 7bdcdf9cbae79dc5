"""Fake drivers for the tests of memory/, looked at after each test."""

from collections.abc import Callable, Iterator

import pytest

from memory.fakecuda import FakeApi

NewApi = Callable[..., FakeApi]


@pytest.fixture
def new_api() -> Iterator[NewApi]:
    """Makes drivers of processes. Fails a test that breaks their rules, or leaves anything open."""
    made: list[FakeApi] = []

    def new(visible: tuple[int, ...] = (0, 1), *, peers: bool = True, mib: int = 64) -> FakeApi:
        made.append(FakeApi(visible, peers=peers, total_bytes=mib << 20))
        return made[-1]

    yield new
    for api in made:
        assert api.broken == []
        assert api.leftovers() == {}


@pytest.fixture
def api(new_api: NewApi) -> FakeApi:
    """The owner's driver."""
    return new_api()


@pytest.fixture
def peer_api(new_api: NewApi) -> FakeApi:
    """The driver of a reader in another process."""
    return new_api()
