"""Telling systemd how a service is doing (sd_notify(3)), for units of `Type=notify`."""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> None:
    """Send lines such as `READY=1` to the service manager; nothing happens where none asked for them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            # An abstract address begins with a zero byte, which the variable writes as @.
            channel.sendto("\n".join(lines).encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
    except OSError:
        # A manager that does not listen must not end the service.
        return
