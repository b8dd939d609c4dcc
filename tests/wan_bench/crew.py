"""The controllers of all sites as the benchmark commands them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.wan.sites import Wan
from tests.wan_bench.stores import Store

Answer = dict[str, Any]
WARM_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """A controller: its site, and its number there."""

    site: int
    number: int

    @property
    def name(self) -> str:
        return f"s{self.site}c{self.number}"


class Crew:
    """`each` controllers at each site of the WAN, with rows of their own in the store; a context manager."""

    def __init__(self, wan: Wan, store: Store, each: int) -> None:
        self.store = store
        sites = len(wan.sites)
        self.places = [Place(site, number) for number in range(each) for site in range(sites)]
        """The first of each site come first: the crew of one controller per site is its beginning."""
        specs = [
            {
                "pid": wan.sites[place.site].pid,
                "name": place.name,
                "url": store.url(place.site, place.site, place.number),
                "far_url": store.url(place.site, (place.site + 1) % sites, place.number),
            }
            for place in self.places
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.wan_bench.controllers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._say(specs)
        self._hear()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _say(self, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("bench-wan: the controllers ended; see their error above")
        return json.loads(line)

    def first(self, each: int) -> list[int]:
        """The numbers of the first `each` controllers of every site."""
        return [number for number, place in enumerate(self.places) if place.number < each]

    def order(self, to: Sequence[int], do: str, **what: object) -> list[Answer]:
        """Tell these controllers, and wait for all their answers; see `finish`."""
        return self.finish(self.begin([(number, {"do": do, **what}) for number in to]))

    def begin(self, orders: Sequence[tuple[int, Answer]]) -> Sequence[tuple[int, Answer]]:
        """Send each controller its own order, to be waited for by `finish`."""
        self._say(orders)
        return orders

    def finish(self, orders: Sequence[tuple[int, Answer]]) -> list[Answer]:
        """The answers. Raises SystemExit with the error of one that failed."""
        answers: list[Answer] = self._hear()
        to, do = [number for number, _ in orders], orders[0][1]["do"]
        failed = [(n, answer["failed"]) for n, answer in zip(to, answers, strict=True) if "failed" in answer]
        if failed:
            number, why = failed[0]
            raise SystemExit(
                f"bench-wan: {do} failed at {len(failed)} of {len(to)} controllers of {self.store.name}, "
                f"first {self.places[number].name}: {why}"
            )
        return answers

    def prepare(self) -> None:
        """Schemas, then rows for each controller, each one's far row, and an instance each: what Nova and SQLAlchemy
        compile at the first use of a statement, a conductor has done long ago.
        """
        shared = self.store.shared
        self.order([0] if shared else self.first(1), "sync")
        # Nova makes a project's security group with its first instance, and is not made for two that do it at once.
        before = [0] if shared else self.first(1)
        rest = [number for number in range(len(self.places)) if number not in before]
        made = [*self.order(before, "fill"), *(self.order(rest, "fill") if rest else [])]
        rows = {self.places[number]: answer["instances"] for number, answer in zip([*before, *rest], made, strict=True)}
        sites = 1 + max(place.site for place in self.places)
        for number, place in enumerate(self.places):
            neighbour = Place((place.site + 1) % sites, place.number)
            self.order([number], "meet", row=rows[neighbour][-1])
        self.order(range(len(self.places)), "life", count=1, seconds_max=WARM_S_MAX)
