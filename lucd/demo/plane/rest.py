"""Nova's REST API as its users know it."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from dht.errors import Unavailable
from lucd.demo.terminal import Calls

PROJECT, USER = "demo-project", "demo-user"
MICROVERSION = "2.96"
REQUEST_TIMEOUT_S = 90.0
POLL_S = 0.2


Dial = Callable[[str, int, float], socket.socket]
"""(host, port, seconds) -> a connection to nova-api, where it is not to be had from this process's own network."""


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """From where this process runs."""
    return socket.create_connection((host, port), timeout_s)


class ApiRefused(Exception):
    """nova-api answered with an error, or a server went into ERROR."""


class ComputeApi:
    """One client of nova-api. nova-api runs without Keystone's token filter, so the headers say who asks.

    A connection a request: threads may share it. Calls that have to succeed are timed by name.
    """

    def __init__(self, port: int, calls: Calls | None = None, dial: Dial = dial) -> None:
        self._port = port
        self._dial = dial
        self._calls = calls or Calls()

    def ask(self, method: str, path: str, body: object = None, microversion: str = MICROVERSION) -> tuple[int, Any]:
        """(status, decoded answer) of one request to /v2.1. Raises Unavailable when nothing answers."""
        headers = {
            "Content-Type": "application/json",
            "X-Auth-Token": "demo-token",
            "X-User-Id": USER,
            "X-Project-Id": PROJECT,
            "X-Roles": "admin,manager,member,reader",
            "OpenStack-API-Version": f"compute {microversion}",
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_TIMEOUT_S)
        try:
            connection.sock = self._dial("127.0.0.1", self._port, REQUEST_TIMEOUT_S)
            connection.request(method, f"/v2.1{path}", None if body is None else json.dumps(body), headers)
            reply = connection.getresponse()
            text = reply.read()
        except (OSError, http.client.HTTPException) as error:
            # The latter where nova-api ended in the midst of an answer.
            raise Unavailable(f"nova-api does not answer {method} {path}: {error}") from None
        finally:
            connection.close()
        try:
            return reply.status, json.loads(text) if text else None
        except ValueError:
            return reply.status, text.decode(errors="replace")

    def call(self, name: str, method: str, path: str, body: object = None) -> Any:
        """A request that has to succeed. Raises ApiRefused with Nova's own words."""

        def once() -> Any:
            status, reply = self.ask(method, path, body)
            if status >= 400:
                raise ApiRefused(f"nova-api answers {status} to {method} {path}: {json.dumps(reply)[:300]}")
            return reply

        return self._calls.timed(name, once)

    def make_flavor(self, name: str, vcpus: int, ram_mb: int, disk_gb: int) -> str:
        body = {"flavor": {"name": name, "vcpus": vcpus, "ram": ram_mb, "disk": disk_gb}}
        return str(self.call("flavor create", "POST", "/flavors", body)["flavor"]["id"])

    def boot(self, name: str, flavor: str, image: str) -> str:
        """Ask for a server without networks; returns its id at once, before it is built."""
        body = {"server": {"name": name, "flavorRef": flavor, "imageRef": image, "networks": "none"}}
        return str(self.call("server create", "POST", "/servers", body)["server"]["id"])

    def server(self, server: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("server show", "GET", f"/servers/{server}")["server"]
        return found

    def servers(self) -> dict[str, dict[str, Any]]:
        """id -> server with details, of all projects, page by page as the API gives them."""
        found: dict[str, dict[str, Any]] = {}
        path = "/servers/detail?all_tenants=1&limit=100"
        while True:
            page = self.call("server list, a page of 100", "GET", path)["servers"]
            found |= {str(server["id"]): server for server in page}
            if len(page) < 100:
                return found
            path = f"/servers/detail?all_tenants=1&limit=100&marker={page[-1]['id']}"

    def act(self, server: str, action: str, argument: object = None) -> None:
        """POST /servers/ID/action; Nova does it later."""
        self.call(f"server {action}", "POST", f"/servers/{server}/action", {action: argument})

    def delete(self, server: str) -> None:
        self.call("server delete", "DELETE", f"/servers/{server}")

    def wait(self, server: str, status: str, timeout_s: float) -> dict[str, Any]:
        """The server once it has the status and no task. Raises ApiRefused when it is in ERROR, Unavailable in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.server(server)
            if found["status"] == status and not found["OS-EXT-STS:task_state"]:
                return found
            if found["status"] == "ERROR":
                raise ApiRefused(f"server {found['name']} is in ERROR, not {status}: {found.get('fault')}")
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"server {found['name']} is {found['status']} ({found['OS-EXT-STS:task_state']}) after "
                    f"{timeout_s:.0f} s, not {status}"
                )
            time.sleep(POLL_S)
