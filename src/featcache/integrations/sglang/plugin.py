"""What `register` does in a process of SGLang's: its hooks, and what its two encodings must know."""

from collections.abc import Callable
from typing import Any, Final

from sglang.srt.environ import envs
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils.common import SafeUnpickler

from featcache.integrations.sglang.config import server_id
from featcache.integrations.sglang.ipc import FeatcacheItemPool, restore_ipc
from featcache.integrations.sglang.proxy import FeatureProxy
from featcache.integrations.sglang.samples import tokenize
from featcache.integrations.sglang.vmm import (
    FeatcacheFeatureTransport,
    FeatcacheVmmPool,
    FeatcacheVmmProxy,
    restore_vmm,
)

_IPC: Final = "sglang.srt.multimodal.transport.cuda_ipc"
_VMM: Final = "sglang.srt.utils.cuda_vmm_transport_utils"
_MSGPACK: Final = "sglang.srt.utils.msgpack_utils"
_TOKENIZE: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_one_request"
_APP: Final = "sglang.srt.entrypoints.http_server:app"
_OUR_APP: Final = "featcache.integrations.sglang.http_app:app"
_FIELD: Final = "featcache"

REPLACED: Final[dict[str, type]] = {
    f"{_IPC}.MmItemMemoryPool": FeatcacheItemPool,
    f"{_VMM}.CudaVmmMemoryPool": FeatcacheVmmPool,
    f"{_VMM}.CudaVmmFeatureTransport": FeatcacheFeatureTransport,
}
"""SGLang's classes, and featcache's in their place."""


def register() -> None:
    """Register the hooks; SGLang applies them, and tells every module that had the classes."""
    server_id()  # made in the first process: those that it starts inherit it
    for target, replacement in REPLACED.items():
        HookRegistry.register(target, replacement, HookType.REPLACE)
    # With SGLANG_USE_PICKLE_IPC=0 requests are MessagePack, which has no way for SGLang's own proxies.
    HookRegistry.register(f"{_MSGPACK}._encode_cuda_ipc_tensor_proxy", _encode, HookType.AROUND)
    HookRegistry.register(f"{_MSGPACK}._decode_cuda_ipc_tensor_proxy", _decode, HookType.AROUND)
    HookRegistry.register(_TOKENIZE, tokenize, HookType.AROUND)
    # Proxies are rebuilt from bytes by these two, which check what they are given.
    SafeUnpickler.ALLOWED_GLOBALS.update(
        (one.__module__, one.__name__) for one in _RESTORES.values()
    )
    # SGLang loads no plugins in the processes of several tokenizer workers; they import this instead.
    if envs.SGLANG_HTTP_SERVER_APP_PATH.get() == _APP:
        envs.SGLANG_HTTP_SERVER_APP_PATH.set(_OUR_APP)


_RESTORES: Final[dict[str, Callable[[bytes], FeatureProxy]]] = {
    "ipc": restore_ipc,
    "vmm": restore_vmm,
}


def _encode(encode: Callable[[Any], object], proxy: Any) -> object:
    """Encode a proxy for MessagePack: featcache's by its bytes, others as SGLang does."""
    if not isinstance(proxy, FeatureProxy):
        return encode(proxy)
    kind = "vmm" if isinstance(proxy, FeatcacheVmmProxy) else "ipc"
    return {_FIELD: proxy.to_bytes(), "kind": kind}


def _decode(decode: Callable[[Any], object], state: dict[str, Any]) -> object:
    data = state.get(_FIELD)
    return decode(state) if data is None else _RESTORES[state["kind"]](data)
