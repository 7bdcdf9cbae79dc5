"""featcache: tensors shared between the processes of a model server, without copies through the host.

One process, the owner, holds a slab and puts features into it; the small refs it hands out are turned
back into tensors by readers in other processes. A feature whose reads are all paid is recycled.
"""

from featcache import blocking
from featcache.api.cache import FeatureCache, create
from featcache.api.client import FeatureClient, connect
from featcache.api.content_key import content_key
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
from featcache.ref import FeatureRef
from featcache.settings import Settings, split_budget
from featcache.statistics import Statistics

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
    "KeyNotFound",
    "KeyTimeout",
    "MalformedRef",
    "OwnerLost",
    "OwnerUnreachable",
    "PoolFull",
    "PressureLevel",
    "PutTimeout",
    "Settings",
    "SettingsError",
    "StaleRef",
    "Statistics",
    "UnknownPool",
    "WrongLoop",
    "blocking",
    "connect",
    "content_key",
    "create",
    "split_budget",
]

__version__ = "0.1.0.dev0"
