"""The demo of a whole control plane: Nova, Placement and three computes, their databases and their bus on lucd."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from lucd.cli.output import show_table
from lucd.demo.daemons import Daemons, LocalNode
from lucd.demo.plane.audit import audit
from lucd.demo.plane.neighbours import IMAGE
from lucd.demo.plane.rest import ComputeApi
from lucd.demo.plane.site import CELL1, ControlPlane
from lucd.demo.stage import coordinator_of_most, one_pop, perform, start_daemons
from lucd.demo.terminal import Calls, Terminal

DEADLINE_S = 900.0
"""The demo ends by itself after that long, as failed: it starts ten programs, which takes slow machines minutes."""
STEP_WAIT_S = 120.0
RESTART_AFTER_S = 1.0
"""How long a killed daemon stays dead: what a supervisor waits."""


def play(instances: int = 20, computes: int = 3, keep: bool = False) -> int:
    """Run the demo; returns the exit code: 0 only if every server did what it was told and nothing was lost."""

    def make(terminal: Terminal, daemons: Daemons) -> PlaneStory:
        return PlaneStory(terminal, daemons, instances, computes)

    needs = dict.fromkeys(("nova", "placement", "cheroot"), "lucd[control-plane]")
    return perform(make, needs, DEADLINE_S, keep, one_pop)


class PlaneStory:
    """The demo's acts in order."""

    def __init__(self, terminal: Terminal, daemons: Daemons, instances: int, computes: int) -> None:
        self._terminal = terminal
        self._daemons = daemons
        self._instances = instances
        # The bus of one host carries them all: it is the daemon's that is not killed.
        self._plane = ControlPlane(
            daemons.path / "nova", daemons.url, f"lucd://{daemons.nodes[1].socket}", computes=computes
        )
        self._calls = Calls()
        self._api: ComputeApi = self._plane.api(self._calls)
        self._problems: list[str] = []

    def tell(self) -> bool:
        """True if everything went well; says what did not."""
        start_daemons(self._terminal, self._daemons)
        self._start_plane()
        flavors = [self._api.make_flavor("small", 1, 512, 1), self._api.make_flavor("large", 2, 1024, 2)]
        servers = self._boot_through_a_death(flavors[0])
        self._audit(servers, "all booted")
        self._live(servers[0], flavors[1])
        self._delete(servers)
        print()
        show_table(("CALL OF NOVA'S REST API", "COUNT", "P50 MS", "P95 MS", "LONGEST MS"), self._calls.rows())
        print()
        self._problems += self._calls.failed + self._plane.problems()
        for text in self._problems:
            self._terminal.say(f"FAILED: {text}")
        if not self._problems:
            self._terminal.say(f"{len(servers)} servers ACTIVE, no ERROR; {self._calls.count} REST calls, 0 failed.")
        return not self._problems

    def stop(self) -> None:
        self._plane.stop()

    def last_words(self) -> str:
        return " || ".join(f"{program.module}: {program.log_tail()[-200:]}" for program in self._plane.programs)

    def _start_plane(self) -> None:
        with self._terminal.step("nova-manage and placement-manage make four databases and two cells on lucd"):
            self._plane.install()
        with self._terminal.step(
            "nova-api, nova-scheduler, nova-conductor, placement and "
            f"{len(self._plane.hosts)} nova-compute with Nova's fake virt driver; no broker, no database server"
        ):
            self._plane.start(self._terminal.detail)

    def _boot_through_a_death(self, flavor: str) -> list[str]:
        terminal = self._terminal
        terminal.say(f"{self._instances} servers are asked for through the REST API.")
        servers: list[str] = []
        with ThreadPoolExecutor(1) as killer:
            # Left only when the killed daemon runs again: whoever ends the demo then ends that one too.
            death = self._ask_for_servers(flavor, servers, killer)
            for number, server in enumerate(servers):
                terminal.progress(f"server {number + 1} of {len(servers)}")
                self._api.wait(server, "ACTIVE", STEP_WAIT_S)
            terminal.progress_end()
            death.result()
        self._daemons.wait_whole()
        hosts = Counter(str(found["OS-EXT-SRV-ATTR:host"]) for found in self._api.servers().values())
        where = ", ".join(f"{count} on {host}" for host, count in sorted(hosts.items()))
        terminal.say(f"All are ACTIVE: {where}.")
        return servers

    def _ask_for_servers(self, flavor: str, servers: list[str], killer: Executor) -> Future[None]:
        """Append them as they are accepted. In the middle a daemon dies; the future ends when it is back."""
        terminal = self._terminal
        half = (self._instances + 1) // 2
        death: Future[None] = Future()
        for number in range(self._instances):
            terminal.progress(f"asking for server {number + 1} of {self._instances}")
            servers.append(self._api.boot(f"vm-{number + 1}", flavor, IMAGE))
            if number + 1 == half:
                victim, _ = coordinator_of_most(self._daemons, CELL1, servers)
                terminal.progress_end()
                terminal.say(f"kill -9 daemon {victim.number}, which coordinates most of them, while they are built.")
                death = killer.submit(self._die_and_return, victim)
        terminal.progress_end()
        return death

    def _die_and_return(self, victim: LocalNode) -> None:
        victim.kill()
        time.sleep(RESTART_AFTER_S)
        victim.start()

    def _live(self, server: str, flavor: str) -> None:
        self._terminal.say("One server's life: each step through the REST API until Nova says that it is done.")
        for action, argument, status in (
            ("os-stop", None, "SHUTOFF"),
            ("os-start", None, "ACTIVE"),
            ("pause", None, "PAUSED"),
            ("unpause", None, "ACTIVE"),
            ("resize", {"flavorRef": flavor}, "VERIFY_RESIZE"),
            ("confirmResize", None, "ACTIVE"),
            ("migrate", None, "VERIFY_RESIZE"),
            ("confirmResize", None, "ACTIVE"),
            ("shelve", None, "SHELVED_OFFLOADED"),
            ("unshelve", None, "ACTIVE"),
        ):
            began_s = time.monotonic()
            self._api.act(server, action, argument)
            found = self._api.wait(server, status, STEP_WAIT_S)
            took_s = time.monotonic() - began_s
            host = found["OS-EXT-SRV-ATTR:host"] or "no host"
            self._terminal.detail(f"{action:15} {status:18} on {host}, {took_s:.1f} s")

    def _delete(self, servers: list[str]) -> None:
        doomed = servers[: len(servers) // 2]
        for server in doomed:
            self._api.delete(server)
        deadline = time.monotonic() + STEP_WAIT_S
        left = set(servers)
        while left & set(doomed) and time.monotonic() < deadline:
            time.sleep(0.25)
            left = set(self._api.servers())
        self._terminal.say(f"{len(doomed)} deleted, {len(left)} left.")
        self._audit(servers[len(doomed) :], "after the deletion")

    def _audit(self, servers: list[str], when: str) -> None:
        """Read by SQL what has to be there, through each daemon's door."""
        good = len(self._problems)
        for number in range(len(self._daemons.nodes)):
            found = audit(lambda database, node=number: self._daemons.url(database, node), servers)  # type: ignore[misc]
            self._problems += [f"{when}, at daemon {number + 1}: {problem}" for problem in found]
        if len(self._problems) == good:
            self._terminal.detail("instances, mappings and allocations are right through the SQL door of each daemon")
