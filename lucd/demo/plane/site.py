"""A control plane of Nova and Placement: its configuration, its schemas and cells, its processes.

Two controllers and some compute hosts, all on this machine: controller 0 runs nova-api and Placement, controller 1
nova-conductor and nova-scheduler. Each has its own way to the databases, as on two servers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dht.errors import NotFound, Unavailable
from lucd.demo.daemons import HOST, free_port
from lucd.demo.plane.rest import ComputeApi, Dial, dial
from lucd.demo.processes import Program
from lucd.demo.terminal import Calls

API, CELL0, CELL1, PLACEMENT = "nova_api", "nova_cell0", "nova_cell1", "placement"
DATABASES = (API, CELL0, CELL1, PLACEMENT)
COMMAND_WAIT_S = 240.0
START_WAIT_S = 240.0

DatabaseUrl = Callable[[str, int], str]
"""URL of a database, by its name, as the controller of that number (0 or 1) opens it."""


@dataclass(frozen=True, slots=True)
class Place:
    """What is a control plane's own where there are several: one for each PoP, with a cell and a Placement."""

    cell_name: str = "cell1"
    cell: str = CELL1
    placement: str = PLACEMENT
    """Both by the names of their databases."""
    api: str = CELL0
    """The database that is nova-api's own."""
    prefix: str = ""
    """What the names of its hosts begin with."""
    launcher: Sequence[str] = ()
    """What the command lines of its programs begin with, where they run elsewhere than this process."""
    dial: Dial = dial
    mapped_transport_url: str = ""
    """The cell's bus as its mapping has it, from which every PoP reaches it; empty: the transport URL of all hosts."""
    options: str = ""
    """More for the configuration of its controllers."""


ALONE = Place()


class ControlPlane:
    """Written to `path`, which must be empty or missing; nothing runs before `install` and `start`.

    `url` may lead to any database server that Nova knows: a comparison runs the same plane on MariaDB. `transport_url`
    is the message bus of all hosts. `computes`: how many nova-compute with Nova's own fake virt driver.
    """

    def __init__(self, path: Path, url: DatabaseUrl, transport_url: str, computes: int, place: Place = ALONE) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.api_port, self.placement_port, self.neighbours_port = free_port(), free_port(), free_port()
        self.place = place
        self.hosts = [f"{place.prefix}compute-{number + 1}" for number in range(computes)]
        self._python = sys.executable
        self._url = url
        self._transport_url = transport_url
        self._write_config()
        controllers = [
            self._program("lucd.demo.plane.neighbours", ["--port", str(self.neighbours_port)], "neighbours"),
            self._wsgi("placement", self.placement_port),
            self._service("nova-conductor", self._controller(1)),
            self._service("nova-scheduler", self._controller(1)),
        ]
        self._api = self._wsgi("nova-api", self.api_port)
        self._computes = [self._service("nova-compute", host) for host in self.hosts]
        self._controllers = controllers
        self.programs = [*controllers, self._api, *self._computes]

    def api(self, calls: Calls | None = None) -> ComputeApi:
        return ComputeApi(self.api_port, calls, self.place.dial)

    def use(self, python: str) -> None:
        """Run the release of Nova and Placement in another interpreter's environment from the next start on."""
        self._python = python
        self._write("api-paste.ini", _paste_of(Path(python).parent.parent))
        for program in self.programs:
            program.python = python

    def install(self) -> None:
        """Make the schemas and the cells by nova-manage and placement-manage. Raises Unavailable with their words."""
        self.share()
        self.map_cell()
        self.sync("db", "sync")

    def share(self) -> None:
        """What several control planes have in common: Nova's API database and the mapping of cell0."""
        self.manage("api_db", "sync")
        self.manage("cell_v2", "map_cell0", "--database_connection", self._cell_url(CELL0))

    def map_cell(self) -> None:
        """Enter the cell into the API database."""
        place = self.place
        bus = place.mapped_transport_url or self._transport_url
        where = ("--database_connection", self._cell_url(place.cell), "--transport-url", bus)
        self.manage("cell_v2", "create_cell", "--name", place.cell_name, *where)

    def sync(self, *nova: str) -> None:
        """Make the schema of Placement, and at the same time what this command of nova-manage makes."""
        placement = self._manage("placement.cmd.manage", "db", "sync", config=self.path / "placement.conf")
        placement.start()
        try:
            self.manage(*nova)
        except BaseException:
            # As `finish` does it: nothing is left behind that goes on changing the databases.
            placement.stop()
            raise
        placement.finish(COMMAND_WAIT_S)

    def migrate(self) -> None:
        """Bring the schemas of an older release to the one that is used now, as an upgrade does first."""
        self.sync("api_db", "sync")
        self.manage("db", "sync")

    def migrate_data(self) -> None:
        """What Nova changes in the rows themselves when it is upgraded."""
        self.manage("db", "online_data_migrations")

    def manage(self, *arguments: str) -> None:
        """Run one command of nova-manage on controller 1. Raises Unavailable with the end of its output."""
        command = self._manage("nova.cmd.manage", *arguments, config=self.path / f"{self._controller(1)}.conf")
        command.start()
        command.finish(COMMAND_WAIT_S)

    def start(self, say: Callable[[str], None] = lambda text: None, cell_uuid: str = "") -> None:
        """Start all processes and return when every host can be scheduled to. Raises Unavailable, or NotFound.

        `cell_uuid`: the cell whose hosts are mapped, of several.
        """
        for program in (*self._controllers, *self._computes):
            program.start()
        say("nova-conductor, nova-scheduler, placement and the computes are starting")
        # nova-api registers itself in the database while it is imported and answers when that is done.
        self._api.start()
        self._wait(self._api_answers, "nova-api does not answer", self._api)
        self._wait(self._computes_are_up, "not all nova-compute report", *self._computes)
        say("all computes report; nova-manage cell_v2 discover_hosts")
        self.manage("cell_v2", "discover_hosts", *(("--cell_uuid", cell_uuid) if cell_uuid else ()))

    def terminate(self) -> None:
        """Ask all processes to end, without waiting; `stop` waits."""
        for program in self.programs:
            program.terminate()

    def stop(self) -> None:
        """End all processes."""
        self.terminate()
        for program in self.programs:
            program.stop()

    def cpu_s(self) -> float:
        """CPU time of all processes of the plane so far."""
        return sum(program.cpu_s() for program in self.programs)

    def problems(self) -> list[str]:
        """Processes that ended though nobody asked them to."""
        return [f"{program} ended: {program.log_tail()}" for program in self.programs if not program.running]

    def _api_answers(self) -> bool:
        return self.api().ask("GET", "/os-services")[0] == 200

    def _computes_are_up(self) -> bool:
        status, reply = self.api().ask("GET", "/os-services?binary=nova-compute")
        services = reply["services"] if status == 200 else []
        # One of a cell that is down has no state.
        return {service["host"] for service in services if service.get("state") == "up"} >= set(self.hosts)

    def _wait(self, ready: Callable[[], bool], problem: str, *needed: Program) -> None:
        deadline = time.monotonic() + START_WAIT_S
        while True:
            for program in (*self._controllers, *needed):
                if not program.running:
                    raise Unavailable(f"{program} ended at its start: {program.log_tail()}")
            try:
                if ready():
                    return
                reason = problem
            except Unavailable as error:
                reason = error.message
            if time.monotonic() > deadline:
                logs = "; ".join(program.log_tail() for program in needed)
                raise Unavailable(f"{problem} after {START_WAIT_S:.0f} s: {reason}; {logs}"[:1000])
            time.sleep(0.25)

    def _cell_url(self, database: str) -> str:
        """What the cell's mapping holds. A controller puts the query of its own [database] connection in its place:
        with lucd each has its own daemon's socket there."""
        url = self._url(database, 0)
        return f"{url.partition('?')[0]}?{{query}}" if "?" in url else url

    # -- processes

    def _program(
        self, module: str, arguments: Sequence[str], name: str, environment: dict[str, str] | None = None
    ) -> Program:
        program = Program(module, arguments, self.path / f"{name}.log", environment, self.place.launcher)
        program.python = self._python
        return program

    def _manage(self, module: str, *arguments: str, config: Path) -> Program:
        name = f"{module.partition('.')[0]}-manage"
        return self._program(module, ["--config-file", str(config), *arguments], name)

    def _service(self, binary: str, host: str) -> Program:
        module = f"nova.cmd.{binary.removeprefix('nova-')}"
        name = f"{binary}.{host}"
        return self._program(module, ["--config-file", str(self.path / f"{host}.conf")], name)

    def _wsgi(self, service: str, port: int) -> Program:
        environment = {
            "OS_NOVA_CONFIG_DIR": str(self.path),
            "OS_NOVA_CONFIG_FILES": f"api-paste.ini;{self._controller(0)}.conf",
            "OS_PLACEMENT_CONFIG_DIR": str(self.path),
        }
        return self._program("lucd.demo.plane.wsgi", [service, "--port", str(port)], service, environment)

    # -- configuration

    def _write_config(self) -> None:
        neighbours = f"http://{HOST}:{self.neighbours_port}"
        common = (
            f"[DEFAULT]\nhost = %s\nstate_path = %s\ntransport_url = {self._transport_url}\nmy_ip = {HOST}\n"
            "rpc_response_timeout = 120\nlong_rpc_timeout = 300\n"
            "[oslo_messaging_notifications]\ndriver = noop\n"
            f"[oslo_concurrency]\nlock_path = {self.path}/locks\n"
            f"[placement]\nauth_type = admin_token\ntoken = admin\nendpoint = http://{HOST}:{self.placement_port}\n"
            f"[glance]\napi_servers = {neighbours}\n"
            f"[neutron]\nauth_type = admin_token\ntoken = admin\nendpoint = {neighbours}\n"
            f"endpoint_override = {neighbours}\n"
            f"[keystone]\nendpoint_override = {neighbours}/v3\n"
            "[vnc]\nenabled = false\n"
        )
        for number, database in enumerate((self.place.api, self.place.cell)):
            host = self._controller(number)
            self._write(
                f"{host}.conf",
                common % (host, self._state(host))
                + f"[database]\nconnection = {self._url(database, number)}\n"
                + f"[api_database]\nconnection = {self._url(API, number)}\n"
                # Hosts that are alike get their VMs in turn, and no quota ends the story.
                "[filter_scheduler]\nhost_subset_size = 64\nshuffle_best_same_weighed_hosts = true\n"
                "[scheduler]\nworkers = 1\n[conductor]\nworkers = 1\n"
                "[quota]\ninstances = -1\ncores = -1\nram = -1\n" + self.place.options,
            )
        for host in self.hosts:
            self._write(
                f"{host}.conf",
                common % (host, self._state(host))
                + "[compute]\nresource_provider_association_refresh = 0\n"
                + "[workarounds]\nskip_cpu_compare_at_startup = true\n",
                "compute_driver = fake.FakeDriverWithoutFakeNodes\n",
            )
        self._write(
            "placement.conf",
            f"[placement_database]\nconnection = {self._url(self.place.placement, 0)}\nmax_overflow = 50\n"
            "[api]\nauth_strategy = noauth2\n",
        )
        self._write("api-paste.ini", _paste_of(Path(sys.prefix)))

    def _controller(self, number: int) -> str:
        return f"{self.place.prefix}controller-{number}"

    def _state(self, host: str) -> Path:
        """Each host has its own: nova-compute keeps its node's identity there."""
        state = self.path / "state" / host
        state.mkdir(parents=True)
        return state

    def _write(self, name: str, text: str, default_options: str = "") -> None:
        (self.path / name).write_text(text.replace("[DEFAULT]\n", f"[DEFAULT]\n{default_options}", 1))


def _paste_of(prefix: Path) -> str:
    """Nova's own api-paste.ini, which pip puts below the environment, without Keystone's token filter."""
    file = prefix / "etc" / "nova" / "api-paste.ini"
    if not file.exists():
        raise NotFound(f"nova's api-paste.ini is not at {file}; install nova into this environment by pip")
    return file.read_text().replace(" authtoken ", " ")
