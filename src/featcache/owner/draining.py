"""The requests of sessions that an owner refuses which is about to end: new puts, and pins."""

from collections.abc import Callable, MutableMapping
from typing import Any

from featcache.control import many, messages
from featcache.control.messages import Answer
from featcache.errors import OwnerLost

_PUTS = (messages.Reserve, many.ReserveMany, messages.Upload)


def refuse_puts(handlers: MutableMapping[type, Callable[[int, Any], Any]]) -> None:
    """Have the handlers of a pool's requests take no more puts and pins."""
    for kind in _PUTS:
        handlers[kind] = _refused
    commands = handlers[messages.KeyCommand]

    def command(session: int, message: messages.KeyCommand) -> Any:
        return (_refused if message.command == "pin" else commands)(session, message)

    handlers[messages.KeyCommand] = command


def _refused(_: int, __: messages.Request) -> Answer:
    raise OwnerLost("the owner is shutting down: it takes no more puts and pins")
