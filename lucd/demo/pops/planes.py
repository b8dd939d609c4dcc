"""The demo of a control plane in each PoP: each boots and lists; one that is cut off boots and deletes its own.

Each PoP has nova-api, nova-scheduler, nova-conductor, Placement and two computes, all of it at the PoP's own daemon.
Nova sees one deployment with a cell for each PoP: the API database is one for all, the cells and the Placements are
the PoPs' own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy

from dht.errors import DhtError, Unavailable
from lucd.cli.output import show_table
from lucd.demo.daemons import LocalNode
from lucd.demo.plane.audit import audit
from lucd.demo.plane.neighbours import IMAGE
from lucd.demo.plane.rest import ApiRefused
from lucd.demo.plane.site import API, CELL0, ControlPlane, Place
from lucd.demo.pops.story import wan_daemons
from lucd.demo.stage import perform
from lucd.demo.terminal import Calls, Terminal, quantile_ms
from lucd.demo.wan.sites import WanDaemons

R = TypeVar("R")
DEADLINE_S = 1500.0
"""The demo ends by itself after that long, as failed: it starts seven programs in each PoP."""
STEP_WAIT_S = 180.0
HEAL_WAIT_S = 60.0
STALE_WAIT_S = 30.0
COMPUTES = 2
MORE = 2
"""Servers that each PoP boots while one is cut off."""
OPTIONS = (
    # A cell that is out of reach says so at once; asking again ten times, ten seconds apart, would only delay that.
    "[database]\nmax_retries = 1\nretry_interval = 1\n"
)


def play(pops: int, rtt_ms: float, instances: int, keep: bool = False) -> int:
    """Run the demo; returns the exit code: 0 only if every server did what it was told and nothing was lost."""

    def make(terminal: Terminal, daemons: WanDaemons) -> PlanesStory:
        return PlanesStory(terminal, daemons, rtt_ms, instances)

    needs = dict.fromkeys(("nova", "placement", "cheroot"), "lucd[control-plane]")
    return perform(make, needs, DEADLINE_S, keep, wan_daemons(pops, rtt_ms))


class Site:
    """One PoP: its daemon, its control plane, and the servers that are to be there."""

    def __init__(self, number: int, node: LocalNode, daemons: WanDaemons, path: Path) -> None:
        self.number = number
        self.node = node
        self.name = node.pop
        place = Place(
            cell_name=self.name,
            cell=f"nova_cell_{self.name}",
            placement=f"placement_{self.name}",
            # Where nova-api looks for what belongs to no cell yet; cell0 may be out of reach, the PoP's own is not.
            api=f"nova_cell_{self.name}",
            prefix=f"{self.name}-",
            launcher=tuple(node.launcher),
            dial=daemons.wan.sites[number].connect,
            mapped_transport_url=f"lucd:///{{path}}?bus={self.name}",
            options=OPTIONS,
        )
        bus = f"lucd://{node.socket}?bus={self.name}"
        self.plane = ControlPlane(path / self.name, lambda name, _: node.url(name), bus, COMPUTES, place)
        self.calls = Calls()
        self.api = self.plane.api(self.calls)
        self.servers: list[str] = []

    def boot(self, flavor: str, count: int) -> None:
        """Ask for them one after the other, then wait until all are ACTIVE."""
        first = len(self.servers) + 1
        asked = [self.api.boot(f"{self.name}-vm-{n}", flavor, IMAGE) for n in range(first, first + count)]
        self.servers += asked
        for server in asked:
            self.api.wait(server, "ACTIVE", STEP_WAIT_S)

    def delete(self, server: str) -> None:
        """Return when this PoP's API lists it no more."""
        self.api.delete(server)
        deadline = time.monotonic() + STEP_WAIT_S
        while server in self.api.servers():
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} still lists server {server} after {STEP_WAIT_S:.0f} s")
            time.sleep(0.25)
        if server in self.servers:
            self.servers.remove(server)


class PlanesStory:
    """The demo's acts in order."""

    def __init__(self, terminal: Terminal, daemons: WanDaemons, rtt_ms: float, instances: int) -> None:
        self._terminal = terminal
        self._daemons = daemons
        self._rtt_ms = rtt_ms
        self._instances = instances
        path = daemons.path / "nova"
        self._sites = [Site(number, node, daemons, path) for number, node in enumerate(daemons.nodes)]
        self._problems: list[str] = []

    def tell(self) -> bool:
        """True if everything went well; says what did not."""
        self._start_daemons()
        self._start_planes()
        flavor = self._make_flavor()
        self._boot_in_each(flavor)
        self._list_from_each()
        self._live_apart(flavor)
        self._heal()
        self._show()
        for site in self._sites:
            self._problems += [f"{site.name}: {text}" for text in (*site.calls.failed, *site.plane.problems())]
        for text in self._problems:
            self._terminal.say(f"FAILED: {text}")
        if not self._problems:
            servers = sum(len(site.servers) for site in self._sites)
            count = sum(site.calls.count for site in self._sites)
            self._terminal.say(f"{servers} servers ACTIVE, no ERROR; {count} REST calls, 0 failed.")
        return not self._problems

    def stop(self) -> None:
        for site in self._sites:
            site.plane.terminate()
        for site in self._sites:
            site.plane.stop()

    def last_words(self) -> str:
        return " || ".join(
            f"{program.module} of {site.name}: {program.log_tail()[-200:]}"
            for site in self._sites
            for program in site.plane.programs
        )

    # -- acts

    def _start_daemons(self) -> None:
        terminal, sites = self._terminal, self._sites
        terminal.say(f"{len(sites)} PoPs, {self._rtt_ms:.0f} ms apart, with one daemon each.")
        self._daemons.start()
        store = sites[0].node.store()
        homes = {API: "global", CELL0: "global"}
        for site in sites:
            homes |= {site.plane.place.cell: site.name, site.plane.place.placement: site.name}
        for name, home in homes.items():
            store.create_database(name, home=home)
            terminal.detail(f"lucd database create {name} --home {home if home == 'global' else f'pop:{home}'}")

    def _start_planes(self) -> None:
        first = self._sites[0].plane
        wan, everywhere = self._daemons.wan, range(len(self._sites))
        with self._terminal.step(
            "nova-manage and placement-manage make the schemas and a cell for each PoP, before the PoPs are far "
            "apart: each change of the shared ones takes some round trips"
        ):
            wan.between(everywhere, 0.0)
            first.share()
            for site in self._sites:
                site.plane.map_cell()
            self._everywhere(
                lambda site: site.plane.sync("db", "sync", *(() if site.plane is first else ("--local_cell",)))
            )
            wan.between(everywhere, self._rtt_ms)
        cells = self._cells()
        with self._terminal.step(
            f"nova-api, nova-scheduler, nova-conductor, placement and {COMPUTES} nova-compute in each PoP; "
            "no broker, no database server"
        ):
            self._everywhere(lambda site: site.plane.start(cell_uuid=cells[site.name]))

    def _make_flavor(self) -> str:
        """In one PoP, and known in all when this returns: flavors are read from each PoP's own copy, within a bound."""
        flavor = self._sites[0].api.make_flavor("small", 1, 512, 1)
        began_s = time.monotonic()
        for site in self._sites:
            while site.plane.api().ask("GET", f"/flavors/{flavor}")[0] != 200:
                if time.monotonic() - began_s > STALE_WAIT_S:
                    raise Unavailable(f"{site.name} does not know the flavor {flavor} of {self._sites[0].name}")
                time.sleep(0.1)
        took_s = time.monotonic() - began_s
        self._terminal.say(f"A flavor is made in {self._sites[0].name}; {took_s:.1f} s later all PoPs know it.")
        return flavor

    def _boot_in_each(self, flavor: str) -> None:
        terminal = self._terminal
        with terminal.step(f"{self._instances} servers are asked for in each PoP, of its own API, in all at once."):
            self._everywhere(lambda site: site.boot(flavor, self._instances))
        for site in self._sites:
            found = site.api.servers()
            hosts = sorted({str(found[server]["OS-EXT-SRV-ATTR:host"]) for server in site.servers})
            if any(host not in site.plane.hosts for host in hosts):
                self._problems.append(f"servers of {site.name} are on {hosts}")
            terminal.detail(f"{len(site.servers)} ACTIVE of {site.name} on {', '.join(hosts)}")

    def _list_from_each(self) -> None:
        self._terminal.say("Each PoP's API lists the servers of all.")
        for site in self._sites:
            began_s = time.monotonic()
            found = set(site.api.servers())
            self._expect(f"{site.name} lists", found, self._all())
            self._terminal.detail(f"{site.name}: {len(found)} servers in {time.monotonic() - began_s:.2f} s")
        here, there = self._sites[0], self._sites[-1]
        began_s = time.monotonic()
        here.api.act(there.servers[0], "os-stop")
        here.api.wait(there.servers[0], "SHUTOFF", STEP_WAIT_S)
        here.api.act(there.servers[0], "os-start")
        here.api.wait(there.servers[0], "ACTIVE", STEP_WAIT_S)
        self._terminal.detail(
            f"{here.name}'s API stops and starts a server of {there.name}: {time.monotonic() - began_s:.1f} s"
        )
        self._audit("before the cut")

    def _live_apart(self, flavor: str) -> None:
        terminal, cut = self._terminal, self._sites[-1]
        terminal.say(f"The cables of {cut.name} are pulled out; each PoP boots {MORE} more and deletes one.")
        self._daemons.wan.cut([cut.number], [site.number for site in self._sites[:-1]])

        def life(site: Site) -> str:
            try:
                began_s = time.monotonic()
                site.boot(flavor, MORE)
                booted_s = time.monotonic() - began_s
                site.delete(site.servers[0])
                return f"booted in {booted_s:.1f} s, deleted in {time.monotonic() - began_s - booted_s:.1f} s"
            except (DhtError, ApiRefused) as error:
                self._problems.append(f"{site.name} while {cut.name} is cut off: {error}")
                return f"FAILED: {error}"

        for site, done in zip(self._sites, self._everywhere(life), strict=True):
            terminal.detail(f"{site.name}: {done}")
        for here, there in ((self._sites[0], cut), (cut, self._sites[0])):
            terminal.detail(self._ask_far(here, there))
        with_cut = {server for site in self._sites[:-1] for server in site.servers}
        for site in self._sites:
            expected = set(cut.servers) if site is cut else with_cut
            began_s = time.monotonic()
            try:
                listed = site.api.servers()
            except ApiRefused as error:
                self._problems.append(f"{site.name} lists nothing while {cut.name} is cut off: {error}")
                continue
            found = {server for server, shown in listed.items() if shown["status"] != "UNKNOWN"}
            self._expect(f"{site.name} lists, apart,", found, expected)
            terminal.detail(f"{site.name} lists {len(found)} servers in {time.monotonic() - began_s:.2f} s")

    def _ask_far(self, here: Site, there: Site) -> str:
        """What an API says of a server beyond the cut: never that there is none."""
        began_s = time.monotonic()
        status, reply = here.plane.api().ask("GET", f"/servers/{there.servers[-1]}")
        took_s = time.monotonic() - began_s
        if status == 404 or (status < 400 and reply["server"]["status"] != "UNKNOWN"):
            self._problems.append(f"{here.name} says {status} of a server of {there.name}, which is out of reach")
        said = reply["server"]["status"] if status < 400 else f"{status}"
        return f"a server of {there.name} asked of {here.name}: {said}, after {took_s:.1f} s"

    def _heal(self) -> None:
        terminal = self._terminal
        terminal.say("The cables are back.")
        self._daemons.wan.heal()
        began_s = time.monotonic()
        for site in self._sites:
            while set(site.api.servers()) != self._all():
                if time.monotonic() - began_s > HEAL_WAIT_S:
                    raise Unavailable(f"{site.name} does not list the servers of all PoPs after the heal")
                time.sleep(0.25)
        terminal.detail(f"every PoP's API lists the servers of all again after {time.monotonic() - began_s:.1f} s")
        self._audit("after the heal")
        here, there = self._sites[0], self._sites[-1]
        began_s = time.monotonic()
        doomed = there.servers.pop()
        here.delete(doomed)
        terminal.detail(
            f"{here.name}'s API deletes a server that {there.name} booted apart: {time.monotonic() - began_s:.1f} s"
        )
        self._audit("after the deletion")

    def _show(self) -> None:
        print()
        head = ["CALL OF NOVA'S REST API", "COUNT", *(f"P50 MS {s.name}" for s in self._sites), "LONGEST MS"]
        taken = [site.calls.took_s() for site in self._sites]
        rows = []
        for name in taken[0]:
            took_s = [took.get(name, []) for took in taken]
            every = [one for took in took_s for one in took]
            p50 = (quantile_ms(took, 0.5) if took else "" for took in took_s)
            rows.append((name, str(len(every)), *p50, quantile_ms(every, 1.0)))
        show_table(head, rows)
        print()

    # -- what acts share

    def _all(self) -> set[str]:
        return {server for site in self._sites for server in site.servers}

    def _expect(self, what: str, found: set[str], expected: set[str]) -> None:
        if found != expected:
            missing, more = len(expected - found), len(found - expected)
            self._problems.append(f"{what} {len(found)} servers: {missing} are missing, {more} are too many")

    def _everywhere(self, do: Callable[[Site], R]) -> Sequence[R]:
        """In all PoPs at once. Raises what one raised, when all have ended."""
        with ThreadPoolExecutor(len(self._sites)) as threads:
            return list(threads.map(do, self._sites))

    def _cells(self) -> dict[str, str]:
        """Name -> uuid."""
        engine = sqlalchemy.create_engine(self._sites[0].node.url(API))
        try:
            with engine.connect() as connection:
                rows: Any = connection.execute(sqlalchemy.text("SELECT name, uuid FROM cell_mappings"))
                return {str(name): str(uuid) for name, uuid in rows}
        finally:
            engine.dispose()

    def _audit(self, when: str) -> None:
        """Read by SQL what has to be there, each PoP's cell through each daemon's door."""
        good = len(self._problems)
        for reader in self._sites:
            for owner in self._sites:
                elsewhere = self._all() - set(owner.servers)
                found = audit(reader.node.url, owner.servers, owner.plane.place, elsewhere)
                self._problems += [f"{when}, {owner.name} through {reader.name}: {problem}" for problem in found]
        if len(self._problems) == good:
            self._terminal.detail("instances, mappings and allocations are right through the SQL door of each PoP")
