"""Placement as a process on a database, and its REST API as Nova's report client uses it."""

from __future__ import annotations

import http.client
import json
import time
import uuid
from pathlib import Path
from typing import Any

from dht.errors import Unavailable
from lucd.demo.daemons import HOST, free_port
from lucd.demo.processes import Program

ASKED_AGAIN_MAX = 50
START_WAIT_S = 120.0
REQUEST_TIMEOUT_S = 120.0


class Placement:
    """One process of Placement on one daemon."""

    def __init__(self, path: Path, url: str) -> None:
        path.mkdir()
        self.config = path / "placement.conf"
        # A request may need a second connection while it holds one; Placement's own limit is 15 a process.
        self.config.write_text(
            f"[placement_database]\nconnection = {url}\nmax_overflow = 50\n[api]\nauth_strategy = noauth2\n"
        )
        self.port = free_port()
        self.program = Program(
            "lucd.demo.plane.wsgi",
            ["placement", "--port", str(self.port)],
            path / "log",
            {"OS_PLACEMENT_CONFIG_DIR": str(path)},
        )

    def sync(self) -> None:
        manage = Program("placement.cmd.manage", ["--config-file", str(self.config), "db", "sync"], self.program.log)
        manage.start()
        manage.finish(START_WAIT_S)

    def wait(self) -> None:
        deadline = time.monotonic() + START_WAIT_S
        while self.program.running and time.monotonic() < deadline:
            try:
                self.ask("GET", "/")
                return
            except OSError:
                time.sleep(0.2)
        raise Unavailable(f"placement does not answer: {self.program.log_tail()}")

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """(status, answer) at microversion 1.36."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_TIMEOUT_S)
        headers = {
            "X-Auth-Token": "admin",
            "Content-Type": "application/json",
            "OpenStack-API-Version": "placement 1.36",
        }
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        return reply.status, json.loads(text) if text else None

    def claim(self, provider: str) -> str:
        """Claim one VCPU for a new consumer, as Nova's report client does: asked again after a concurrent update."""
        body = {
            "allocations": {provider: {"resources": {"VCPU": 1}}},
            "project_id": "project",
            "user_id": "user",
            "consumer_generation": None,
        }
        for _ in range(ASKED_AGAIN_MAX):
            status, reply = self.ask("PUT", f"/allocations/{uuid.uuid4()}", body)
            if status == 204:
                return "claimed"
            error = reply["errors"][0]
            if error.get("code") == "placement.concurrent_update":
                continue
            full = status == 409 and "would exceed" in error["detail"]
            return "full" if full else f"{status}: {error['detail']}"
        return "asked too often"
