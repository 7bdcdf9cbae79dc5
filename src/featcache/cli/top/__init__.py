"""``featcache top``: a pool, live, in a terminal.

`model` is what is shown (pure: history, order, filter, cursor), `frame` draws it as lines of text, `watch`
asks the owner, `screen` is the application in the terminal, `command` the command.
"""

from featcache.cli.top.command import top

__all__ = ["top"]
