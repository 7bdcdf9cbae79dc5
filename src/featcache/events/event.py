"""What all events are."""

from typing import Any, ClassVar, Literal

import attrs

__all__ = ["Event", "Severity"]

Severity = Literal["debug", "info", "warning", "error"]


@attrs.frozen(kw_only=True)
class Event:
    """One fact about one pool."""

    name: ClassVar[str] = "featcache.event"
    severity: ClassVar[Severity] = "info"

    pool: str
    """The pool's id, in hex."""

    @property
    def urgency(self) -> Severity:
        """The level at which this record is logged: its class's `severity`, unless it has a reason."""
        return self.severity

    def facts(self) -> dict[str, Any]:
        """Return the record's fields by name."""
        return {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}

    def logged(self) -> dict[str, Any]:
        """Return `facts` under the names that a log has them by: none is a logging system's own."""
        return self.facts()
