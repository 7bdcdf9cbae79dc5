import pytest

from support import fakeplane


@pytest.fixture(autouse=True)
def fake_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    fakeplane.install(monkeypatch)
