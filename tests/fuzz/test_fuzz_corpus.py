"""The inputs that fuzzing kept, and its seeds, keep their promises."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from featcache import FeatureRef
from fuzz import seeds, targets

CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    targets.close()


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_kept_inputs(target: str, closed: None) -> None:
    kept = [path.read_bytes() for path in (CORPUS / target).iterdir()]
    assert kept
    for data in kept:
        targets.TARGETS[target](data)


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_seeds_decode(target: str, closed: None) -> None:
    decoded = [targets.TARGETS[target](data) for data in seeds.seeds()[target]]
    assert any(decoded)
    if target in ("ref", "message"):
        assert all(decoded), decoded


def test_every_message_has_a_seed() -> None:
    assert not seeds.missing()


def test_the_corpus_is_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) <= 100
    assert sum(path.stat().st_size for path in files) <= 100 << 10


def test_a_decoder_that_lies_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (data for data in seeds.seeds()["ref"] if data[0] == 0)
    monkeypatch.setattr(FeatureRef, "to_bytes", lambda ref: second[1:])
    with pytest.raises(AssertionError, match="comes back as another"):
        targets.ref(first)
