"""Requests of several samples, whose features SGLang sends once for each."""

from collections.abc import Awaitable, Callable
from typing import Any

from featcache.integrations.sglang.proxy import FeatureProxy
from featcache.integrations.sglang.slab import take_back


async def tokenize(
    original: Callable[..., Awaitable[Any]], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    """Tokenize a request; with ``n`` above 1, send its features through the host.

    SGLang then sends the one tokenized request ``n`` + 1 times, the first to fill its prefix cache, and
    each time every rank reads what a rank pays once. So such features are taken back before any was sent.
    """
    tokenized = await original(manager, obj, *args, **kwargs)
    sampling = getattr(obj, "sampling_params", None)
    inputs = getattr(tokenized, "mm_inputs", None)
    if inputs is not None and isinstance(sampling, dict) and (sampling.get("n") or 1) > 1:
        for item in getattr(inputs, "mm_items", ()):
            for name in ("feature", "precomputed_embeddings"):
                setattr(item, name, _at_hand(getattr(item, name)))
            more = item.model_specific_data
            more.update({name: _at_hand(value) for name, value in more.items()})
    return tokenized


def _at_hand(value: Any) -> Any:
    """Return the feature of a proxy in host memory; anything else as it is."""
    found = take_back(value.ref) if isinstance(value, FeatureProxy) else None
    return value if found is None else found
