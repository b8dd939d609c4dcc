"""Is there one order of the operations, fitting real time, in which each gave the answer that it gave?

The search of Wing and Gong with Lowe's memoisation: try operations that began before the first one still missing
returned, remember (set of operations done, state) and never enter the same pair twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

STATES_MAX = 400_000

Step = Callable[[Any], Hashable | None]
"""state -> the state after the operation, or None when its answer does not fit that state."""


@dataclass(frozen=True, slots=True)
class Interval:
    """One operation. `ret` None: it never answered, so it may take effect at any time after `call`, or never."""

    call: int
    ret: int | None
    step: Step
    label: str = ""


class Undecided(Exception):
    """The search met STATES_MAX states without an answer."""


def check(operations: Sequence[Interval], initial: Hashable, states_max: int = STATES_MAX) -> list[Interval] | None:
    """None when an order exists; else the operations that the longest order found could not take in.

    Raises Undecided when the history is too entangled to tell.
    """
    return _Search(operations, initial, states_max).run()


class _Search:
    """Events form a doubly linked list; taking an operation lifts its call and its return out of the list."""

    def __init__(self, operations: Sequence[Interval], initial: Hashable, states_max: int) -> None:
        self.operations = operations
        self.states_max = states_max
        events = [(o.call, 0, i) for i, o in enumerate(operations)]
        events += [(o.ret, 1, i) for i, o in enumerate(operations) if o.ret is not None]
        events.sort()
        self.is_call = [kind == 0 for _, kind, _ in events]
        self.owner = [i for _, _, i in events]
        self.return_of = {i: at for at, (_, kind, i) in enumerate(events) if kind == 1}
        self.after = [*range(1, len(events)), -1] if events else []
        self.before = list(range(-1, len(events) - 1))
        self.head = 0 if events else -1
        self.must = sum(1 << i for i in self.return_of)
        self.state = initial

    def lift(self, at: int, operation: int) -> None:
        for j in (at, self.return_of.get(operation, -1)):
            if j < 0:
                continue
            p, q = self.before[j], self.after[j]
            if p >= 0:
                self.after[p] = q
            else:
                self.head = q
            if q >= 0:
                self.before[q] = p

    def unlift(self, at: int, operation: int) -> None:
        for j in (self.return_of.get(operation, -1), at):
            if j < 0:
                continue
            p, q = self.before[j], self.after[j]
            if p >= 0:
                self.after[p] = j
            else:
                self.head = j
            if q >= 0:
                self.before[q] = j

    def run(self) -> list[Interval] | None:
        done, best = 0, 0
        seen: set[tuple[int, Hashable]] = set()
        stack: list[tuple[int, int, Hashable, int]] = []
        at = self.head
        while done & self.must != self.must:
            if at >= 0 and self.is_call[at]:
                i = self.owner[at]
                after = self.operations[i].step(self.state)
                futile = after is None or (self.operations[i].ret is None and after == self.state)
                if not futile and (done | 1 << i, after) not in seen:
                    seen.add((done | 1 << i, after))
                    if len(seen) > self.states_max:
                        raise Undecided(f"more than {self.states_max} states")
                    stack.append((at, i, self.state, done))
                    self.state, done = after, done | 1 << i
                    if (done & self.must).bit_count() > (best & self.must).bit_count():
                        best = done
                    self.lift(at, i)
                    at = self.head
                else:
                    at = self.after[at]
            elif stack:
                at, i, self.state, done = stack.pop()
                self.unlift(at, i)
                at = self.after[at]
            else:
                return [o for i, o in enumerate(self.operations) if o.ret is not None and not best >> i & 1]
        return None
