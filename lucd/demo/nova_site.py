"""Nova around the demo's daemons: its configuration, its schema, and a real nova-conductor as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dht.errors import Unavailable
from lucd.demo.daemons import HOST, Daemons

CELL, API = "nova_cell1", "nova_api"
COMPUTE_HOST = "compute-1"
CONDUCTOR_HOST = "host2"
SYNC_WAIT_S = 90.0
CONDUCTOR_WAIT_S = 60.0


class NovaSite:
    """Files and processes of Nova on the demo's hosts. Host 2 runs the conductor and the compute role."""

    def __init__(self, daemons: Daemons) -> None:
        self.daemons = daemons
        self.path = daemons.path / "nova"
        self.path.mkdir()
        self._conductor: subprocess.Popen[bytes] | None = None
        (self.path / "api-paste.ini").touch()
        self.manage_conf = self._write(
            "manage.conf",
            f"[DEFAULT]\nhost = host1\nstate_path = {self.path}\n"
            f"[database]\nconnection = {daemons.url(CELL, 0)}\n[api_database]\nconnection = {daemons.url(API, 0)}\n",
        )
        door = daemons.nodes[1].socket
        common = (
            f"state_path = {self.path}\ntransport_url = lucd://{door}\nrpc_response_timeout = 30\n"
            f"[oslo_messaging_notifications]\ndriver = noop\n[lucd]\nsocket = {door}\nserver = {CONDUCTOR_HOST}\n"
        )
        self.conductor_conf = self._write(
            "conductor.conf",
            f"[DEFAULT]\nhost = {CONDUCTOR_HOST}\nlog_file = {self.path}/conductor.log\n{common}"
            "[conductor]\nworkers = 1\n"
            # The demo boots nothing through Placement; the conductor wants to know where it would be.
            f"[placement]\nauth_type = none\nendpoint_override = http://{HOST}:9/placement\n",
        )
        self.compute_conf = self._write(
            "compute.conf", f"[DEFAULT]\nhost = {COMPUTE_HOST}\nlog_file = {self.path}/compute.log\n{common}"
        )

    def worker_options(self) -> str:
        """What host 2's daemon needs in its configuration to run the RPC door's workers."""
        return (
            f"[nova]\nworkers = 1\nmain_database = {CELL}\napi_database = {API}\nserver = {CONDUCTOR_HOST}\n"
            f"config_file = {self.manage_conf}\n"
        )

    def sync(self) -> None:
        """Create both schemas by Nova's own migrations, through the SQL door, at the same time."""
        logs = {name: self.path / f"sync-{name}.log" for name in ("api_db", "db")}
        running = {
            name: self._spawn(["nova.cmd.manage", name, "sync", *(["--local_cell"] if name == "db" else [])], log)
            for name, log in logs.items()
        }
        deadline = time.monotonic() + SYNC_WAIT_S
        for name, process in running.items():
            try:
                code = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = -signal.SIGKILL
            if code:
                raise Unavailable(f"nova-manage {name} sync failed ({code}): {tail(logs[name])}")

    def start_conductor(self) -> None:
        """Start nova-conductor, unmodified, with its database calls through the RPC door of host 2's daemon."""
        self._conductor = self._spawn(["nova_bridge.rpc.conductor"], self.path / "conductor.out", self.conductor_conf)

    def conductor_running(self) -> bool:
        return self._conductor is not None and self._conductor.poll() is None

    def conductor_log(self) -> str:
        """The end of what it wrote."""
        return " | ".join(tail(self.path / name) for name in ("conductor.out", "conductor.log"))

    def stop(self) -> None:
        """End the conductor and its children by their process group."""
        if self._conductor is None:
            return
        for number, wait_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self._conductor.pid, number)
                self._conductor.wait(wait_s)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.write_text(text)
        return file

    def _spawn(self, command: list[str], log: Path, config: Path | None = None) -> subprocess.Popen[bytes]:
        module, *arguments = command
        start = f"import sys; sys.argv = {[module, '--config-file', str(config or self.manage_conf), *arguments]!r}; "
        start += f"import {module} as entry; sys.exit(entry.main())"
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", start],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true"},
            )


def tail(file: Path) -> str:
    """The last lines of a log in one."""
    if not file.exists():
        return ""
    return " | ".join(file.read_text(errors="replace").splitlines()[-3:])
