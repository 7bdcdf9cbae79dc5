"""How an owner is told its upstreams: in a program, on the command line, in its file and environment."""

from pathlib import Path
from typing import Any

import pytest

import featcache
from featcache import SettingsError
from featcache.cli.config import options_of
from reach.hosts import KEY, quick


@pytest.mark.parametrize(
    ("upstream", "told"),
    [
        ("10.0.0.7:7400", "not a list"),
        (7400, "not a list"),
        (["10.0.0.7"], "not HOST:PORT"),
        (["10.0.0.7:0"], "port 0"),
        (["0.0.0.0:7400"], "no host's"),
        (["[::]:7400"], "no host's"),
        ([f"10.0.0.7:{port}" for port in range(1, 6)], "Settings.peers is 4"),
    ],
)
def test_a_list_that_is_none_is_refused(upstream: Any, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        featcache.create(settings=quick(peers=4), upstream=upstream, cluster_key=KEY)


def test_upstreams_need_the_key_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATCACHE_CLUSTER_KEY", raising=False)
    with pytest.raises(SettingsError, match="needs the key"):
        featcache.create(upstream=["10.0.0.7:7400"])


def test_a_command_is_told_by_options_environment_or_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('upstream = ["a:1", "b:2"]\n')
    assert options_of({}, str(file)).upstream == ("a:1", "b:2")
    monkeypatch.setenv("FEATCACHE_UPSTREAM", "c:3, d:4")
    assert options_of({"upstream": ()}, str(file)).upstream == ("c:3", "d:4")
    assert options_of({"upstream": ("e:5",)}, str(file)).upstream == ("e:5",)
    file.write_text("upstream = [1]\n")
    monkeypatch.delenv("FEATCACHE_UPSTREAM")
    with pytest.raises(SettingsError, match="not a list of texts"):
        options_of({}, str(file))
