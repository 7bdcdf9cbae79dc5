"""A NIXL agent whose own thread sleeps while its sockets are quiet.

The Python wrapper of NIXL 1.5 sets the pause of its progress thread to zero, with which that thread
polls without end: an owner that does nothing would keep a core busy, and a transfer would wait for
the core that its peer's polling has. The configuration's class takes another pause, and wakes for
whatever comes meanwhile; the wrapper has no argument for it.
"""

import threading
from collections.abc import Mapping
from typing import Any, Final

_PAUSE_US: Final = 2000
"""Microseconds after which the progress thread looks even if nothing woke it: NIXL asks for some, as
UCX may miss a wake-up."""
_bindings_lock: Final = threading.Lock()


def make_agent(api: Any, name: str, ucx: Mapping[str, str] | None = None) -> Any:
    """Return an agent of the UCX backend; `api` is NIXL's module.

    `ucx` are variables of UCX without their prefix, such as ``{"TLS": "^cuda_ipc"}``: those that the
    environment has stay as they are there.
    """
    if not ucx:
        return _made(api, name, ["UCX"])
    agent = _made(api, name, [])
    told = ",".join(f"{variable}={value}" for variable, value in ucx.items())
    agent.create_backend("UCX", {"engine_config": told})
    return agent


def _made(api: Any, name: str, backends: list[str]) -> Any:
    config = api.nixl_agent_config(backends=backends)
    bindings = getattr(api, "nixlBind", None)
    if not hasattr(getattr(bindings, "nixlAgentConfig", None), "pthrDelay"):
        return api.nixl_agent(name, config)
    with _bindings_lock:  # the module's name is replaced while the agent is made
        api.nixlBind = _Bindings(bindings)
        try:
            return api.nixl_agent(name, config)
        finally:
            api.nixlBind = bindings


class _Bindings:
    """NIXL's bindings, but for the configuration."""

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings
        base = bindings.nixlAgentConfig
        told = base.pthrDelay
        pause = property(
            told.__get__, lambda config, pause_us: told.__set__(config, pause_us or _PAUSE_US)
        )
        self.nixlAgentConfig = type("PausingConfig", (base,), {"pthrDelay": pause})

    def __getattr__(self, name: str) -> Any:
        """Return what the bindings have."""
        return getattr(self._bindings, name)
