"""An encoder-cache connector for vLLM: encoder outputs shared by all engines of a host.

vLLM's factory loads `FeatcacheECConnector` from here, by ``ec_connector_module_path``. vLLM is imported
when the class is first asked for, not before.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.integrations.vllm.connector import FeatcacheECConnector

__all__ = ["FeatcacheECConnector"]


def __getattr__(name: str) -> Any:
    if name != "FeatcacheECConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from featcache.integrations.vllm.connector import (  # noqa: PLC0415 - vLLM may be absent
            FeatcacheECConnector,
        )
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "vllm":
            raise
        raise ImportError(
            "featcache.integrations.vllm.FeatcacheECConnector needs vLLM 0.32 or newer in this environment"
        ) from missing
    return FeatcacheECConnector
