"""Network namespaces: a piece of the network of its own for whatever runs inside, alone with the devices given to it.

Needs util-linux, and the right to make namespaces: root, or a system that lets every user have them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
from typing import Any

from dht.errors import DhtError
from lucd import messages
from lucd.demo.daemons import LocalNode

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """One network namespace, alive as long as the process that sleeps in it. `within`: a namespace to be born in."""

    def __init__(self, within: Namespace | None = None) -> None:
        own = ["unshare", "--net", "--kill-child"]
        if within is not None:
            own = [*within.enter, *own]
        elif os.geteuid():
            own = ["unshare", "--user", "--map-root-user", "--net", "--kill-child"]
        self._process = subprocess.Popen(
            [*own, "sh", "-c", "echo there; exec sleep infinity"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        if self._process.stdout.readline() != b"there\n":
            why = self._process.stderr.read().decode().strip()
            raise RuntimeError(f"no network namespace could be made ({why}): run as root, or let users have namespaces")
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        self.enter: list[str] = ["nsenter", "--target", str(self.pid), *user, "--net"]
        """What a command begins with that is to run inside."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, *lines: str) -> None:
        """Shell commands, inside; raises with what they say when one fails."""
        done = subprocess.run(
            [*self.enter, "sh", "-ec", "\n".join(lines)], capture_output=True, text=True, check=False, timeout=20
        )
        if done.returncode:
            raise RuntimeError(f"{lines} failed: {done.stderr.strip()}")

    def connect(self, host: str, port: int, timeout_s: float) -> socket.socket:
        """A TCP connection as a program inside would make it; this thread goes in and comes out again. As root."""
        with open("/proc/thread-self/ns/net", "rb") as home, open(f"/proc/{self.pid}/ns/net", "rb") as inside:
            _enter(inside.fileno())
            try:
                return socket.create_connection((host, port), timeout_s)
            finally:
                _enter(home.fileno())

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def _enter(namespace: int) -> None:
    """Take this thread into the network namespace of a descriptor."""
    if _libc.setns(namespace, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"a network namespace cannot be entered: {os.strerror(number)}")


class InsideNode(LocalNode):
    """A daemon inside a namespace. Its admin address is out of reach from here; its Unix socket answers instead."""

    def get(self, path: str) -> tuple[int, str]:
        status = self.status()
        return (200 if status.get("ready") else 503 if status else 0), str(status.get("state"))

    def status(self) -> dict[str, Any]:
        try:
            reply = self.client().call(messages.AskStatus(), 5.0, connect_wait_s=0.0)
        except DhtError:
            return {}
        return messages.plain(reply)
