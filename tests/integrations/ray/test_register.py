"""`register` where Ray is not installed, as here it may be: hidden, if it is."""

import sys

import pytest

from featcache import SettingsError
from featcache.integrations.ray import register


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "featcache.integrations.ray.transport", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.usefixtures("no_ray")
def test_without_ray_one_line_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"pip install 'featcache\[ray\]'") as caught:
        register("/run/featcache/pool.sock")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_ray")
def test_the_endpoint_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_ENDPOINT", "/run/featcache/pool.sock")
    with pytest.raises(ImportError, match="needs Ray"):  # so it was content with the endpoint
        register()


def test_without_an_endpoint_it_says_where_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATCACHE_ENDPOINT", raising=False)
    with pytest.raises(SettingsError, match="FEATCACHE_ENDPOINT"):
        register()


def test_a_mistake_in_an_argument_is_told_before_ray_is_asked() -> None:
    with pytest.raises(SettingsError, match="timeout"):
        register("/run/featcache/pool.sock", put_timeout=-1)
    with pytest.raises(SettingsError, match="endpoint"):
        register("/" + "x" * 200)
