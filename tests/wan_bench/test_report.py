"""The WAN benchmark's own arithmetic: what a cut's counters prove, what merges, and what the report makes of it."""

from __future__ import annotations

import pytest

from tests.wan_bench import cut, plots, results
from tests.wan_bench.claims import all_claims, seen
from tests.wan_bench.crew import Place
from tests.wan_bench.report import BEGIN, END, Report, main
from tests.wan_bench.results import Cells


class Looking:
    """Two sites' first controllers, that read the counters as they are told."""

    def __init__(self, values: dict[int, int]) -> None:
        self.places = [Place(0, 0), Place(1, 0)]
        self._values = values

    def first(self, each: int) -> list[int]:
        return [0, 1]

    def order(self, to, do, *, far):
        of = (to[0] + far) % 2
        return [{"values": {str(row): value for row, value in self._values.items() if row % 2 == of}}]


ROWS = {row: {"acknowledged": 10, "attempted": 12} for row in range(4)}


@pytest.mark.parametrize(("value", "wrong"), [(9, 2), (10, 0), (12, 0), (13, 2)])
def test_counter_is_wrong_below_what_was_acknowledged_and_above_what_was_attempted(value, wrong):
    """Both sites read it."""
    found = cut._verify(Looking({0: 10, 1: 12, 2: value, 3: 10}), ROWS)
    assert len(found["wrong"]) == wrong


def test_counter_that_is_not_there_is_wrong():
    found = cut._verify(Looking({0: 10, 1: 12, 3: 10}), ROWS)
    assert found["wrong"] == [f"site {site} reads None in row 2, not 10 to 12" for site in (0, 1)]


def test_pauses_before_the_cut_and_after_the_heal_do_not_count():
    gaps = [(1.0, 9.0, "before"), (9.5, 10.5, "into it"), (14.0, 22.0, "over the heal"), (20.5, 40.0, "after")]
    found = cut._pauses([{"acknowledged": 5, "gaps": gaps}], cut_s=10.0, healed_s=20.0)
    assert (found["longest_s"], found["first_error_then"], found["back_after_s"]) == (8.0, "over the heal", 2.0)


def _part(p50_ms: float, **more: object) -> dict[str, object]:
    return {"p50_ms": p50_ms, "by_site_ms": [p50_ms], "count": 10, "cpu_ms_each": 2.0, "seconds": 1.0} | more


def test_parts_of_later_runs_replace_their_own_kind_only(tmp_path):
    file = tmp_path / "r.json"
    key = {"store": "galera", "sites": 8, "rtt_ms": 50, "controllers": 1}
    results.merge(file, key, {"idle": {"packets_per_s": 1}, "home_read": _part(1)}, "first")
    results.merge(file, key, {"home_read": _part(2)}, "second")
    cells = Cells(file)
    found = cells.part("home_read", "galera", 8, 50)
    assert (found["p50_ms"], found["about"]["run"]) == (2, "second")
    assert cells.part("idle", "galera", 8, 50)["about"]["run"] == "first"
    assert cells.places() == [(8, 50)]


def test_mariadb_is_seen_from_the_sites_that_do_not_have_it():
    part = {"p50_ms": 100, "by_site_ms": [2.0, 200.0, 210.0]}
    assert (seen(part, "mariadb"), seen(part, "galera")) == (205.0, 100.0)


def test_report_has_the_figures_between_its_marks_and_keeps_what_is_around_them(tmp_path):
    file, report = tmp_path / "r.json", tmp_path / "wan.md"
    for store, p50_ms in (("mariadb", 200.0), ("galera", 80.0), ("lucd", 4.0)):
        key = {"store": store, "sites": 8, "rtt_ms": 50, "controllers": 1}
        key |= {"daemons": 1} if store == "lucd" else {}
        update = _part(p50_ms, wan_packets=0, changed={})
        results.merge(file, key, {"home_update": update, "idle": {"packets_per_s": 3.0}}, "run")
    report.write_text(f"# Title\n\nbefore\n{BEGIN}\nold\n{END}\nafter\n")
    main(["--from", str(file), "--report", str(report)], standalone_mode=False)
    text = report.read_text()
    assert "| update at home, beside Galera | at least 10x faster | 20.0x | yes |" in text
    assert "| update at home, beside far MariaDB | at least 20x faster | 50.0x | yes |" in text
    assert "| 8 | 50 | 200.0 | 80.0 | 4.0 | 50.0x | 20.0x |" in text
    assert text.startswith(f"# Title\n\nbefore\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert (tmp_path / "wan-update.svg").read_text().startswith("<svg")


def _lives(total_s: float) -> dict[str, object]:
    costs = {"client_cpu_ms": 50.0, "server_cpu_ms": 100.0, "projected": False}
    return _part(100.0) | costs | {"instances": 500, "done": 10, "total_s": total_s}


def test_aims_are_reached_or_not_by_what_was_measured(tmp_path):
    file = tmp_path / "r.json"
    eight = {"sites": 8, "rtt_ms": 50, "controllers": 1}
    update = _part(6.6, wan_packets=40, changed={"link_frames": 40})
    store = {"home_read": _part(1), "far_read": _part(52), "far_read_cached": _part(90)}
    store |= {"home_write": _part(3), "far_write": _part(60)}
    lucd = {
        "home_update": update,
        "idle": {"packets_per_s": 90.0, "frames_per_s": 30.0},
        "store": store,
        "life": _lives(50.0),
    }
    results.merge(file, eight | {"store": "lucd", "daemons": 1}, lucd, "run")
    one = {"store": "lucd", "sites": 1, "rtt_ms": 50, "controllers": 1, "daemons": 1}
    results.merge(file, one, {"home_update": _part(5.0)}, "run")
    results.merge(file, eight | {"store": "mariadb"}, {"life": _lives(99.0)}, "run")
    results.merge(file, eight | {"store": "galera"}, {"life": _lives(401.0)}, "run")
    pauses = {kind: {"longest_s": 0.2, "back_after_s": 0.0} for kind in cut.KINDS}
    pauses["across_the_cut"] = {"longest_s": 60.0, "back_after_s": 2.5}
    found = {"cut": pauses, "lost": {"wrong": ["row 1"], "acknowledged": 7}}
    results.merge(file, {"store": "lucd", "sites": 4, "rtt_ms": 50, "cut_site": 3, "cut_s": 60.0}, found, "run")
    said = {claim.what: (claim.measured, claim.met) for claim in all_claims(Cells(file))}
    lives = "500 instances, 1 controllers a site, all sites on one machine's processors: beside "
    where = "site 3 of 4 cut off for 60 s: "
    assert said == {
        "update at home, beside lucd on one site": ("1.32x", False),
        "WAN messages of updates at home": (
            "0 requests passed on; 40 frames between PoPs during 10 updates, idling makes 30",
            False,
        ),
        "read of a far row, store": ("1.02", True),
        "cached read of a far row, store": ("1.78", False),
        "write of a far row beyond one at home, store": ("1.14", True),
        f"{lives}central MariaDB": ("2.0x", False),
        f"{lives}Galera": ("8.0x", True),
        f"{where}longest pause of its own rows": ("0.20 s", True),
        f"{where}of the others' own rows": ("0.20 s", True),
        f"{where}all write again after the heal": ("2.50 s", False),
        f"{where}lost or invented writes": ("1 wrong counters, 7 acknowledged", False),
    }


def test_slowed_instances_are_told_in_the_time_that_they_stand_for(tmp_path):
    file = tmp_path / "r.json"
    key = {"sites": 8, "rtt_ms": 50, "slowed": 8, "controllers": 1}
    for store, total_s in (("mariadb", 4000.0), ("galera", 1200.0), ("lucd", 80.0)):
        own = {"daemons": 1} if store == "lucd" else {}
        life = _lives(total_s) | {"projected": store == "mariadb"}
        results.merge(file, key | {"store": store} | own, {"life": life, "together": _part(9.0, per_s=30.0)}, "run")
    cells = Cells(file)
    assert cells.places() == []
    said = {claim.what: (claim.measured, claim.met) for claim in all_claims(cells)}
    lives = "500 instances, 1 controllers a site, all sites, slowed 8 times: beside "
    assert said == {f"{lives}central MariaDB": ("50.0x", True), f"{lives}Galera": ("15.0x", True)}
    costs = "5 + 10 | 5 + 10 | 5 + 10"
    row = f"| 8 | 50 | 8 | 1 | 500.0* | 150.0 | 10.0 | 50.0x | 15.0x | {costs} | 240 | 240 | 240 |"
    assert row in Report(cells, tmp_path).lines()


def test_share_of_a_site_with_processors_and_daemons_of_its_own_is_told_apart(tmp_path):
    file = tmp_path / "r.json"
    key = {"sites": 8, "rtt_ms": 50, "slowed": 6, "controllers": 10}
    lucd = {"store": "lucd", "daemons": 1}
    each = (lucd | {"last_daemons": 5}, 18.0), (lucd | {"last_daemons": 10}, 9.0), ({"store": "galera"}, 81.0)
    for own, total_s in each:
        results.merge(file, key | own, {"share": _lives(total_s) | {"busy": 0.5, "instances": 62}}, "run")
    cells = Cells(file)
    share = "62 instances, 10 controllers a site, one site's share alone, slowed 6 times, "
    said = {claim.what: (claim.measured, claim.met) for claim in all_claims(cells)}
    assert said == {
        f"{share}5 daemons at the site: beside Galera": ("4.5x", False),
        f"{share}10 daemons at the site: beside Galera": ("9.0x", True),
    }
    row = "| 8 | 50 | 6 | 10 | 10 |  | 13.50 | 1.50 |  | 9.0x |  | 50 | 50 |  | 5 + 10 | 5 + 10 |"
    assert row in Report(cells, tmp_path).lines()


def test_sections_without_figures_are_left_out(tmp_path):
    file = tmp_path / "r.json"
    key = {"store": "galera", "sites": 1, "rtt_ms": 0, "controllers": 1}
    results.merge(file, key, {"home_update": _part(3.0, wan_packets=0, changed={})}, "run")
    headings = [line for line in Report(Cells(file), tmp_path).lines() if line.startswith("###")]
    assert headings == ["### An update at home"]


def test_bars_stand_in_the_order_of_their_values():
    text = plots.bars("t", "ms", ("a", "b"), {"g": [1.5, 150.0]})
    small, large = (
        float(line.split('height="')[1].split('"')[0])
        for line in text.splitlines()
        if "#" in line and 'width="19"' in line
    )
    assert small < large
