"""A blocking client with ``reconnect=True`` outlives its owner."""

from pathlib import Path

import pytest
import torch

import featcache.blocking
from featcache import OwnerLost, OwnerUnreachable
from support.caches import small

pytestmark = pytest.mark.usefixtures("no_leaks")


def attached(client: featcache.blocking.FeatureClient) -> bool:
    return client.is_attached


def test_a_blocking_client_goes_on_with_the_next_owner(tmp_path: Path) -> None:
    endpoint, settings = str(tmp_path / "pool.sock"), small(reconnect_interval=0.02)
    with featcache.blocking.connect(endpoint, reconnect=True, settings=settings) as client:
        for value in range(3):
            assert not attached(client)
            with pytest.raises(OwnerUnreachable):
                client.wait_attached(timeout=0)
            with pytest.raises(OwnerLost):
                client.put(torch.zeros(8), key="k")
            with pytest.raises(OwnerLost):
                client.get_or_put("k", lambda: torch.zeros(8))
            with pytest.raises(OwnerLost):
                client.contains("k")
            with pytest.raises(OwnerLost), client.borrow("k"):
                pass
            with featcache.blocking.create(endpoint=endpoint, settings=settings):
                client.wait_attached(timeout=30)
                client.put(torch.full((8,), value), key="k")
                assert client.contains_nowait("k")
                found = client.get("k")
                assert isinstance(found, torch.Tensor)
                assert found.tolist() == [value] * 8
            while attached(client):  # its loop has yet to hear of it
                with pytest.raises((OwnerLost, featcache.KeyNotFound)):
                    client.get("absent", timeout=0)
