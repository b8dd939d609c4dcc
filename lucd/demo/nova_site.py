"""Nova around the demo's daemons: its configuration, its schema, and a real nova-conductor as a process."""

from __future__ import annotations

from pathlib import Path

from lucd.demo.daemons import HOST, LocalNode
from lucd.demo.processes import Program, tail

CELL, API = "nova_cell1", "nova_api"
COMPUTE_HOST = "compute-1"
CONDUCTOR_HOST = "host2"
SYNC_WAIT_S = 240.0
CONDUCTOR_WAIT_S = 240.0


class NovaSite:
    """Files and processes of Nova around two daemons, which may be one: nova-manage runs on the host of the first, the
    conductor and the compute role on that of the second."""

    def __init__(
        self,
        path: Path,
        manage: LocalNode,
        door: LocalNode,
        cell: str = CELL,
        conductor_host: str = CONDUCTOR_HOST,
        compute_host: str = COMPUTE_HOST,
    ) -> None:
        self.path = path
        self.path.mkdir()
        self.door = door
        self.cell = cell
        self.conductor_host, self.compute_host = conductor_host, compute_host
        self._conductor: Program | None = None
        (self.path / "api-paste.ini").touch()
        self.manage_conf = self._write(
            "manage.conf",
            f"[DEFAULT]\nhost = host1\nstate_path = {self.path}\n"
            f"[database]\nconnection = {manage.url(cell)}\n[api_database]\nconnection = {manage.url(API)}\n",
        )
        common = (
            f"state_path = {self.path}\ntransport_url = lucd://{door.socket}?bus={cell}\nrpc_response_timeout = 30\n"
            f"[oslo_messaging_notifications]\ndriver = noop\n"
            f"[lucd]\nsocket = {door.socket}\nserver = {conductor_host}\n"
        )
        self.conductor_conf = self._write(
            "conductor.conf",
            f"[DEFAULT]\nhost = {conductor_host}\nlog_file = {self.path}/conductor.log\n{common}"
            "[conductor]\nworkers = 1\n"
            # The demo boots nothing through Placement; the conductor wants to know where it would be.
            f"[placement]\nauth_type = none\nendpoint_override = http://{HOST}:9/placement\n",
        )
        self.compute_conf = self._write(
            "compute.conf", f"[DEFAULT]\nhost = {compute_host}\nlog_file = {self.path}/compute.log\n{common}"
        )

    def worker_options(self) -> str:
        """What the door's daemon needs in its configuration to run the RPC door's workers."""
        return (
            f"[nova]\nworkers = 1\nmain_database = {self.cell}\napi_database = {API}\nserver = {self.conductor_host}\n"
            f"config_file = {self.manage_conf}\n"
        )

    def sync(self, *, api: bool = True) -> None:
        """Create the schemas by Nova's own migrations, through the SQL door, at the same time; `api`: that one too."""
        running = [
            self._program("nova.cmd.manage", self.manage_conf, f"sync-{name}.log", name, "sync", *more)
            for name, more in (("api_db", ()), ("db", ("--local_cell",)))
            if api or name != "api_db"
        ]
        for program in running:
            program.start()
        for program in running:
            program.finish(SYNC_WAIT_S)

    def start_conductor(self) -> None:
        """Start nova-conductor, unmodified, with its database calls through the RPC door."""
        self._conductor = self._program("nova_bridge.rpc.conductor", self.conductor_conf, "conductor.out")
        self._conductor.start()

    def conductor_running(self) -> bool:
        return self._conductor is not None and self._conductor.running

    def conductor_log(self) -> str:
        """The end of what it wrote."""
        return " | ".join(tail(self.path / name) for name in ("conductor.out", "conductor.log"))

    def terminate(self) -> None:
        """Ask the conductor to end, without waiting; `stop` waits."""
        if self._conductor is not None:
            self._conductor.terminate()

    def stop(self) -> None:
        """End the conductor and its children."""
        if self._conductor is not None:
            self._conductor.stop()

    def _write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.write_text(text)
        return file

    def _program(self, module: str, config: Path, log: str, *arguments: str) -> Program:
        return Program(module, ["--config-file", str(config), *arguments], self.path / log, launcher=self.door.launcher)
