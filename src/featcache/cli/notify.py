"""Telling systemd: the datagrams of sd_notify(3)."""

import os
import socket


def notify(state: str) -> bool:
    """Send a state such as ``READY=1`` to ``NOTIFY_SOCKET``; return whether there is one that took it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in {"/", "@"}:
        return False
    address = "\0" + path[1:] if path[0] == "@" else path  # an abstract socket
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1.0)
            sock.sendto(state.encode(), address)
    except OSError:
        return False  # nobody is there to be told, which stops no service
    return True
