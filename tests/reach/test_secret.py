from pathlib import Path

import pytest

from featcache import Settings, SettingsError
from featcache.reach.secret import (
    MAX_KEY_BYTES,
    Address,
    key_from_environment,
    parse_address,
    parse_key,
    read_key,
    tls_contexts,
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("10.0.0.7:7400", "10.0.0.7", 7400), ("gpu-7:0", "gpu-7", 0), ("[fd00::7]:1", "fd00::7", 1)],
)
def test_an_address_there_and_back(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "host",
            ":7400",
            "host:",
            "host:port",
            "host:65536",
            "fd00::7:1",
            "[host]:1",
            "a/b:1",
        ),
        *("h h:1", f"{'h' * 130}:1", None, 7400),
    ],
)
def test_what_is_no_address_is_told_so(text: object) -> None:
    with pytest.raises(SettingsError, match="listen"):
        parse_address(text)


def test_a_key_loses_the_files_newline_and_is_told_if_it_is_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    assert read_key(str(file)) == parse_key("0123456789abcdef") == b"0123456789abcdef"
    assert not caplog.records
    assert parse_key("hunter2") == b"hunter2"
    assert "only 7 bytes" in caplog.text
    assert "hunter2" not in caplog.text
    for wrong in ("", " \n", b"", 7):
        with pytest.raises(SettingsError, match="cluster_key"):
            parse_key(wrong)
    with pytest.raises(SettingsError, match="missing"):
        read_key(str(tmp_path / "missing"))


def test_a_key_is_any_bytes_of_a_file_that_can_be_named_by_its_path(tmp_path: Path) -> None:
    key = bytes(range(128, 160))
    file = tmp_path / "key"
    file.write_bytes(key)
    assert parse_key(file) == read_key(str(file)) == parse_key(key) == key
    file.write_bytes(b"x" * (MAX_KEY_BYTES + 1))
    with pytest.raises(SettingsError, match="4097 bytes"):
        parse_key(file)


def test_a_key_that_all_users_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o640)
    read_key(str(file))
    assert not caplog.records
    file.chmod(0o644)
    read_key(str(file))
    assert f"chmod 600 {file}" in caplog.text


def test_a_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATCACHE_CLUSTER_KEY", raising=False)
    assert key_from_environment() is None
    monkeypatch.setenv("FEATCACHE_CLUSTER_KEY", "x" * 20)
    assert key_from_environment() == b"x" * 20


def test_tls_needs_a_certificate_and_its_key(tmp_path: Path) -> None:
    assert tls_contexts(Settings()) == (None, None)
    for name in ("c", "k"):
        (tmp_path / name).write_text("no certificate")
    cert, key = (str(tmp_path / name) for name in ("c", "k"))
    with pytest.raises(SettingsError, match="both"):
        tls_contexts(Settings(tls_cert=cert))
    with pytest.raises(SettingsError, match="tls_cert"):
        tls_contexts(Settings(tls_cert=cert, tls_key=key))
    with pytest.raises(SettingsError, match="tls_ca"):
        Settings(tls_ca=str(tmp_path / "missing"))
