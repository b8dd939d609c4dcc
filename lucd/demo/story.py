"""The demo: three daemons, a real nova-conductor, twenty instances, and the death of a daemon on the way."""

from __future__ import annotations

import threading
import time

from dht.errors import Unavailable
from lucd.cli.output import show_table
from lucd.demo.audit import audit
from lucd.demo.daemons import Daemons, LocalNode
from lucd.demo.nova_site import CELL, CONDUCTOR_WAIT_S, NovaSite
from lucd.demo.stage import NODES, coordinator_of_most, one_pop, perform, start_daemons
from lucd.demo.terminal import Calls, Terminal

DEADLINE_S = 480.0
"""The demo ends by itself after that long, as failed."""


def play(instances: int = 20, keep: bool = False) -> int:
    """Run the demo; returns the exit code: 0 only if no call failed and nothing was lost."""

    def make(terminal: Terminal, daemons: Daemons) -> Story:
        return Story(terminal, daemons, NovaSite(daemons.path / "nova", daemons.nodes[0], daemons.nodes[1]), instances)

    return perform(make, {"nova": "lucd[nova]"}, DEADLINE_S, keep, one_pop)


class Story:
    """The demo's acts in order."""

    def __init__(self, terminal: Terminal, daemons: Daemons, site: NovaSite, instances: int) -> None:
        self._terminal = terminal
        self._daemons = daemons
        self._site = site
        self._instances = instances
        self._calls = Calls()
        self._problems: list[str] = []

    def tell(self) -> bool:
        """True if everything went well; says what did not."""
        self._start_daemons()
        self._start_nova()
        self._live_through_a_death()
        self._show()
        if self._calls.failed or self._problems:
            for text in (*self._calls.failed, *self._problems):
                self._terminal.say(f"FAILED: {text}")
            return False
        longest_s = self._calls.longest_s()
        self._terminal.say(
            f"{self._calls.count} calls of Nova, 0 failed, nothing lost; the longest took {longest_s:.2f} s."
        )
        return True

    def stop(self) -> None:
        self._site.stop()

    def last_words(self) -> str:
        return f"conductor: {self._site.conductor_log()}"

    def _start_daemons(self) -> None:
        second = self._daemons.nodes[1]
        second.options = self._site.worker_options()
        second.write_config()
        start_daemons(self._terminal, self._daemons)

    def _start_nova(self) -> None:
        terminal = self._terminal
        with terminal.step(
            "nova-manage api_db sync and db sync, Nova's own migrations, through the SQL door of host 1"
        ):
            self._site.sync()
        with terminal.step("a real, unmodified nova-conductor on host 2, its database calls through the RPC door"):
            self._site.start_conductor()
            # Nova is imported here, while the conductor starts: both take their time.
            from lucd.demo.compute import ComputeRole

            self._compute = ComputeRole(self._site.compute_conf, self._calls)
            answers = threading.Thread(target=self._compute.wait_for_conductor, daemon=True)
            answers.start()
            deadline = time.monotonic() + CONDUCTOR_WAIT_S
            while answers.is_alive():
                if not self._site.conductor_running() or time.monotonic() > deadline:
                    raise Unavailable(f"nova-conductor does not answer: {self._site.conductor_log()}")
                answers.join(0.2)

    def _live_through_a_death(self) -> None:
        terminal, compute = self._terminal, self._compute
        terminal.say("nova-compute's part on host 2: NovaObject.indirection_api is the conductor's RPC API.")
        compute.start()
        uuids = []
        for number in range(self._instances):
            terminal.progress(f"creating instance {number + 1} of {self._instances}")
            uuids.append(compute.create(number + 1))
        terminal.progress_end()
        terminal.say(f"{len(uuids)} instances created. Now each is claimed and booted.")
        half = len(uuids) // 2
        self._boot(uuids[:half], 0)
        victim = self._coordinator_of_most(uuids)
        terminal.say(f"kill -9 daemon {victim.number}: it coordinates more of these instances than any other host.")
        # In the middle of the calls, not between them.
        killer = threading.Timer(0.1, victim.kill)
        killer.start()
        self._boot(uuids[half:], half)
        killer.join()
        terminal.say("All booted with two daemons left; the killed one starts again with its directory.")
        refused = compute.conflict(uuids[0])
        terminal.detail(f"a save with the wrong expected_task_state is refused: {refused or 'NO, IT WAS NOT'}")
        if not refused:
            self._problems.append("a save with the wrong expected_task_state was not refused")
        began_s = time.monotonic()
        victim.start()
        self._daemons.wait_whole()
        terminal.detail(f"daemon {victim.number} serves all its tablets again after {time.monotonic() - began_s:.1f} s")
        self._verify(uuids)

    def _boot(self, uuids: list[str], done: int) -> None:
        for number, instance in enumerate(uuids, start=done + 1):
            self._terminal.progress(f"booting instance {number} of {self._instances}")
            self._compute.claim(instance)
            self._compute.boot(instance)
            if number % 5 == 0:
                self._compute.heartbeat()
        self._terminal.progress_end()

    def _coordinator_of_most(self, uuids: list[str]) -> LocalNode:
        """The daemon to kill: not the conductor's own, it is the door."""
        victim, found = coordinator_of_most(self._daemons, CELL, uuids)
        if found != len(uuids):
            self._problems.append(f"only {found} of {len(uuids)} instances are where their group should be")
        return victim

    def _verify(self, uuids: list[str]) -> None:
        terminal, compute = self._terminal, self._compute
        listed = compute.by_host()
        wrong = [u for u in uuids if u not in listed or listed[u].vm_state != "active" or listed[u].task_state]
        if wrong or len(listed) != len(uuids):
            self._problems.append(f"listed by host: {len(listed)} of {len(uuids)}, not as written: {wrong}")
        terminal.say(f"Listed by host: {len(listed)} instances, all active.")
        for node in range(NODES):
            self._problems += audit(self._daemons.url(CELL, node), dict.fromkeys(uuids, "active"), node + 1)
        terminal.detail("the same rows are read through the SQL door of each of the three daemons")
        doomed = uuids[: len(uuids) // 2]
        for number, instance in enumerate(doomed):
            terminal.progress(f"destroying instance {number + 1} of {len(doomed)}")
            compute.destroy(instance)
        terminal.progress_end()
        left = set(compute.by_host())
        if left != set(uuids) - set(doomed):
            self._problems.append(f"after destroying {len(doomed)} of {len(uuids)} there are {len(left)}")
        terminal.say(f"{len(doomed)} destroyed, {len(left)} left.")

    def _show(self) -> None:
        print()
        show_table(
            ("CALL OF NOVA, THROUGH THE CONDUCTOR", "COUNT", "P50 MS", "P95 MS", "LONGEST MS"), self._calls.rows()
        )
        print()
