"""Types of the fields of messages, each with its bounds."""

from typing import Annotated

import msgspec

from featcache.ref import TensorSpec
from featcache.settings import MAX_KEY_BYTES

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
PoolId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Handle = Annotated[bytes, msgspec.Meta(max_length=64)]
Ref = Annotated[bytes, msgspec.Meta(max_length=64 << 10)]
Key = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_KEY_BYTES)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
MessageBytes = Annotated[int, msgspec.Meta(ge=1024)]
Specs = Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=4096)]
