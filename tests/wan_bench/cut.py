"""A site is cut off from all others under load, and comes back: who pauses, for how long, and is anything lost?

Every site's first controller counts a row of its own database, its second one a row of the next site's. So some rows
have writer and home on the same side of the cut, and some do not.
"""

from __future__ import annotations

import time
from typing import Any

import click

from tests.laboratory import wait_until
from tests.wan.sites import Wan
from tests.wan_bench.crew import Answer, Crew

KINDS = ("own_of_the_cut_site", "own_of_the_others", "far_of_the_others", "across_the_cut")
"""Of rows: by whether writer and home are cut off from each other, or together from the rest."""
LEAD_S = 5.0
TAIL_S = 15.0
CONVERGED_S = 60.0


def run(wan: Wan, crew: Crew, cut_s: float, site: int) -> dict[str, Any]:
    """Cut the site off for so long. Seconds; see the fields of the answer."""
    sites = len(wan.sites)
    crew.order([0] if crew.store.shared else crew.first(1), "make_counters", sites=2 * sites)
    firsts, seconds = crew.first(1), [n for n, place in enumerate(crew.places) if place.number == 1]
    length_s = LEAD_S + cut_s + TAIL_S
    # Row s: counted at s. Row sites + s: of site s too, counted at the site before it.
    orders = [(n, {"do": "count", "row": crew.places[n].site, "far": False, "seconds": length_s}) for n in firsts]
    for n in seconds:
        of = (crew.places[n].site + 1) % sites
        orders.append((n, {"do": "count", "row": sites + of, "far": True, "seconds": length_s}))
    told = crew.begin(orders)
    time.sleep(LEAD_S)
    others = [other for other in range(sites) if other != site]
    wan.cut([site], others)
    cut_at_s = time.monotonic()
    time.sleep(cut_s)
    wan.heal()
    healed_s = time.monotonic()
    together_s = wait_until(crew.store.whole, CONVERGED_S, "all sites together again", 0.05)
    answers = crew.finish(told)
    kinds: dict[str, list[Answer]] = {kind: [] for kind in KINDS}
    for (number, order), answer in zip(orders, answers, strict=True):
        at, of = crew.places[number].site, order["row"] % sites
        if not order["far"]:
            kind = "own_of_the_cut_site" if at == site else "own_of_the_others"
        else:
            kind = "across_the_cut" if site in (at, of) else "far_of_the_others"
        kinds[kind].append(answer)
    found: dict[str, Any] = {kind: _pauses(of, cut_at_s, healed_s) for kind, of in kinds.items() if of}
    rows = {order["row"]: answer for (_, order), answer in zip(orders, answers, strict=True)}
    for kind, pauses in found.items():
        click.echo(f"    {kind}: {pauses}")
    lost = _verify(crew, rows)
    click.echo(f"    together again after {together_s:.2f} s; {lost}")
    return {
        "cut": {"seconds": round(healed_s - cut_at_s, 1), "members_together_after_s": round(together_s, 2), **found},
        "lost": lost,
    }


def _pauses(answers: list[Answer], cut_s: float, healed_s: float) -> dict[str, Any]:
    """`longest_s`: the longest pause that began before the heal and ended after the cut. `back_after_s`: when the last
    of them had a write acknowledged after the heal; 0 if none had stopped.
    """
    longest_s = back_s = 0.0
    why = ""
    for answer in answers:
        for began_s, ended_s, error in answer["gaps"]:
            if ended_s < cut_s or began_s > healed_s:
                continue
            if ended_s - began_s > longest_s:
                longest_s, why = ended_s - began_s, error
            if began_s < healed_s < ended_s:
                back_s = max(back_s, ended_s - healed_s)
    return {
        "acknowledged": sum(answer["acknowledged"] for answer in answers),
        "longest_s": round(longest_s, 2),
        "first_error_then": why,
        "back_after_s": round(back_s, 2),
    }


def _verify(crew: Crew, rows: dict[int, Answer]) -> dict[str, Any]:
    """Every counter as every site reads it now, beside what was acknowledged and attempted."""
    wrong = []
    sites = len(rows) // 2
    for number in crew.first(1):
        for far in (False, True):
            of = (crew.places[number].site + far) % sites
            (looked,) = crew.order([number], "look", far=far)
            for row, answer in rows.items():
                if row % sites != of:
                    continue
                value = looked["values"].get(str(row))
                if value is None or not answer["acknowledged"] <= value <= answer["attempted"]:
                    low, high = answer["acknowledged"], answer["attempted"]
                    wrong.append(f"site {crew.places[number].site} reads {value} in row {row}, not {low} to {high}")
    acknowledged = sum(answer["acknowledged"] for answer in rows.values())
    unknown = sum(answer["attempted"] - answer["acknowledged"] for answer in rows.values())
    return {"acknowledged": acknowledged, "refused_or_unknown": unknown, "wrong": wrong}
