"""Readiness for systemd (sd_notify): datagrams to the socket that $NOTIFY_SOCKET names, nothing where it is unset."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send for example `READY=1` or `STOPPING=1`. A service manager that went away is no reason to stop."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as door:
            door.sendto(state.encode(), name)
    except OSError as error:
        log.warning("the service manager was not told %s: %s", state, error)
