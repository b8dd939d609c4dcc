"""The WAN benchmark's own arithmetic: what a cut's counters prove, what merges, and what the report makes of it."""

from __future__ import annotations

import pytest

from tests.wan_bench import cut, plots, results
from tests.wan_bench.crew import Place
from tests.wan_bench.report import BEGIN, END, Report, main, seen
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
    assert (seen(part, "mariadb"), seen(part, "galera")) == (205.0, 200.0)


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
    assert "| 8 | 50 | 200.0 | 80.0 | 4.0 | 50.0x | 20.0x |" in text
    assert text.startswith(f"# Title\n\nbefore\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert (tmp_path / "wan-update.svg").read_text().startswith("<svg")


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
