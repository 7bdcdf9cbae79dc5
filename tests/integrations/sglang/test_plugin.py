"""The plugin as SGLang finds and loads it."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

from integrations.sglang.real import needs_sglang

pytestmark = needs_sglang


def test_it_is_an_entry_point_of_sglangs_plugins() -> None:
    found = entry_points(group="sglang.srt.plugins")

    assert {entry.name: entry.value for entry in found}["featcache"] == (
        "featcache.integrations.sglang:register"
    )


def test_loaded_it_replaces_the_pools_wherever_they_were_imported() -> None:
    from sglang.srt.managers import positional_embeds_transport, tokenizer_manager
    from sglang.srt.multimodal.processors import base_processor
    from sglang.srt.utils import cuda_vmm_transport_utils

    from featcache.integrations.sglang.ipc import FeatcacheItemPool
    from featcache.integrations.sglang.vmm import FeatcacheFeatureTransport, FeatcacheVmmPool

    assert base_processor.MmItemMemoryPool is FeatcacheItemPool
    assert positional_embeds_transport.MmItemMemoryPool is FeatcacheItemPool
    assert tokenizer_manager.CudaVmmFeatureTransport is FeatcacheFeatureTransport
    assert cuda_vmm_transport_utils.CudaVmmMemoryPool is FeatcacheVmmPool


def test_loaded_it_looks_at_each_request_that_is_tokenized() -> None:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.plugins.hook_registry import HookRegistry

    target = f"{TokenizerManager.__module__}.TokenizerManager._tokenize_one_request"
    assert target in HookRegistry._patched


def test_tokenizer_workers_import_an_application_that_loads_plugins() -> None:
    from sglang.srt.environ import envs

    assert envs.SGLANG_HTTP_SERVER_APP_PATH.get() == "featcache.integrations.sglang.http_app:app"


@pytest.mark.parametrize("named", ["", "another"])
def test_it_does_nothing_unless_it_is_named(named: str) -> None:
    program = (
        "import sys; from featcache.integrations import sglang as plugin; plugin.register();"
        "print([name for name in sys.modules if name.startswith('sglang')])"
    )
    environment = os.environ | {"SGLANG_PLUGINS": named}

    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )

    assert told.stdout == "[]\n"


def test_a_proxy_passes_sglangs_allowlist_of_unpickling(make_proxy: Any) -> None:
    import pickle

    from sglang.srt.utils.common import safe_pickle_loads

    proxy = make_proxy()

    again = safe_pickle_loads(pickle.dumps(proxy))

    assert type(again) is type(proxy)
    assert (again.ref, again.readers) == (proxy.ref, proxy.readers)


def test_a_proxy_passes_sglangs_messagepack(make_proxy: Any) -> None:
    import msgspec
    from sglang.srt.utils.msgpack_utils import enc_hook, ext_hook

    proxy = make_proxy()

    data = msgspec.msgpack.encode(proxy, enc_hook=enc_hook)
    again = msgspec.msgpack.decode(data, ext_hook=ext_hook)

    assert type(again) is type(proxy)
    assert (again.ref, again.readers) == (proxy.ref, proxy.readers)


@pytest.fixture(params=["ipc", "vmm"])
def make_proxy(request: pytest.FixtureRequest) -> Any:
    from featcache import FeatureRef
    from featcache.integrations.sglang import ipc, vmm
    from featcache.integrations.sglang.readers import Readers
    from featcache.ref import TensorSpec

    kind = {"ipc": ipc.FeatcacheIpcProxy, "vmm": vmm.FeatcacheVmmProxy}[request.param]
    ref = FeatureRef(b"p" * 16, "/run/s", 1, 2, 0, 256, (TensorSpec(None, "bfloat16", (4, 8), 0),))
    return lambda: kind(ref, Readers(2, "sglang-a"))
