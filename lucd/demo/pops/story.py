"""The demo of many PoPs: a conductor and a cell in each, instances in all of them, a PoP cut off, and the heal.

Each PoP's cell database lives in it, so what Nova does there waits for nobody else: neither for the way to the other
PoPs, nor for its repair. The PoPs are network namespaces of this machine, the ways between them a router's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
import sqlalchemy.exc

from dht.errors import Unavailable
from lucd.cli.output import show_table
from lucd.demo.audit import audit
from lucd.demo.daemons import LocalNode
from lucd.demo.nova_site import CONDUCTOR_WAIT_S, NovaSite
from lucd.demo.pops.compute import ComputeProcess
from lucd.demo.stage import perform
from lucd.demo.terminal import Calls, Terminal, quantile_ms
from lucd.demo.wan.sites import Wan, WanDaemons, why_not

R = TypeVar("R")
SAVE = "instance save, expected_task_state"
DEADLINE_S = 480.0
"""The demo ends by itself after that long, as failed."""
HEAL_WAIT_S = 60.0
CUT_IN_S = 0.3
"""The cut comes so long after the boots began: in the middle of the calls, not between them."""
WHAT_ELSE = (
    "lucd demo --pops needs root, TUN devices (/dev/net/tun) and network namespaces (iproute2, util-linux): it makes "
    "each PoP a network of its own on this machine. {reason}. Without them `lucd demo` shows one PoP; in a container "
    "give it --privileged, or --cap-add NET_ADMIN --cap-add SYS_ADMIN --device /dev/net/tun"
)


def wan_daemons(pops: int, rtt_ms: float) -> Callable[[Path], WanDaemons]:
    """What makes one daemon in each PoP. Raises Unavailable with what it needs where there can be no such network."""
    if reason := why_not():
        raise Unavailable(WHAT_ELSE.format(reason=reason))
    return lambda path: WanDaemons(path, Wan(pops, rtt_ms), per_pop=1)


def play(pops: int, rtt_ms: float, instances: int = 20, keep: bool = False) -> int:
    """Run the demo; returns the exit code: 0 only if no call failed and nothing was lost."""

    def make(terminal: Terminal, daemons: WanDaemons) -> PopsStory:
        return PopsStory(terminal, daemons, rtt_ms, instances)

    return perform(make, {"nova": "lucd[nova]"}, DEADLINE_S, keep, wan_daemons(pops, rtt_ms))


class Pop:
    """One PoP: its daemon, its conductor, its compute role, and the instances that are to be there."""

    def __init__(self, number: int, node: LocalNode, path: Path) -> None:
        self.number = number
        self.name = node.pop
        self.node = node
        self.cell = f"nova_cell_{self.name}"
        self.calls = Calls()
        self.instances: list[str] = []
        host = f"compute-{self.name}"
        self.site = NovaSite(path / self.name, node, node, self.cell, f"controller-{self.name}", host)
        self.compute: ComputeProcess | None = None
        node.options += self.site.worker_options()
        node.write_config()

    def start_nova(self) -> None:
        """Return when the conductor answers the compute role."""
        self.site.start_conductor()
        log = self.site.path / "compute.out"
        launcher = self.node.launcher
        compute = ComputeProcess(launcher, self.site.compute_conf, self.site.compute_host, log, self.calls)
        self.compute = compute
        ready = threading.Thread(target=self.order, args=("wait_for_conductor",), daemon=True)
        ready.start()
        deadline = time.monotonic() + CONDUCTOR_WAIT_S
        while ready.is_alive():
            if not self.site.conductor_running() or time.monotonic() > deadline:
                raise Unavailable(f"nova-conductor of {self.name} does not answer: {self.site.conductor_log()}")
            ready.join(0.2)
        self.order("start")

    def order(self, name: str, *arguments: object) -> Any:
        """A method of the compute role."""
        if self.compute is None:
            raise Unavailable(f"the compute role of {self.name} does not run")
        return self.compute.order(name, *arguments)

    def create(self, count: int) -> None:
        first = len(self.instances) + 1
        for number in range(first, first + count):
            self.instances.append(self.order("create", number))

    def boot(self, instances: Sequence[str]) -> None:
        """Claim and boot them, with the service's report now and then."""
        for number, instance in enumerate(instances):
            self.order("claim", instance)
            self.order("boot", instance)
            if number % 5 == 0:
                self.order("heartbeat")

    def destroy(self, count: int) -> None:
        for instance in self.instances[:count]:
            self.order("destroy", instance)
        del self.instances[:count]

    def passed_on(self) -> int:
        """Requests that its daemon had to send to another PoP so far."""
        counters: dict[str, Any] = self.node.status()["counters"]
        return int(counters["homes"]["passed_on"])

    def stop(self) -> None:
        if self.compute is not None:
            self.compute.stop()
        self.site.stop()


class PopsStory:
    """The demo's acts in order."""

    def __init__(self, terminal: Terminal, daemons: WanDaemons, rtt_ms: float, instances: int) -> None:
        self._terminal = terminal
        self._daemons = daemons
        self._rtt_ms = rtt_ms
        self._instances = instances
        path = daemons.path / "nova"
        path.mkdir()
        self._pops = [Pop(number, node, path) for number, node in enumerate(daemons.nodes)]
        self._problems: list[str] = []

    def tell(self) -> bool:
        """True if everything went well; says what did not."""
        self._start()
        self._live_at_home()
        self._look_over_the_wan()
        self._live_apart()
        self._heal()
        self._destroy()
        self._show()
        failed = [f"{pop.name}: {text}" for pop in self._pops for text in pop.calls.failed]
        for text in (*failed, *self._problems):
            self._terminal.say(f"FAILED: {text}")
        if failed or self._problems:
            return False
        count = sum(pop.calls.count for pop in self._pops)
        longest_s = max(pop.calls.longest_s() for pop in self._pops)
        self._terminal.say(f"{count} calls of Nova, 0 failed, nothing lost; the longest took {longest_s:.2f} s.")
        return True

    def stop(self) -> None:
        for pop in self._pops:
            pop.site.terminate()
        for pop in self._pops:
            pop.stop()

    def last_words(self) -> str:
        return " || ".join(f"conductor of {pop.name}: {pop.site.conductor_log()}" for pop in self._pops)

    # -- acts

    def _start(self) -> None:
        terminal, pops = self._terminal, self._pops
        terminal.say(
            f"{len(pops)} PoPs, {self._rtt_ms:.0f} ms apart, with one daemon each: {pops[0].name} founds the cluster, "
            "the others join and found their own."
        )
        self._daemons.start()
        for pop in pops:
            pop.node.store().create_database(pop.cell, home=pop.name)
            terminal.detail(f"{pop.name}  node {pop.node.status()['node_id'][:16]}  {pop.node.address}  {pop.cell}")
        with terminal.step(f"nova-manage db sync in each PoP, into its own cell; api_db sync in {pops[0].name}"):
            self._everywhere(lambda pop: pop.site.sync(api=pop is pops[0]))
        with terminal.step("a real, unmodified nova-conductor in each PoP, its database calls through the RPC door"):
            self._everywhere(Pop.start_nova)

    def _live_at_home(self) -> None:
        terminal = self._terminal
        terminal.say(f"{self._instances} instances in each PoP, in all at once: created, claimed, booted.")
        before = [pop.passed_on() for pop in self._pops]

        def life(pop: Pop) -> None:
            pop.create(self._instances)
            pop.boot(pop.instances)

        self._everywhere(life)
        passed_on = [pop.passed_on() - was for pop, was in zip(self._pops, before, strict=True)]
        refused = self._pops[0].order("conflict", self._pops[0].instances[0])
        terminal.detail(f"a save with the wrong expected_task_state is refused: {refused or 'NO, IT WAS NOT'}")
        if not refused:
            self._problems.append("a save with the wrong expected_task_state was not refused")
        terminal.detail(
            "p50 of a save: "
            + ", ".join(f"{quantile_ms(pop.calls.took_s()[SAVE], 0.5)} ms in {pop.name}" for pop in self._pops)
            + f"; requests that had to go to another PoP: {sum(passed_on)}"
        )
        if any(passed_on):
            self._problems.append(f"{passed_on} requests for rows at home were passed on to other PoPs")

    def _look_over_the_wan(self) -> None:
        self._terminal.say("Any daemon serves every PoP's cell: read through the SQL door of each.")
        self._audit_all()
        reader, owner = self._pops[0], self._pops[-1]
        took_s = min(_look(reader.node, owner)[1] for _ in range(3))
        at_home_s = min(_look(owner.node, owner)[1] for _ in range(3))
        self._terminal.detail(
            f"an instance of {owner.name} by its uuid: {took_s * 1000:.1f} ms from {reader.name}, "
            f"{at_home_s * 1000:.1f} ms at home"
        )

    def _live_apart(self) -> None:
        terminal, cut = self._terminal, self._pops[-1]
        others = [pop.number for pop in self._pops[:-1]]
        more = max(2, self._instances // 2)
        terminal.say(f"{more} more in each PoP, and the cables of {cut.name} are pulled out while they are booted.")
        killer = threading.Timer(CUT_IN_S, self._daemons.wan.cut, ([cut.number], others))

        def life(pop: Pop) -> None:
            pop.create(more)
            pop.boot(pop.instances[-more:])

        began_s = time.monotonic()
        killer.start()
        self._everywhere(life)
        killer.join()
        terminal.detail(f"both sides went on: all are active after {time.monotonic() - began_s:.1f} s")
        began_s = time.monotonic()
        self._everywhere(lambda pop: pop.create(1))
        self._everywhere(lambda pop: pop.boot(pop.instances[-1:]))
        terminal.detail(f"and one more in each PoP in {time.monotonic() - began_s:.1f} s, with {cut.name} still alone")
        for here, there in ((self._pops[0], cut), (cut, self._pops[0])):
            reason, took_s = _look(here.node, there)
            if not reason:
                self._problems.append(f"{here.name} read the cell of {there.name} over the cut")
            terminal.detail(f"{there.name}'s instances from {here.name}, after {took_s:.1f} s: {reason}")

    def _heal(self) -> None:
        terminal = self._terminal
        terminal.say("The cables are back.")
        self._daemons.wan.heal()
        began_s = time.monotonic()
        for reader in self._pops:
            for owner in self._pops:
                while reason := _look(reader.node, owner)[0]:
                    if time.monotonic() - began_s > HEAL_WAIT_S:
                        raise Unavailable(f"{reader.name} does not read {owner.name} after the heal: {reason}")
                    time.sleep(0.1)
        terminal.detail(f"every daemon reads every PoP again after {time.monotonic() - began_s:.1f} s")
        self._audit_all()
        terminal.detail("what was written on both sides of the cut is there, through the SQL door of each daemon")

    def _destroy(self) -> None:
        doomed = len(self._pops[0].instances) // 2
        self._everywhere(lambda pop: pop.destroy(doomed))
        for pop in self._pops:
            listed = pop.order("listed")
            if listed != dict.fromkeys(pop.instances, "active"):
                self._problems.append(f"{pop.name} lists {len(listed)} instances, not the {len(pop.instances)} left")
        self._audit_all()
        self._terminal.say(f"{doomed} destroyed in each PoP, {len(self._pops[0].instances)} left.")

    def _show(self) -> None:
        print()
        head = ["CALL OF NOVA", "COUNT", *(f"P50 MS {pop.name}" for pop in self._pops), "LONGEST MS"]
        rows = []
        for name in self._pops[0].calls.took_s():
            took_s = [pop.calls.took_s()[name] for pop in self._pops]
            every = [one for took in took_s for one in took]
            rows.append((name, str(len(every)), *(quantile_ms(took, 0.5) for took in took_s), quantile_ms(every, 1.0)))
        show_table(head, rows)
        print()

    # -- what acts share

    def _everywhere(self, do: Callable[[Pop], R]) -> list[R]:
        """In all PoPs at once. Raises what one raised, when all have ended."""
        with ThreadPoolExecutor(len(self._pops)) as threads:
            return list(threads.map(do, self._pops))

    def _audit_all(self) -> None:
        for reader in self._pops:
            for owner in self._pops:
                expected = dict.fromkeys(owner.instances, "active")
                found = audit(reader.node.url(owner.cell), expected, reader.node.number)
                self._problems += [f"{owner.cell}: {text}" for text in found]


def _look(node: LocalNode, owner: Pop) -> tuple[str, float]:
    """Read one instance of the PoP through a daemon's SQL door. Returns why not, else nothing, and the seconds."""
    engine = sqlalchemy.create_engine(node.url(owner.cell))
    query = sqlalchemy.text("SELECT vm_state FROM instances WHERE uuid = :uuid")
    began_s = time.monotonic()
    try:
        with engine.connect() as connection:
            # The first statement of a process loads the catalog; what is timed is a transaction of its own.
            connection.execute(query, {"uuid": owner.instances[0]}).one()
            connection.rollback()
            began_s = time.monotonic()
            connection.execute(query, {"uuid": owner.instances[0]}).one()
            return "", time.monotonic() - began_s
    except sqlalchemy.exc.DBAPIError as error:
        return str(error.orig), time.monotonic() - began_s
    finally:
        engine.dispose()
