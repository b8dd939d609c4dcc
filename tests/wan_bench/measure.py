"""The measurements of one cell of the matrix: a store on so many sites, so far apart, with so many controllers each.

Times of single transactions are taken in turns: one controller works, then the one of the next site, while all others
stand still. All sites of the benchmark share the processors of one machine, and their waiting for it would hide what
each would wait for the WAN. What is done by all together says so, and what it used of the processors.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.bench.calls import CALLS
from tests.wan.sites import Wan
from tests.wan_bench.crew import Answer, Crew
from tests.wan_bench.stores import cpu_ms

IDLE_S = 5.0
WARM_TIMES = 2
CROWDED = ("together", "share", "life")
Result = dict[str, Any]
SINGLE = ("home_update", "home_read", "far_read", "far_update")


def _summary(walls: Sequence[float]) -> Result:
    ordered = sorted(walls)
    return {
        "count": len(ordered),
        "p50_ms": round(statistics.median(ordered), 2),
        "p95_ms": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
    }


class Cell:
    """`each`: controllers of a site that take part. `seconds`: a measurement's limit at one site."""

    def __init__(self, wan: Wan, crew: Crew, each: int, times: int, seconds: float) -> None:
        self._wan = wan
        self._crew = crew
        self._store = crew.store
        self._all = crew.first(each)
        self._firsts = crew.first(1)
        self._times = times
        self._seconds = seconds

    def has(self, part: str) -> bool:
        """Single transactions are measured with one controller a site, requests to the store on several of lucd's."""
        if len(self._all) > len(self._firsts):
            return part in CROWDED
        return part != "store" or (not self._store.shared and len(self._firsts) > 1)

    def _watched(self, act: Callable[[], list[Answer]]) -> tuple[list[Answer], Result]:
        """What came of it, and what it took: seconds, CPU of clients and servers, packets between the sites."""
        cpu, traffic, began_s = cpu_ms(self._store), self._wan.traffic(), time.monotonic()
        answers = act()
        took_s = time.monotonic() - began_s
        carried = self._wan.traffic() - traffic
        return answers, {
            "seconds": round(took_s, 2),
            "client_cpu_ms": round(1000 * sum(answer["cpu_s"] for answer in answers), 1),
            "server_cpu_ms": round(cpu_ms(self._store) - cpu, 1),
            "wan_packets": carried.packets,
            "wan_bytes": carried.bytes,
            "load": round(os.getloadavg()[0], 1),
        }

    @staticmethod
    def _busy(cost: Result) -> dict[str, float]:
        """The share of the machine's processors that controllers and servers used."""
        used_s = (cost["client_cpu_ms"] + cost["server_cpu_ms"]) / 1000
        return {"busy": round(used_s / cost["seconds"] / (os.cpu_count() or 1), 2)}

    def _changed(self, before: dict[str, object]) -> dict[str, int]:
        now = self._store.state()
        return {name: value - before[name] for name, value in now.items() if value != before[name]}  # type: ignore

    def idle(self) -> Result:
        """What the store sends between the sites while nobody asks anything."""
        before = self._store.state()
        _, cost = self._watched(lambda: time.sleep(IDLE_S) or [])
        frames = self._changed(before).get("link_frames", 0)
        rate = {"frames_per_s": round(frames / cost["seconds"], 1)} if frames else {}
        rate |= {"packets_per_s": round(cost["wan_packets"] / cost["seconds"], 1)}
        return rate | {
            "bytes_per_s": round(cost["wan_bytes"] / cost["seconds"]),
            "server_cpu_share": round(cost["server_cpu_ms"] / 1000 / cost["seconds"], 3),
        }

    def in_turns(self, do: str, at: Sequence[int] = (), **what: object) -> Result:
        """One transaction after the other, at the first controller of one site after the other, or of these sites."""
        chosen = [number for number in self._firsts if not at or self._crew.places[number].site in at]
        for number in chosen:
            self._crew.order([number], do, times=WARM_TIMES, seconds_max=self._seconds, **what)
        before = self._store.state()
        answers, cost = self._watched(
            lambda: [
                self._crew.order([number], do, times=self._times, seconds_max=self._seconds, **what)[0]
                for number in chosen
            ]
        )
        walls = [answer["wall_ms"] for answer in answers]
        count = sum(map(len, walls))
        return (
            _summary([wall for site in walls for wall in site])
            | {"by_site_ms": [round(statistics.median(site), 2) for site in walls]}
            | cost
            | {
                "cpu_ms_each": round((cost["client_cpu_ms"] + cost["server_cpu_ms"]) / count, 2),
                "changed": self._changed(before),
            }
        )

    def calls(self) -> Result:
        """The hot calls of a boot, in turns, at the first two sites and the last: there are many calls."""
        found = {}
        for name in CALLS:
            got = self.in_turns("call", (0, 1, len(self._firsts) - 1), name=name)
            found[name] = {key: got[key] for key in ("p50_ms", "by_site_ms", "count", "cpu_ms_each")}
        return found

    def store(self) -> Result:
        """Single requests to lucd's store, in turns: kind -> what each took."""
        answers = [self._crew.order([number], "store", times=self._times)[0]["kinds"] for number in self._firsts]
        return {kind: _summary([wall for answer in answers for wall in answer[kind]]) for kind in answers[0]}

    def together(self) -> Result:
        """Updates at home by all controllers at once, as fast as each can."""
        answers, cost = self._watched(
            lambda: self._crew.order(self._all, "home_update", times=100_000, seconds_max=self._seconds)
        )
        walls = [wall for answer in answers for wall in answer["wall_ms"]]
        span_s = max(a["ended_s"] for a in answers) - min(a["began_s"] for a in answers)
        return (
            _summary(walls)
            | cost
            | {
                "per_s": round(len(walls) / span_s, 1),
                "cpu_ms_each": round((cost["client_cpu_ms"] + cost["server_cpu_ms"]) / len(walls), 2),
            }
        )

    def life(self, instances: int, seconds_max: float) -> Result:
        """So many instances from creation to end, spread evenly over all controllers, which work at once."""
        return self._lives(self._all, instances, seconds_max)

    def share(self, instances: int, seconds_max: float) -> Result:
        """The last site's share of the instances, by its controllers, while the other sites stand still.

        On one machine this is how long a site takes that has processors of its own.
        """
        last = max(place.site for place in self._crew.places)
        mine = [number for number in self._all if self._crew.places[number].site == last]
        return self._lives(mine, round(instances * len(mine) / len(self._all)), seconds_max)

    def _lives(self, who: Sequence[int], instances: int, seconds_max: float) -> Result:
        shares = [instances // len(who) + (number < instances % len(who)) for number in range(len(who))]
        busy = [(number, share) for number, share in zip(who, shares, strict=True) if share]
        orders = [(number, {"do": "life", "count": share, "seconds_max": seconds_max}) for number, share in busy]
        answers, cost = self._watched(lambda: self._crew.finish(self._crew.begin(orders)))
        done = [len(answer["wall_ms"]) for answer in answers]
        took = [answer["ended_s"] - answer["began_s"] for answer in answers]
        # A controller that ran out of time would have gone on as fast.
        whole = [seconds * share / count for seconds, count, (_, share) in zip(took, done, busy, strict=True)]
        walls = [wall for answer in answers for wall in answer["wall_ms"]]
        return (
            _summary(walls)
            | cost
            | self._busy(cost)
            | {
                "instances": instances,
                "done": sum(done),
                "total_s": round(max(whole), 1),
                "projected": sum(done) < instances,
                "cpu_ms_each": round((cost["client_cpu_ms"] + cost["server_cpu_ms"]) / sum(done), 1),
            }
        )
