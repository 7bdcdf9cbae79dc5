"""The end of a socket's connection, made and seen at once whatever forks have the socket too."""

import contextlib
import select
import socket


def hang_up(sock: socket.socket) -> None:
    """Have the peer see the end. What was sent before can still be read."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def is_readable(fd: int) -> bool:
    """Whether a read would find something now, the end perhaps."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def has_hung_up(fd: int) -> bool:
    """Whether the peer has; what it sent before may be yet to be read."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))
