"""`make bench-wan`: MariaDB in one site, Galera with a node in each, and lucd with a PoP in each, over a WAN.

    python -m tests.wan_bench.run --sites 1,2 --rtt-ms 0,10 --controllers 1 --quick
    python -m tests.wan_bench.run --sites 8 --rtt-ms 50 --parts home_update,life
    python -m tests.wan_bench.run --sites 8 --rtt-ms 50 --slowed 4 --controllers 1
    python -m tests.wan_bench.run --sites 8 --rtt-ms 50 --slowed 6 --controllers 10 --last-daemons 10
    python -m tests.wan_bench.run --cut --sites 4 --rtt-ms 50
    python -m tests.wan_bench.report

Needs root, network namespaces and TUN devices. Every cell of the matrix (store, sites, round trip, controllers per
site) is merged into a file of results as soon as it is measured, so a matrix may be measured in pieces; the report is
made from that file.

Slowed N times, the WAN's delays are N times as long as they are called, and each second stands for 1/N of one: the
machine is then as good as one with N times as many processors, N times as fast a disk (time dilation; Gupta et al.,
"To Infinity and Beyond: Time-Warped Network Emulation", NSDI 2006). With eight sites on two cores, slowed 8 times, each
site has two cores of its own; slowed 6 times, one site that works while the others stand still has twelve. What lucd's
daemons do by the clock is slowed, too (`slow_clock`), and Galera's timeouts are as much longer.

It is as good as so many processors only where as many processes have something to do: a process that works alone is not
slowed, so it would seem N times as fast. One controller a site waits for its daemon and the daemon for it, which is one
processor a site: slowed 4 times on two cores.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import click

from tests.wan.sites import Wan, why_not
from tests.wan_bench import cut, results
from tests.wan_bench.crew import Crew
from tests.wan_bench.measure import SINGLE, Cell, Result
from tests.wan_bench.stores import KINDS, make_store

PARTS = ("idle", *SINGLE, "store", "calls", "together", "share", "life")
SHOWN = ("p50_ms", "by_site_ms", "per_s", "total_s", "done", "cpu_ms_each", "wan_packets", "packets_per_s", "changed")
SLOWED_PARTS = ("together", "life")
"""What all sites do at once: the rest is taken in turns and needs no more processors."""
LIMIT_S = 8.0
TIMES, QUICK_TIMES = 40, 12
LIFE_LIMIT_S = 90.0
QUICK_LIFE_LIMIT_S = 20.0
CUT_S, QUICK_CUT_S = 60.0, 20.0


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "N,N..."

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers; write 1,2,4", param, context)


def _names(known: tuple[str, ...], text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return names


def measure_cell(cell: Cell, parts: list[str], instances: int, life_limit_s: float) -> dict[str, Result]:
    """The parts of one cell that were asked for, and that its store and its number of controllers have."""
    found = {}
    for part in PARTS:
        if part not in parts or not cell.has(part):
            continue
        match part:
            case "idle" | "calls" | "together" | "store":
                found[part] = getattr(cell, part)()
            case "life" | "share":
                found[part] = getattr(cell, part)(instances, life_limit_s)
            case _:
                found[part] = cell.in_turns(part)
        click.echo(f"    {part}: {_line(found[part])}")
    return found


def _line(result: Result) -> str:
    return ", ".join(f"{name} {result[name]}" for name in SHOWN if name in result) or "measured"


@contextmanager
def opened(
    kind: str, sites: int, daemons: int, last_daemons: int, slowed: int, each: int
) -> Iterator[tuple[Wan, Crew]]:
    """A store on so many sites, with so many controllers at each, whose rows are made."""
    with tempfile.TemporaryDirectory(prefix="lucd-wan-") as name, Wan(sites) as wan:
        store = make_store(kind, Path(name), wan, daemons, last_daemons, slowed)
        try:
            store.start()
            with Crew(wan, store, each) as crew:
                crew.prepare()
                yield wan, crew
        finally:
            store.stop()


@click.command()
@click.option("--sites", type=Numbers(), default="1,2,4,8", show_default=True)
@click.option(
    "--rtt-ms", type=Numbers(), default="0,10,50", show_default=True, help="Round trip between any two sites."
)
@click.option("--slowed", type=click.IntRange(1, 100), default=1, show_default=True, help="Times; see above.")
@click.option("--controllers", type=Numbers(), default="1,10", show_default=True, help="Client processes at each site.")
@click.option("--stores", default=",".join(KINDS), show_default=True)
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--daemons", default=1, show_default=True, help="Of lucd in each site.")
@click.option("--last-daemons", type=int, default=None, help="In the last site, whose share alone is measured then.")
@click.option("--instances", default=500, show_default=True, help="Created and deleted in all, spread over the sites.")
@click.option("--life-s", default=LIFE_LIMIT_S, show_default=True, help="Limit of that; the rest is projected.")
@click.option(
    "--times", type=int, default=None, help="Repetitions of a single transaction at a site; 40, or 12 with --quick."
)
@click.option("--quick", is_flag=True, help="Fewer repetitions, a short limit for the instances and the cut.")
@click.option("--cut", "cutting", is_flag=True, help="Instead: cut a site off under load, and let it come back.")
@click.option("--cut-s", type=float, default=None, help="For how long; 60, or 20 with --quick.")
@click.option("--cut-site", default=-1, show_default=True, help="Which; -1 is the last, 0 the one that was first.")
@click.option("--out", type=Path, default=results.FILE, show_default=True, help="The file of results.")
def main(
    sites: list[int],
    rtt_ms: list[int],
    slowed: int,
    controllers: list[int],
    stores: str,
    parts: str,
    daemons: int,
    last_daemons: int | None,
    instances: int,
    life_s: float,
    times: int | None,
    quick: bool,
    cutting: bool,
    cut_s: float | None,
    cut_site: int,
    out: Path,
) -> None:
    """Measure cells of the matrix and merge them into the file of results."""
    if why := why_not():
        raise click.ClickException(why)
    kinds, wanted = _names(tuple(KINDS), stores), _names(PARTS, parts)
    run = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    if slowed > 1:
        if cutting:
            raise click.BadParameter("--slowed and --cut exclude each other: what ends a cut goes by the clock")
        wanted = [part for part in wanted if part in (("share",) if last_daemons else SLOWED_PARTS)]
    elif last_daemons:
        raise click.BadParameter("--last-daemons goes with --slowed: what a site can do with processors for them all")
    cut_s = cut_s or (QUICK_CUT_S if quick else CUT_S)
    life_s = min(life_s, QUICK_LIFE_LIMIT_S) if quick else life_s

    def measure(wan: Wan, crew: Crew, key: dict[str, Any]) -> None:
        if slowed > 1:
            crew.store.slow()
        wan.between(range(len(wan.sites)), key["rtt_ms"] * slowed)
        if cutting:
            site = cut_site % len(wan.sites)
            results.merge(out, key | {"cut_site": site, "cut_s": cut_s}, cut.run(wan, crew, cut_s, site), run)
            return
        for each in controllers:
            click.echo(f"  {key['rtt_ms']} ms, {each} controllers a site, load {os.getloadavg()[0]:.1f}")
            cell = Cell(wan, crew, each, times or (QUICK_TIMES if quick else TIMES), LIMIT_S)
            found = measure_cell(cell, wanted, instances, life_s)
            results.merge(out, key | {"controllers": each}, found, run)

    for number, kind in product(sites, kinds):
        click.echo(f"{kind} on {number} sites")
        each = 2 if cutting else max(controllers)
        own = {}
        if kind == "lucd":
            own = {"daemons": daemons} | ({"last_daemons": last_daemons} if last_daemons else {})
        with opened(kind, number, daemons, last_daemons or daemons, slowed, each) as (wan, crew):
            for rtt in rtt_ms:
                key = {"store": kind, "sites": number, "rtt_ms": rtt} | ({"slowed": slowed} if slowed > 1 else {})
                measure(wan, crew, key | own)


if __name__ == "__main__":
    main()
