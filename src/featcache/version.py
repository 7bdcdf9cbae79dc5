"""The version of the package, for all floors."""

from typing import Final

VERSION: Final = "0.1.0.dev0"
