"""What the benchmark is to show, each beside what was measured: 8 sites, 50 ms between any two."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from tests.wan_bench.cut import KINDS
from tests.wan_bench.results import Cells

SITES, RTT_MS = 8, 50
AIMS = {"mariadb": ("central MariaDB", 2), "galera": ("Galera", 8)}
"""How many times faster 500 instances are to be."""
STORE_KINDS = (("read", "home_read", "far_read"), ("cached read", "home_read", "far_read_cached"))


@dataclass(frozen=True, slots=True)
class Claim:
    """`met`: None where a figure only stands beside the aims."""

    what: str
    aim: str
    measured: str
    met: bool | None

    def row(self) -> list[str]:
        """For a table."""
        return [self.what, self.aim, self.measured, {True: "yes", False: "no", None: ""}[self.met]]


def seen(part: dict[str, Any], store: str) -> float:
    """p50 ms as a site sees it; on MariaDB a site that does not have the server, if there is one."""
    others = part.get("by_site_ms", [])[1:] if store == "mariadb" else []
    return float(statistics.median(others) if others else part["p50_ms"])


def all_claims(cells: Cells) -> list[Claim]:
    """Those of which anything was measured."""
    return [*_updates(cells), *_far(cells), *_lives(cells), *_alone(cells), *_cuts(cells)]


def _updates(cells: Cells) -> Iterator[Claim]:
    found = {store: cells.part("home_update", store, SITES, RTT_MS) for store in ("lucd", "galera", "mariadb")}
    lucd = found["lucd"]
    if lucd is None:
        return
    here_ms = seen(lucd, "lucd")
    alone = cells.part("home_update", "lucd", 1, RTT_MS)
    if alone:
        ratio = here_ms / seen(alone, "lucd")
        yield Claim("update at home, beside lucd on one site", "at most 1.3x", f"{ratio:.2f}x", ratio <= 1.3)
    for store, name, aim in (("galera", "Galera", 10), ("mariadb", "far MariaDB", 20)):
        if other := found[store]:
            ratio = seen(other, store) / here_ms
            yield Claim(f"update at home, beside {name}", f"at least {aim}x faster", f"{ratio:.1f}x", ratio >= aim)
    if idle := cells.part("idle", "lucd", SITES, RTT_MS):
        idling = idle.get("frames_per_s", 0.0) * lucd["seconds"]
        passed_on, frames = (lucd["changed"].get(name, 0) for name in ("requests_passed_on", "link_frames"))
        said = f"{passed_on} requests passed on; {frames} frames between PoPs during {lucd['count']} updates, idling "
        # A message on the way of an update and its reply would be two frames for each.
        none = passed_on == 0 and frames - idling < lucd["count"] / 2
        yield Claim("WAN messages of updates at home", "none", f"{said}makes {idling:.0f}", none)


def _far(cells: Cells) -> Iterator[Claim]:
    def trips(home_ms: float, far_ms: float) -> float:
        return (far_ms - home_ms) / RTT_MS

    parts = {p: cells.part(p, "lucd", SITES, RTT_MS) for p in ("home_read", "far_read", "home_update", "far_update")}
    store = cells.part("store", "lucd", SITES, RTT_MS)
    if store:
        for name, home, far in STORE_KINDS:
            more = trips(store[home]["p50_ms"], store[far]["p50_ms"])
            yield Claim(f"{name} of a far row, store", "one WAN round trip", f"{more:.2f}", more <= 1.2)
        more = trips(store["home_write"]["p50_ms"], store["far_write"]["p50_ms"])
        yield Claim("write of a far row beyond one at home, store", "at most 1.2 trips", f"{more:.2f}", more <= 1.2)
    if parts["home_read"] and parts["far_read"]:
        more = trips(parts["home_read"]["p50_ms"], parts["far_read"]["p50_ms"])
        yield Claim("read of a far row, SQL", "one WAN round trip", f"{more:.2f}", more <= 1.2)
    if parts["home_update"] and parts["far_update"]:
        more = trips(parts["home_update"]["p50_ms"], parts["far_update"]["p50_ms"])
        yield Claim("read and update of a far row in one SQL transaction", "a read and a write", f"{more:.2f}", None)


def _lives(cells: Cells) -> Iterator[Claim]:
    for controllers in (1, 10):
        for part, how in (("life", "all sites on one machine's processors"), ("share", "one site's share alone")):
            lucd = cells.part(part, "lucd", SITES, RTT_MS, controllers)
            for store, (name, aim) in AIMS.items():
                other = cells.part(part, store, SITES, RTT_MS, controllers)
                if lucd and other:
                    ratio = other["total_s"] / lucd["total_s"]
                    what = f"{lucd['instances']} instances, {controllers} controllers a site, {how}"
                    yield Claim(f"{what}: beside {name}", f"at least {aim}x faster", f"{ratio:.1f}x", ratio >= aim)
    for sites, rtt_ms, slowed, controllers in cells.slowed("life"):
        found = {s: cells.part("life", s, sites, rtt_ms, controllers, slowed=slowed) for s in ("lucd", *AIMS)}
        lucd = found["lucd"]
        if lucd is None or (sites, rtt_ms) != (SITES, RTT_MS):
            continue
        for store, (name, aim) in AIMS.items():
            if other := found[store]:
                ratio = other["total_s"] / lucd["total_s"]
                what = (
                    f"{lucd['instances']} instances, {controllers} controllers a site, all sites, slowed {slowed} times"
                )
                yield Claim(f"{what}: beside {name}", f"at least {aim}x faster", f"{ratio:.1f}x", ratio >= aim)


def _alone(cells: Cells) -> Iterator[Claim]:
    """A site's share where the site has processors and servers of its own."""
    for (sites, rtt_ms, slowed, controllers), last in product(cells.slowed("share"), cells.last_daemons()):
        if (sites, rtt_ms) != (SITES, RTT_MS):
            continue
        get = partial(cells.part, "share", sites=sites, rtt_ms=rtt_ms, controllers=controllers, slowed=slowed)
        lucd = get("lucd", last_daemons=last)
        if lucd is None:
            continue
        for store, (name, aim) in AIMS.items():
            if other := get(store):
                ratio = other["total_s"] / lucd["total_s"]
                what = (
                    f"{lucd['instances']} instances, {controllers} controllers a site, one site's share alone, slowed "
                    f"{slowed} times, {last} daemons at the site"
                )
                yield Claim(f"{what}: beside {name}", f"at least {aim}x faster", f"{ratio:.1f}x", ratio >= aim)


def _cuts(cells: Cells) -> Iterator[Claim]:
    for cell in cells.cuts():
        key, cut, lost = cell["key"], cell["parts"]["cut"], cell["parts"]["lost"]
        if key["store"] != "lucd":
            continue
        where = f"site {key['cut_site']} of {key['sites']} cut off for {key['cut_s']:.0f} s"
        own_s, others_s = (cut[kind]["longest_s"] for kind in ("own_of_the_cut_site", "own_of_the_others"))
        yield Claim(f"{where}: longest pause of its own rows", "under 0.5 s", f"{own_s:.2f} s", own_s < 0.5)
        yield Claim(f"{where}: of the others' own rows", "under 0.5 s", f"{others_s:.2f} s", others_s < 0.5)
        back_s = max(cut[kind]["back_after_s"] for kind in KINDS if kind in cut)
        yield Claim(f"{where}: all write again after the heal", "within 2 s", f"{back_s:.2f} s", back_s <= 2.0)
        said = f"{len(lost['wrong'])} wrong counters, {lost['acknowledged']} acknowledged"
        yield Claim(f"{where}: lost or invented writes", "none", said, not lost["wrong"])
