import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from featcache.control import credentials
from featcache.errors import AttachRefused

FIRST_NAMESPACE = "         0          0 4294967295\n"
CONTAINER = "         0     100000      65536\n"


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    """A connection whose other end is this process."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


def test_a_peer_of_this_user_is_taken(peer: socket.socket) -> None:
    credentials.check_uid(peer)


def test_a_peer_of_another_user_is_refused(
    peer: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(AttachRefused, match=f"the peer runs as uid {own}, this process as"):
        credentials.check_uid(peer)


@pytest.mark.parametrize("uid_map", [CONTAINER, "", "nonsense\n", None])
def test_nobody_is_refused_where_any_unknown_user_is_called_so(
    peer: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uid_map: str | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr(credentials, "_credentials", lambda _: (1, 65534))
    monkeypatch.setattr(credentials, "_UID_MAP", tmp_path / "uid_map")
    if uid_map is not None:
        (tmp_path / "uid_map").write_text(uid_map)
    with pytest.raises(AttachRefused, match="run as another uid"):
        credentials.check_uid(peer)


def test_nobody_is_a_user_like_others_where_all_users_are_known(
    peer: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr(credentials, "_credentials", lambda _: (1, 65534))
    monkeypatch.setattr(credentials, "_UID_MAP", tmp_path / "uid_map")
    (tmp_path / "uid_map").write_text(FIRST_NAMESPACE)
    credentials.check_uid(peer)
