"""How agents of NIXL are made: a wrapper that sets no pause is given one."""

import types
from typing import Any

from featcache.reach.nixl_agent import make_agent


class Config:
    """As the bindings', whose fields are data descriptors of a compiled class."""

    def __init__(self) -> None:
        self._pause_us = -1

    @property
    def pthrDelay(self) -> int:  # noqa: N802 - NIXL's name
        return self._pause_us

    @pthrDelay.setter
    def pthrDelay(self, pause_us: int) -> None:  # noqa: N802
        self._pause_us = pause_us


def wrapper(pause_us: int) -> Any:
    """A module as NIXL's Python wrapper, which sets this pause."""
    module: Any = types.SimpleNamespace(nixlBind=types.SimpleNamespace(nixlAgentConfig=Config))
    module.nixl_agent_config = lambda **fields: fields

    def agent(name: str, config: dict[str, object]) -> tuple[str, dict[str, object], int]:
        made = module.nixlBind.nixlAgentConfig()
        made.pthrDelay = pause_us
        return name, config, made.pthrDelay

    module.nixl_agent = agent
    return module


def test_an_agent_whose_wrapper_has_its_thread_poll_without_end_pauses() -> None:
    module = wrapper(0)
    before = module.nixlBind
    name, config, pause_us = make_agent(module, "one")
    assert (name, config) == ("one", {"backends": ["UCX"]})
    assert pause_us >= 1000  # less is rounded up by some releases, and to nothing by others
    assert module.nixlBind is before


def test_a_pause_of_the_wrapper_s_own_is_kept() -> None:
    assert make_agent(wrapper(7), "one")[2] == 7


def test_variables_of_ucx_are_given_to_its_backend_which_is_made_last() -> None:
    """By NIXL's own parameter, which leaves what the environment says as it is."""
    made: list[tuple[object, ...]] = []

    def agent(name: str, config: dict[str, object]) -> Any:
        made.append((name, config))
        return types.SimpleNamespace(create_backend=lambda *what: made.append(what))

    module = types.SimpleNamespace(nixl_agent_config=dict, nixl_agent=agent)
    make_agent(module, "one", {"TLS": "^cuda_ipc", "LOG_LEVEL": "warn"})
    assert made == [
        ("one", {"backends": []}),
        ("UCX", {"engine_config": "TLS=^cuda_ipc,LOG_LEVEL=warn"}),
    ]


def test_a_wrapper_without_such_bindings_is_used_as_it_is() -> None:
    module = types.SimpleNamespace(nixl_agent_config=dict, nixl_agent=lambda name, _: name)
    assert make_agent(module, "one") == "one"
