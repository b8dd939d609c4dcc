"""What must hold of a database that is dropped and created again, under one name, all the time.

Each creation begins a life: what was acknowledged in it is there until it is dropped, and nothing of a former life is.
Which life it was is told by the registry, whose row has a mark of each creation. Between two reads that told of the
same one, not being dropped, it was that one all the time: that is the window of the life, in which its history is
judged as that of a database which begins empty. A transaction whose time reaches out of the window may belong to this
life, to a neighbour, or to nobody: here it may be applied or not. One that had ended before the former life was last
seen, and was told as unknown even had nobody at work on it any more, is of that life for certain, or of an older one:
here it is not applied.

The registry itself is judged by all that was answered: creations, drops, and reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from dht.model import Value
from dht.sim import oracles
from dht.sim.history import APPLIED, NOTHING, REFUSED, UNKNOWN, Commit, History, Keeping, Listed
from dht.sim.linearizability import Interval, Undecided, check

_NEVER: Final = 0


@dataclass(frozen=True, slots=True)
class Life:
    """One creation of the database, and the window in which it certainly was the one of its name."""

    mark: Value
    start: int
    end: int


def lives(history: History) -> list[Life]:
    """Those that were seen at least twice, in their order."""
    seen: dict[Value, list[Listed]] = {}
    for one in sorted(history.listed, key=lambda one: one.ret):
        if one.mark is not None and not one.dropping:
            seen.setdefault(one.mark, []).append(one)
    windows = [Life(mark, reads[0].ret, max(read.call for read in reads)) for mark, reads in seen.items()]
    return [life for life in windows if life.start < life.end]


def newest(history: History) -> History:
    """The history of the newest life. Raises ValueError where the registry never told of any."""
    every = split(history)
    if not every:
        raise ValueError("the registry never told twice of one creation of the database")
    return every[-1][1]


def judge(history: History, list_table: int) -> tuple[list[str], int]:
    """(violations, components and registries on which the search gave up)."""
    violations, undecided = registry(history)
    for number, (life, own) in enumerate(split(history), 1):
        found = [f"told at {m.call}-{m.ret} that there is none" for m in history.missed if _inside(life, m.call, m.ret)]
        found += strangers(own) + oracles.appends(own, list_table, 0) + oracles.sequences(own) + oracles.finds(own)
        broken, given_up = oracles.linearizable(own)
        undecided += given_up
        violations += [f"life {number} ({life.start}-{life.end}): {violation}" for violation in found + broken]
    return violations, undecided


# The histories of single lives.


def split(history: History) -> list[tuple[Life, History]]:
    """Each life with its history."""
    every = lives(history)
    ends = [_NEVER, *(life.end for life in every)]
    return [(life, _history_of(history, life, before)) for life, before in zip(every, ends, strict=False)]


def _inside(life: Life, call: int, ret: int | None) -> bool:
    return ret is not None and life.start < call and ret < life.end


def _history_of(history: History, life: Life, before: int) -> History:
    """`before`: when the former life was last seen."""
    own = History(history.moment, history.times_s)
    own.reads = [r for r in history.reads if r.content is not None and _inside(life, r.call, r.ret)]
    own.finds = [f for f in history.finds if f.result is not None and _inside(life, f.call, f.ret)]
    own.commits = [kept for c in history.commits if (kept := _commit_in(history, c, life, before)) is not None]
    versions = {p.version for p in history.published if _inside(life, p.call, p.ret)}
    names = {f"ids{version}" for version in versions}
    own.draws = [d for d in history.draws if d.sequence[1] in names and _inside(life, d.call, d.ret)]
    own.raises = [r for r in history.raises if r.sequence[1] in names and _inside(life, r.call, r.ret)]
    return own


def _commit_in(history: History, commit: Commit, life: Life, before: int) -> Commit | None:
    """The commit as the life has it, None where it is certainly not applied in it."""
    if commit.outcome == NOTHING or commit.call >= life.end:
        return None
    if _inside(life, commit.call, commit.ret):
        return commit
    if commit.outcome == REFUSED:
        return None
    if before != _NEVER and _over(history, commit, before):
        return None
    return replace(commit, outcome=UNKNOWN, ret=None)


def _over(history: History, commit: Commit, moment: int) -> bool:
    """Whether the commit had ended by then, and nobody was at work on it any more."""
    if commit.ret is None or commit.ret > moment:
        return False
    return commit.outcome == APPLIED or commit.until_s <= history.time_of(moment)


def strangers(own: History) -> list[str]:
    """Values that were read in a life and that no transaction that may have been applied in it has written."""
    written = {
        (part.key, change.table, change.pk, column, value)
        for commit in own.commits
        if commit.outcome != REFUSED
        for part in commit.transaction.parts
        for change in part.changes
        for column, value in change.columns.items()
    }
    out = []
    for read in own.reads:
        for (table, pk), columns in read.content or ():
            strange = [value for column, value in columns if (read.key, table, pk, column, value) not in written]
            if strange:
                group = oracles.group_name(read.key)
                out.append(f"{read.client} read {strange[0]!r} in {group} at {read.call}, of another life")
    return out


# The registry.


class _Registry(NamedTuple):
    """`mark`: None until a read tells it. `number`: counts creations. `begun`: drops under way, and of which one."""

    status: str = "free"
    mark: Value = None
    number: int = 0
    used: frozenset[Value] = frozenset()
    begun: frozenset[tuple[int, int]] = frozenset()


_Step = Callable[[Any], _Registry | None]


def registry(history: History) -> tuple[list[str], int]:
    """One order of all creations, drops and reads, from a database that is there, in which each gave its answer.

    A drop has two steps: the database is being dropped; then its name is free. Anybody may do the second.
    """
    intervals = [Interval(r.call, r.ret, _listed(r), f"{r.client} read {_shown(r)}") for r in history.listed]
    for number, keeping in enumerate(history.keepings):
        intervals += _kept(number, keeping)
    try:
        stuck = check(intervals, _Registry("here"))
    except Undecided:
        return [], 1
    if stuck is None:
        return [], 0
    shown = "; ".join(f"[{one.call}-{one.ret}] {one.label}" for one in stuck[:3])
    return [f"the registry is not linearizable; no order takes in {shown}"], 0


def _shown(one: Listed) -> str:
    if one.mark is None:
        return "that the name is free"
    return f"of {one.mark!r}" + (", being dropped" if one.dropping else "")


def _kept(number: int, keeping: Keeping) -> list[Interval]:
    changed, label = keeping.changed, f"{keeping.client} {'drop' if keeping.drops else 'create'}: {keeping.changed}"
    ret = None if changed is None else keeping.ret
    if not keeping.drops:
        return [Interval(keeping.call, ret, _exists if changed is False else _created, label)]
    if changed is False:
        return [Interval(keeping.call, ret, _freed, label)]
    begin = Interval(keeping.call, ret, lambda state: _dropping(number, state), f"{label}, begun")
    return [begin] if changed is None else [begin, Interval(keeping.call, ret, lambda s: _dropped(number, s), label)]


def _listed(one: Listed) -> _Step:
    def step(state: _Registry) -> _Registry | None:
        if one.mark is None:
            return _freed(state)
        if state.status != ("going" if one.dropping else "here"):
            return None
        if state.mark is None and one.mark not in state.used:
            return state._replace(mark=one.mark, used=state.used | {one.mark})
        return state if state.mark == one.mark else None

    return step


def _freed(state: _Registry) -> _Registry | None:
    return None if state.status == "here" else state._replace(status="free", mark=None)


def _exists(state: _Registry) -> _Registry | None:
    return state if state.status == "here" else None


def _created(state: _Registry) -> _Registry | None:
    if state.status == "here":
        return None
    return state._replace(status="here", mark=None, number=state.number + 1)


def _dropping(number: int, state: _Registry) -> _Registry | None:
    if state.status == "free":
        return None
    return state._replace(status="going", begun=state.begun | {(number, state.number)})


def _dropped(number: int, state: _Registry) -> _Registry | None:
    of = next((of for at, of in state.begun if at == number), None)
    if of is None:
        return None
    left = state._replace(begun=state.begun - {(number, of)})
    return _freed(left) if of == state.number else left
