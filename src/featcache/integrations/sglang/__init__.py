"""featcache as SGLang's transport of multimodal features: a plugin by entry point.

With featcache installed beside SGLang 0.5.23 and ``SGLANG_PLUGINS=featcache`` the pools of
``--mm-feature-transport cuda_ipc`` and ``cuda_vmm`` are one slab of featcache's, which all tokenizer
workers share. ``docs/sglang.md`` is the how-to. SGLang is imported by `register` alone.
"""

import os

__all__ = ["register"]

_NAME = "featcache"


def register() -> None:
    """Register featcache's pools with SGLang's hooks: the entry point of group ``sglang.srt.plugins``.

    SGLang calls it in every process that loads plugins. It does nothing unless ``SGLANG_PLUGINS`` names
    it: SGLang loads every plugin that is installed where that is not set, and featcache may be installed
    for other reasons.
    """
    named = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")}
    if _NAME not in named:
        return
    from featcache.integrations.sglang import plugin  # noqa: PLC0415 - it imports SGLang

    plugin.register()
