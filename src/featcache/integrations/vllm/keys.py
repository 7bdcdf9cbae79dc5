"""Keys of encoder outputs: vLLM's identifier of an input, and a digest of what its output depends on."""

import hashlib
import json
import re
import sys
from typing import Any, Final

_MAX_IDENTIFIER_BYTES: Final = 160
"""Longer identifiers are digested: users may give their own."""
_PER_REQUEST: Final = re.compile(r".*-[a-z_]+-\d+", re.DOTALL)
"""Identifiers that vLLM makes of a request's id, where it hashes no contents."""
_MODEL: Final = (
    "model",
    "model_impl",
    "hf_config_path",
    "revision",
    "code_revision",
    "dtype",
    "quantization",
    "hf_overrides",
)
_MULTIMODAL: Final = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "video_pruning_rate",
    "video_pruning_method",
)


def facts(vllm_config: Any, namespace: str) -> dict[str, Any]:
    """Return what the encoder's output for one identifier depends on, from vLLM's config."""
    model = vllm_config.model_config
    multimodal = getattr(model, "multimodal_config", None)
    found = {name: _plain(getattr(model, name, None)) for name in _MODEL}
    found |= {name: _plain(getattr(multimodal, name, None)) for name in _MULTIMODAL}
    origin = getattr(model, "model_weights", None)
    if origin:  # then `model` is the folder of this engine to which it was brought
        found["model"] = _plain(origin)
    # Another version may lay the same model's outputs out otherwise.
    found["vllm"] = str(getattr(sys.modules.get("vllm"), "__version__", ""))
    found["namespace"] = namespace
    load = getattr(vllm_config, "load_config", None)
    if str(getattr(load, "load_format", "")) == "dummy":  # random weights, as the seed has them
        found["seed"] = _plain(getattr(model, "seed", None))
    return found


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; of what JSON has not, its text, unless that is an address."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in sorted(value.items(), key=str)}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _plain(each) for each in (value if isinstance(value, list | tuple) else sorted(value))
        ]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value))}"
    return str(value)


def hashes_contents(vllm_config: Any) -> bool:
    """Whether vLLM's identifiers are hashes of contents; else many are only a request's id.

    vLLM skips hashing with both its processor's cache and prefix caching off.
    """
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    cached = getattr(multimodal, "mm_processor_cache_gb", 1) != 0
    return cached or bool(getattr(vllm_config.cache_config, "enable_prefix_caching", True))


class Keys:
    """Makes keys. Of one model, revision, dtype and processor options, in all engines, the same."""

    def __init__(self, found: dict[str, Any], *, contents: bool = True) -> None:
        text = json.dumps(found, sort_keys=True)
        self.digest: Final = hashlib.sha256(text.encode()).hexdigest()[:24]
        self._contents = contents

    def key(self, identifier: str) -> str | None:
        """Return the key of an identifier, or None if another engine may mean another input by it."""
        if not self._contents and _PER_REQUEST.fullmatch(identifier):
            return None
        data = identifier.encode("utf-8", "surrogatepass")
        if len(data) > _MAX_IDENTIFIER_BYTES or not identifier.isprintable():
            identifier = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return f"vllm:{self.digest}:{identifier}"
