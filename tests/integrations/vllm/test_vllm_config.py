"""What the connector's settings and keys are made of: with no vLLM here."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import featcache.integrations.vllm as ours
from featcache import SettingsError
from featcache.integrations.vllm import config
from featcache.integrations.vllm.features import fits, packed, tensors_of, unpacked
from featcache.integrations.vllm.keys import Keys, facts, hashes_contents
from support.slabs import same


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({}, "'endpoint' is missing"),
        ({"endpoint": ""}, "'endpoint' is a string"),
        ({"endpoint": 7}, "'endpoint' is a string, not 7"),
        ({"endpoint": "a", "peer_wait": "5"}, "'peer_wait' is a number, not '5'"),
        ({"endpoint": "a", "peer_wait": -1}, "'peer_wait' is between 0.0 and 600.0, not -1"),
        ({"endpoint": "a", "save_queue": 2.5}, "'save_queue' is a whole number, not 2.5"),
        ({"endpoint": "a", "save_queue": True}, "'save_queue' is a whole number, not True"),
        ({"endpoint": "a", "endpiont": "b"}, "'endpiont' is not known: it takes endpoint, "),
        ({"endpoint": "x" * 120}, "is longer than a Unix socket's 107 bytes"),
        ({"endpoint": "a\0b"}, "is not a path in UTF-8"),
        (["endpoint"], "it is a table of settings, not list"),
    ],
)
def test_a_mistake_is_told_in_one_line(extra: Any, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        config.parse(extra)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_has_a_default() -> None:
    parsed = config.parse({"endpoint": "a", "peer_wait": 1})
    assert (parsed.endpoint, parsed.peer_wait, parsed.save_queue) == ("a", 1.0, 64)


def vllm_config(**changes: Any) -> SimpleNamespace:
    """As much of vLLM's config as keys are made of."""
    multimodal: dict[str, Any] = {
        "mm_processor_kwargs": None,
        "mm_processor_cache_gb": 4,
        "media_io_kwargs": {},
        "video_pruning_rate": None,
    }
    model = {
        "model": "m",
        "model_impl": "auto",
        "model_weights": "",
        "revision": None,
        "dtype": torch.float16,
        "seed": 0,
    }
    rest = {"load_format": "auto", "enable_prefix_caching": True}
    for name, value in changes.items():
        next(each for each in (multimodal, model, rest) if name in each)[name] = value
    return SimpleNamespace(
        model_config=SimpleNamespace(**model, multimodal_config=SimpleNamespace(**multimodal)),
        load_config=SimpleNamespace(load_format=rest["load_format"]),
        cache_config=SimpleNamespace(enable_prefix_caching=rest["enable_prefix_caching"]),
    )


def digest(namespace: str = "", **changes: Any) -> str:
    return Keys(facts(vllm_config(**changes), namespace)).digest


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"revision": "abc"},
        {"dtype": torch.bfloat16},
        {"mm_processor_kwargs": {"max_pixels": 1}},
        {"media_io_kwargs": {"video": {"num_frames": 8}}},
        {"video_pruning_rate": 0.5},
        {"model_impl": "transformers"},
        {"load_format": "dummy"},
        {"namespace": "mine"},
    ],
)
def test_what_an_output_depends_on_makes_another_key(change: dict[str, Any]) -> None:
    assert digest(**change) != digest()
    assert digest(**change) == digest(**change)


def test_a_model_from_an_object_store_is_told_by_where_it_came_from() -> None:
    one = digest(model="/run/one", model_weights="s3://m")
    assert one == digest(model="/run/other", model_weights="s3://m")
    assert one != digest(model="/run/one", model_weights="s3://other")


def test_versions_of_vllm_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for version in ("0.32.0", "0.33.0"):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
        found.add(digest())
    assert len(found) == 2


def test_the_order_of_processor_options_is_no_matter() -> None:
    one, other = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
    assert digest(mm_processor_kwargs=one) == digest(mm_processor_kwargs=other)


def test_random_weights_are_those_of_their_seed() -> None:
    assert digest(load_format="dummy", seed=1) != digest(load_format="dummy", seed=2)
    assert digest(seed=1) == digest(seed=2)


@pytest.mark.parametrize("identifier", ["abc", "a" * 5000, "\ud800", "line\nbreak", "图" * 100])
def test_any_identifier_has_a_key_that_a_pool_takes(identifier: str) -> None:
    key = Keys({}).key(identifier)
    assert key is not None
    assert len(key.encode()) <= 1024
    assert key != Keys({}).key(identifier + "x")


def test_identifiers_of_requests_are_shared_with_nobody() -> None:
    config_ = vllm_config(mm_processor_cache_gb=0, enable_prefix_caching=False)
    assert not hashes_contents(config_)
    keys = Keys({}, contents=False)
    assert keys.key("0-image-0") is None
    assert keys.key("a-users-own-uuid") is not None
    assert hashes_contents(vllm_config(mm_processor_cache_gb=0))
    assert Keys({}).key("0-image-0") is not None


LEVELS = [torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int8)]


@pytest.mark.parametrize("output", [LEVELS[0], LEVELS, {"image": LEVELS[0], "deep": LEVELS[1]}])
def test_an_output_of_any_form_comes_back_in_it(output: Any) -> None:
    back = unpacked(packed(output))
    assert type(back) is type(output)
    if isinstance(output, torch.Tensor):
        assert same(back, output)
    else:
        assert all(same(*pair) for pair in zip(tensors_of(back), tensors_of(output), strict=True))


def test_an_output_with_other_rows_does_not_fit() -> None:
    assert fits(torch.ones(4, 8), 4)
    assert fits(torch.ones(4, 8), None)
    assert not fits(torch.ones(4, 8), 5)


def test_without_vllm_the_connector_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "featcache.integrations.vllm.connector", raising=False)
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32 or newer in this environment$"):
        _ = ours.FeatcacheECConnector
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = ours.Other
