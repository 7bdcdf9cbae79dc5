"""featcache: tensors shared between the processes of a model server, without copies through the host.

One process, the owner, holds a slab and puts features into it; the small refs it hands out are turned
back into tensors by readers in other processes. A feature whose reads are all paid is recycled.
"""

import contextlib
import importlib

from featcache import blocking
from featcache.api.cache import FeatureCache, create
from featcache.api.client import FeatureClient, connect
from featcache.api.content_key import content_key
from featcache.api.observer import Observer, observe
from featcache.core.pressure import PressureLevel
from featcache.errors import (
    AttachRefused,
    BackendUnavailable,
    CacheClosed,
    FeatcacheError,
    FeatureTooLarge,
    GetTimeout,
    KeyNotFound,
    KeyTimeout,
    MalformedRef,
    OwnerLost,
    OwnerUnreachable,
    PoolFull,
    PutTimeout,
    SettingsError,
    StaleRef,
    UnknownPool,
    WrongLoop,
)
from featcache.observation import (
    HomeView,
    KeysPage,
    KeyView,
    ReadingHostView,
    SessionView,
    SlabMap,
    Snapshot,
)
from featcache.ref import FeatureRef
from featcache.settings import Settings, split_budget
from featcache.statistics import Statistics
from featcache.tier import Tier
from featcache.version import VERSION

__all__ = [
    "AttachRefused",
    "BackendUnavailable",
    "CacheClosed",
    "FeatcacheError",
    "FeatureCache",
    "FeatureClient",
    "FeatureRef",
    "FeatureTooLarge",
    "GetTimeout",
    "HomeView",
    "KeyNotFound",
    "KeyTimeout",
    "KeyView",
    "KeysPage",
    "MalformedRef",
    "Observer",
    "OwnerLost",
    "OwnerUnreachable",
    "PoolFull",
    "PressureLevel",
    "PutTimeout",
    "ReadingHostView",
    "SessionView",
    "Settings",
    "SettingsError",
    "SlabMap",
    "Snapshot",
    "StaleRef",
    "Statistics",
    "Tier",
    "UnknownPool",
    "WrongLoop",
    "blocking",
    "connect",
    "content_key",
    "create",
    "observe",
    "split_budget",
]

# The event loop's half of anyio is imported by its first timeout, which takes 20 to 40 ms: not in a turn
# of the application's loop. The module's name is not public.
with contextlib.suppress(ImportError):
    importlib.import_module("anyio._backends._asyncio")

__version__ = VERSION
