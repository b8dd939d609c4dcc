"""The figures of docs/benchmarks/wan.md and its plots, made anew from the file of results.

    python -m tests.wan_bench.report

What people wrote around the figures stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click

from tests.bench.calls import CALLS
from tests.wan_bench import plots, results
from tests.wan_bench.claims import RTT_MS, SITES, all_claims, seen
from tests.wan_bench.results import Cells

REPORT = Path("docs/benchmarks/wan.md")
BEGIN = "<!-- figures: python -m tests.wan_bench.report -->"
END = "<!-- end of the figures -->"
STORES = ("mariadb", "galera", "lucd")
PAPER_S = {"mariadb": 422, "galera": 1988, "lucd": 223}
"""500 virtual machines on 8 sites at 10 ms: one central MySQL, Galera, and ROME on Redis, a prototype of what lucd does
(Lebre et al., IC2E 2017)."""


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def number(value: float | None, form: str = ".1f", after: str = "") -> str:
    return "" if value is None else f"{value:{form}}{after}"


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.1f}x" if a and b else ""


def _load(found: dict[str, dict[str, Any]]) -> str:
    return " / ".join(number(found[store].get("load")) if store in found else "-" for store in STORES)


def _cpu(part: dict[str, Any]) -> str:
    return f"{part['client_cpu_ms'] / part['done']:.0f} + {part['server_cpu_ms'] / part['done']:.0f}"


class Report:
    """Sections, each a list of lines; one for which nothing was measured is left out."""

    def __init__(self, cells: Cells, plots_in: Path) -> None:
        self._cells = cells
        self._plots_in = plots_in

    def lines(self) -> list[str]:
        sections = [self._claims, self._updates, self._far, self._calls, self._together, self._lives, self._slowed]
        sections += [self._alone, self._replicated, self._packets, self._cuts]
        return [*self._origin(), *(line for section in sections for line in section())]

    def _origin(self) -> list[str]:
        abouts = [part["about"] for cell in self._cells.all() for part in cell["parts"].values()]
        machines = sorted({about["machine"] for about in abouts})
        runs = sorted({about["run"] for about in abouts})
        return [f"Machine: {'; '.join(machines)}. Measured {runs[0]} to {runs[-1]} UTC.", ""]

    def _claims(self) -> list[str]:
        rows = [claim.row() for claim in all_claims(self._cells)]
        head = [f"{SITES} sites, {RTT_MS} ms, unless it says otherwise", "aim", "measured", "reached"]
        return ["### Aims", "", *table(head, rows)] if rows else []

    def _plot(self, name: str, *arguments: Any) -> list[str]:
        if not any(value for row in arguments[-1].values() for value in row):
            return []
        file = self._plots_in / f"wan-{name}.svg"
        file.write_text(plots.bars(*arguments))
        return [f"![{arguments[0]}]({file.name})", ""]

    def _rows(self, part: str, controllers: int = 1) -> Iterator[tuple[int, int, dict[str, dict[str, Any]]]]:
        """(sites, round trip, store -> the part) of every cell of which some store was measured."""
        for sites, rtt_ms in self._cells.places():
            found = {s: self._cells.part(part, s, sites, rtt_ms, controllers) for s in STORES}
            if any(found.values()):
                yield sites, rtt_ms, {store: got for store, got in found.items() if got}

    def _updates(self) -> list[str]:
        rows, groups = [], {}
        for sites, rtt_ms, found in self._rows("home_update"):
            p50 = {store: seen(part, store) for store, part in found.items()}
            alone = self._cells.part("home_update", "lucd", 1, rtt_ms) or self._cells.part("home_update", "lucd", 1, 0)
            row = [str(sites), str(rtt_ms), *(number(p50.get(store)) for store in STORES)]
            row += [_ratio(p50.get("mariadb"), p50.get("lucd")), _ratio(p50.get("galera"), p50.get("lucd"))]
            row.append(_ratio(p50.get("lucd"), seen(alone, "lucd") if alone else None))
            row += [number(found[s]["cpu_ms_each"]) if s in found else "" for s in STORES]
            rows.append([*row, _load(found)])
            if rtt_ms in (0, 50) and (rtt_ms or sites == 1):
                groups[f"{sites} sites, {rtt_ms} ms"] = [p50.get(store) for store in STORES]
        if not rows:
            return []
        head = ["sites", "rtt ms", "MariaDB far, ms", "Galera ms", "lucd ms", "MariaDB / lucd", "Galera / lucd"]
        head += ["lucd / its one site", "CPU ms MariaDB", "Galera", "lucd", "load"]
        return [
            "### An update at home",
            "",
            "p50 of one Nova-like transaction (read an instance, change it, commit) by one controller at a time, on a "
            "row of its own site. CPU: client and all servers, of one transaction. Load: of the machine when each "
            "store was measured; above 4, others used it too.",
            "",
            *table(head, rows),
            *self._plot("update", "An update at home, p50", "ms", ("MariaDB, far", "Galera", "lucd"), groups),
        ]

    def _far(self) -> list[str]:
        rows = []
        for sites, rtt_ms, found in self._rows("far_read"):
            if "lucd" not in found or sites == 1:
                continue
            get: Callable[[str], dict[str, Any] | None] = lambda part, s=sites, r=rtt_ms: self._cells.part(  # noqa: E731
                part, "lucd", s, r
            )
            row = [str(sites), str(rtt_ms)]
            store = get("store") or {}
            pairs = [(get("home_read"), get("far_read")), (get("home_update"), get("far_update"))]
            pairs += [(store.get("home_read"), store.get("far_read"))]
            pairs += [(store.get("home_read"), store.get("far_read_cached"))]
            pairs += [(store.get("home_write"), store.get("far_write"))]
            for home, far in pairs:
                if home and far:
                    trips = f" ({(far['p50_ms'] - home['p50_ms']) / rtt_ms:.2f})" if rtt_ms else ""
                    row.append(f"{home['p50_ms']:.1f} / {far['p50_ms']:.1f}{trips}")
                else:
                    row.append("")
            rows.append(row)
        if not rows:
            return []
        return [
            "### Rows of another site, on lucd",
            "",
            "p50 ms at home / of the next site's row, and in brackets how many WAN round trips lie between them. The "
            "SQL update reads the row before it writes it, which is a round trip of its own.",
            "",
            *table(
                [
                    "sites",
                    "rtt ms",
                    "SQL read",
                    "SQL read and update",
                    "store: read",
                    "store: cached read",
                    "store: write",
                ],
                rows,
            ),
        ]

    def _calls(self) -> list[str]:
        lines: list[str] = []
        for sites, rtt_ms, found in self._rows("calls"):
            if len(found) < len(STORES):
                continue
            rows = []
            for call in CALLS:
                p50 = [seen(found[store][call], store) for store in STORES]
                cpu = [found[store][call]["cpu_ms_each"] for store in STORES]
                rows.append(
                    [call, *map(number, p50), _ratio(p50[0], p50[2]), _ratio(p50[1], p50[2]), *map(number, cpu)]
                )
            lines += [f"{sites} sites, {rtt_ms} ms:", ""]
            head = ["call", "MariaDB far, ms", "Galera ms", "lucd ms", "MariaDB / lucd", "Galera / lucd"]
            lines += table([*head, "CPU ms MariaDB", "Galera", "lucd"], rows)
        return ["### The hot calls of a boot", "", "p50, one controller at a time.", "", *lines] if lines else []

    def _together(self) -> list[str]:
        rows = []
        for controllers in (1, 10):
            for sites, rtt_ms, found in self._rows("together", controllers):
                row = [str(sites), str(rtt_ms), str(controllers)]
                for store in STORES:
                    part = found.get(store)
                    row.append(f"{part['per_s']:.0f} ({part['p50_ms']:.0f}, {part['cpu_ms_each']:.1f})" if part else "")
                rows.append(row)
        if not rows:
            return []
        return [
            "### All controllers at once",
            "",
            "Updates at home by all controllers, as fast as they can: transactions a second (p50 ms, CPU ms of one). "
            "All sites share one machine's processors here.",
            "",
            *table(["sites", "rtt ms", "controllers a site", "MariaDB", "Galera", "lucd"], rows),
        ]

    def _lives(self) -> list[str]:
        rows, groups = [], {}
        for controllers in (1, 10):
            for sites, rtt_ms, found in self._rows("life", controllers):
                shares = {s: self._cells.part("share", s, sites, rtt_ms, controllers) for s in STORES}
                total = {store: part["total_s"] for store, part in found.items()}
                alone = {store: part["total_s"] for store, part in shares.items() if part}
                row = [str(sites), str(rtt_ms), str(controllers)]
                for store in STORES:
                    part = found.get(store)
                    row.append(f"{part['total_s']:.0f}{'*' * part['projected']}" if part else "")
                row += [_ratio(total.get(store), total.get("lucd")) for store in STORES[:2]]
                for store in STORES:
                    part = shares.get(store)
                    row.append(f"{part['total_s']:.0f}{'*' * part['projected']}" if part else "")
                row += [_ratio(alone.get(store), alone.get("lucd")) for store in STORES[:2]]
                row += [_cpu(found[store]) if store in found else "" for store in STORES]
                rows.append(row)
                if sites == 8 and rtt_ms in (10, 50):
                    groups[f"{rtt_ms} ms, {controllers} each"] = [total.get(store) for store in STORES]
        if not rows:
            return []
        counts = {part["instances"] for _, _, found in self._rows("life") for part in found.values()}
        head = ["sites", "rtt ms", "controllers a site", "MariaDB s", "Galera s", "lucd s", "MariaDB / lucd"]
        head += ["Galera / lucd", "a site's share alone: MariaDB s", "Galera s", "lucd s", "MariaDB / lucd"]
        head += ["Galera / lucd", "CPU ms an instance, controller + servers: MariaDB", "Galera", "lucd"]
        groups["paper, 10 ms"] = [PAPER_S[store] for store in STORES]
        return [
            f"### The life of {' or '.join(map(str, sorted(counts)))} instances",
            "",
            "Seconds in all, by controllers that work at once, each on its even share. An instance's life is the 23 "
            "calls of a boot and 3 of its deletion. `*`: the time allowed was over first, and the rest is projected at "
            "the pace so far. A site's share alone: the last site does its part while the others stand still, which is "
            "how long a site takes that does not share its processors with all others. CPU: Nova's own code in the "
            "controller, and all servers.",
            "",
            *table(head, rows),
            f"The paper, 500 virtual machines on 8 sites at 10 ms: one central MySQL {PAPER_S['mariadb']} s, Galera "
            f"{PAPER_S['galera']} s, ROME on Redis {PAPER_S['lucd']} s (ratios 1.9x and 8.9x).",
            "",
            *self._plot(
                "instances",
                "Instances on 8 sites, seconds in all",
                "s",
                ("MariaDB", "Galera", "lucd (paper: ROME)"),
                groups,
            ),
        ]

    def _slowed(self) -> list[str]:
        rows = []
        for sites, rtt_ms, slowed, controllers in self._cells.slowed("life"):
            get = partial(self._cells.part, sites=sites, rtt_ms=rtt_ms, controllers=controllers, slowed=slowed)
            found = {store: get("life", store) for store in STORES}
            total = {store: part["total_s"] / slowed if part else None for store, part in found.items()}
            row = [str(sites), str(rtt_ms), str(slowed), str(controllers)]
            for store, part in found.items():
                row.append(f"{total[store]:.1f}{'*' * part['projected']}" if part else "")
            row += [_ratio(total[store], total["lucd"]) for store in STORES[:2]]
            row += [_cpu(part) if part else "" for part in found.values()]
            crowds = [get("together", store) for store in STORES]
            rows.append(row + [number(crowd["per_s"] * slowed, ".0f") if crowd else "" for crowd in crowds])
        if not rows:
            return []
        head = ["sites", "rtt ms", "slowed", "controllers a site", "MariaDB s", "Galera s", "lucd s", "MariaDB / lucd"]
        head += ["Galera / lucd", "CPU ms an instance: MariaDB", "Galera", "lucd", "updates a second: MariaDB"]
        return [
            "### The same where each site has processors of its own",
            "",
            "All sites at once, slowed: the WAN's delays are so many times longer, and the times and rates are those "
            "of a WAN as it is called between machines with so many times the processors (and disks as much faster). "
            "With eight sites on two cores, slowed 8 times, each site has two cores. What goes by the clock (signs of "
            "life, timeouts) is slowed, too. `*`: projected.",
            "",
            *table([*head, "Galera", "lucd"], rows),
        ]

    def _alone(self) -> list[str]:
        rows = []
        for place, last in product(self._cells.slowed("share"), self._cells.last_daemons()):
            sites, rtt_ms, slowed, controllers = place
            get = partial(self._cells.part, "share", sites=sites, rtt_ms=rtt_ms, controllers=controllers, slowed=slowed)
            found = {store: get(store) for store in STORES[:2]} | {"lucd": get("lucd", last_daemons=last)}
            if found["lucd"] is None:
                continue
            total = {store: part["total_s"] / slowed if part else None for store, part in found.items()}
            row = [str(sites), str(rtt_ms), str(slowed), str(controllers), str(last)]
            for store, part in found.items():
                row.append(f"{total[store]:.2f}{'*' * part['projected']}" if part else "")
            row += [_ratio(total[store], total["lucd"]) for store in STORES[:2]]
            row += [number(100 * part["busy"], ".0f") if part else "" for part in found.values()]
            rows.append([*row, *(_cpu(part) if part else "" for part in found.values())])
        if not rows:
            return []
        head = ["sites", "rtt ms", "slowed", "controllers a site", "daemons at the site", "MariaDB s", "Galera s"]
        head += ["lucd s", "MariaDB / lucd", "Galera / lucd", "processors busy %: MariaDB", "Galera", "lucd"]
        return [
            "### A site's share alone, with processors of its own",
            "",
            "The last site does its part of the instances while the others stand still, slowed: it has two cores times "
            "so many, and on lucd so many daemons, three of which hold a row. Where the processors are busy all the "
            "time that is what bounds it, as it would on so many. `*`: projected.",
            "",
            *table([*head, "CPU ms an instance: MariaDB", "Galera", "lucd"], rows),
        ]

    def _replicated(self) -> list[str]:
        rows = []
        for sites, rtt_ms in self._cells.places():
            for controllers in (1, 10):
                for daemons in (1, 3):
                    parts = ("home_update", "far_read", "together", "share", "life")
                    got = {p: self._cells.part(p, "lucd", sites, rtt_ms, controllers, daemons) for p in parts}
                    if not self._cells.has_daemons(sites, rtt_ms, controllers, 3) or not any(got.values()):
                        continue
                    row = [str(sites), str(rtt_ms), str(controllers), str(daemons)]
                    row += [number(got[p]["p50_ms"]) if got[p] else "" for p in parts[:2]]
                    row += [number(got[p]["cpu_ms_each"]) if got[p] else "" for p in ("home_update", "together")]
                    row += [number(got[p]["total_s"]) if got[p] else "" for p in ("share", "life")]
                    rows.append([*row, _cpu(got["life"]) if got["life"] else ""])
        if not rows:
            return []
        head = ["sites", "rtt ms", "controllers a site", "daemons a site", "update at home ms", "far read ms"]
        head += [
            "CPU ms an update, alone",
            "all at once",
            "a site's share alone s",
            "all instances s",
            "CPU ms an instance",
        ]
        return [
            "### Three daemons in each site",
            "",
            "lucd with every row on three daemons of its site, beside the same with one daemon.",
            "",
            *table(head, rows),
        ]

    def _packets(self) -> list[str]:
        rows = []
        for sites, rtt_ms, found in self._rows("home_update"):
            if sites == 1:
                continue
            for store, part in found.items():
                idle = self._cells.part("idle", store, sites, rtt_ms)
                rate = idle["packets_per_s"] if idle else None
                expected = rate * part["seconds"] if rate is not None else None
                each = part["wan_packets"] / part["count"]
                row = [str(sites), str(rtt_ms), store, number(rate), str(part["count"]), str(part["wan_packets"])]
                row += [number(expected, ".0f"), number(each, ".2f")]
                if store == "lucd" and idle:
                    frames, passed_on = (part["changed"].get(n, 0) for n in ("link_frames", "requests_passed_on"))
                    row += [f"{frames} ({idle.get('frames_per_s', 0.0) * part['seconds']:.0f})", str(passed_on)]
                rows.append(row + [""] * (10 - len(row)))
        if not rows:
            return []
        head = ["sites", "rtt ms", "store", "idle packets/s", "updates", "WAN packets meanwhile"]
        head += [
            "idling makes",
            "packets an update",
            "frames between daemons (idling makes)",
            "requests passed on to other PoPs",
        ]
        return [
            "### WAN packets while rows are updated at home",
            "",
            "lucd's daemons ask each other what is new in domain `global`, and tell each other that they live. Frames "
            "are requests and replies between daemons, without those signs of life.",
            "",
            *table(head, rows),
        ]

    def _cuts(self) -> list[str]:
        rows = []
        for cell in self._cells.cuts():
            key, cut, lost = cell["key"], cell["parts"]["cut"], cell["parts"]["lost"]
            row = [
                key["store"],
                str(key["sites"]),
                str(key["rtt_ms"]),
                str(key["cut_site"]),
                number(cut["seconds"], ".0f"),
            ]
            for kind in ("own_of_the_cut_site", "own_of_the_others", "far_of_the_others", "across_the_cut"):
                row.append(number(cut[kind]["longest_s"], ".2f") if kind in cut else "")
            back_s = max(
                cut[kind]["back_after_s"] for kind in cut if isinstance(cut[kind], dict) and "back_after_s" in cut[kind]
            )
            row += [number(back_s, ".2f"), number(cut["members_together_after_s"], ".2f")]
            row += [str(lost["acknowledged"]), str(len(lost["wrong"]))]
            rows.append(row)
        if not rows:
            return []
        head = ["store", "sites", "rtt ms", "cut site", "cut s", "longest pause s: cut site's own rows"]
        head += ["others' own rows", "far rows of the others", "across the cut", "all write again after the heal, s"]
        head += ["members together, s", "writes acknowledged", "counters wrong"]
        return [
            "### A site is cut off and comes back",
            "",
            "Every site counts a row of its own and one of the next site's, before, during and after the cut; every "
            "counter is compared with what was acknowledged at the end, as every site reads it.",
            "",
            *table(head, rows),
        ]


@click.command()
@click.option("--from", "source", type=Path, default=results.FILE, show_default=True, help="The file of results.")
@click.option("--report", type=Path, default=REPORT, show_default=True)
def main(source: Path, report: Path) -> None:
    """Write the figures into the report, between its two marks."""
    text = report.read_text() if report.exists() else f"# WAN\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = Report(Cells(source), report.parent).lines()
    report.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"{END}{after}")


if __name__ == "__main__":
    main()
