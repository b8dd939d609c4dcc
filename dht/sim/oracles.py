"""What must hold of every history. Each oracle returns violations as sentences; an empty list is a pass.

Linearizability is checked per component: the groups that some transaction joins share one state, so atomicity and
first-committer-wins across groups are part of it. It is exact and may give up on entangled histories; the others are
linear in the history's length and always decide.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from dht.model import Comparison, Constraint, FindQuery, GroupKey, Op, Transaction, TransactionId, Value
from dht.rows import decode_row, split_group_key, split_row_key
from dht.sim.history import (
    APPLIED,
    EMPTY,
    NOTHING,
    REFUSED,
    UNKNOWN,
    Commit,
    Content,
    Find,
    History,
    RowName,
    after_part,
    content_of,
)
from dht.sim.linearizability import STATES_MAX, Interval, Undecided, check

_FOREVER = 1 << 60


def linearizable(history: History, states_max: int = STATES_MAX) -> tuple[list[str], int]:
    """(violations, components on which the search gave up)."""
    violations: list[str] = []
    undecided = 0
    for keys in components(history):
        operations = _intervals(history, keys)
        try:
            stuck = check(operations, (EMPTY,) * len(keys), states_max)
        except Undecided:
            undecided += 1
            continue
        if stuck is not None:
            names = ", ".join(group_name(key) for key in keys)
            shown = "\n    ".join(f"[{o.call}-{o.ret}] {o.label}" for o in stuck[:3])
            violations.append(f"not linearizable: groups {names}; no order takes in\n    {shown}")
    return violations, undecided


def group_name(key: GroupKey) -> str:
    return "/".join(str(v) for v in (*split_group_key(key)[1:2], *split_group_key(key)[2]))


def components(history: History) -> list[tuple[GroupKey, ...]]:
    """The groups, joined where a transaction touched several."""
    leader: dict[GroupKey, GroupKey] = {}

    def find(key: GroupKey) -> GroupKey:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for read in history.reads:
        find(read.key)
    for commit in history.commits:
        first = find(commit.transaction.parts[0].key)
        for part in commit.transaction.parts[1:]:
            leader[find(part.key)] = first
    together: dict[GroupKey, list[GroupKey]] = {}
    for key in leader:
        together.setdefault(find(key), []).append(key)
    return [tuple(keys) for keys in together.values()]


def _intervals(history: History, keys: tuple[GroupKey, ...]) -> list[Interval]:
    place = {key: i for i, key in enumerate(keys)}
    tables = {(p.key, change.table) for c in history.commits for p in c.transaction.parts for change in p.changes}
    out = [
        Interval(
            r.call,
            r.ret,
            _read_step(place[r.key], r.content),
            f"{r.client} read {group_name(r.key)}: {_show(r.content)}",
        )
        for r in history.reads
        if r.content is not None and r.key in place
    ]
    for find in history.finds:
        if find.result is not None and find.ret is not None:
            for key, i in place.items():
                if (key, find.query.table) in tables:
                    step, label = _find_step(i, find, key)
                    out.append(Interval(find.call, find.ret, step, f"{find.client} find in {group_name(key)}: {label}"))
    for commit in history.commits:
        if commit.transaction.parts[0].key not in place or commit.outcome == NOTHING:
            continue
        ret = None if commit.outcome == UNKNOWN else commit.ret
        step = _refused_step(commit, place) if commit.outcome == REFUSED else _commit_step(commit, place)
        out.append(Interval(commit.call, ret, step, f"{commit.client} {show_commit(commit)}"))
    return out


def _show(content: Content | None) -> str:
    rows = sorted(content or (), key=repr)
    return "; ".join(f"{name[1]}={dict(sorted(columns, key=repr))}" for name, columns in rows) or "no rows"


def show_commit(commit: Commit) -> str:
    """One line for traces and reports."""
    parts = []
    for part in commit.transaction.parts:
        changes = ", ".join(
            f"{c.op.name} {c.pk} {c.columns or ''}{f' if {c.guards}' if c.guards else ''}" for c in part.changes
        )
        parts.append(f"{group_name(part.key)}: {changes}{f' + {len(part.guards)} guards' if part.guards else ''}")
    return f"commit {commit.transaction.id.hex()[:6]} {commit.outcome} ({' | '.join(parts)})"


def _read_step(at: int, content: Content) -> Callable[[Any], Any]:
    return lambda state: state if state[at] == content else None


def _find_step(at: int, find: Find, key: GroupKey) -> tuple[Callable[[Any], Any], str]:
    """A find reads each group at one moment: what it found is what matches there (or some of it, if cut)."""
    assert find.result is not None
    found = content_of({row.key: row.row for row in find.result.rows if row.group == key})
    cut = find.query.limit is not None

    def step(state: Any) -> Any:
        there = frozenset(
            (name, columns)
            for name, columns in state[at]
            if name[0] == find.query.table and matches(find.query, dict(columns))
        )
        return state if (found <= there if cut else found == there) else None

    return step, f"{find.query.constraints} gives {_show(found)}"


def _commit_step(commit: Commit, place: dict[GroupKey, int]) -> Callable[[Any], Any]:
    known: dict[Any, Any] = {}

    def step(state: Any) -> Any:
        if state not in known:
            known[state] = _after(state, commit.transaction, place)
        return known[state]

    return step


def _after(state: tuple[Content, ...], transaction: Transaction, place: dict[GroupKey, int]) -> Any:
    out = list(state)
    for part in transaction.parts:
        content = after_part(state[place[part.key]], part)
        if content is None:
            return None
        out[place[part.key]] = content
    return tuple(out)


def _refused_step(commit: Commit, place: dict[GroupKey, int]) -> Callable[[Any], Any]:
    part = commit.transaction.parts[commit.refused_part]
    return lambda state: state if after_part(state[place[part.key]], part) is None else None


# Append lists: one column that grows by one unique element per commit, written with the old value as guard.


def appends(history: History, table: int, column: int) -> list[str]:
    """Every version of a list is a prefix of every longer one, and no one sees less than was acknowledged before.

    A list is text of unique elements, each ended by a comma.
    """
    violations: list[str] = []
    views: dict[GroupKey, list[_View]] = {}
    for read in history.reads:
        if read.content is not None and read.ret is not None:
            views.setdefault(read.key, []).append((_list_of(read.content, table, column), read.call, read.ret))
    for commit in history.commits:
        if commit.outcome == APPLIED and commit.ret is not None:
            for part in commit.transaction.parts:
                for change in part.changes:
                    if change.table == table and isinstance(text := change.columns.get(column), str):
                        views.setdefault(part.key, []).append((text, commit.call, commit.ret))
    for group, seen in views.items():
        violations += [f"list {group_name(group)}: {v}" for v in _prefix_violations(seen)]
    return violations + fractured(history, table, column)


_View = tuple[str, int, int]
"""(the list as seen or written, call, return)"""


def _list_of(content: Content, table: int, column: int) -> str:
    for (t, _), columns in content:
        if t == table:
            return str(dict(columns).get(column, ""))
    return ""


def _prefix_violations(seen: list[_View]) -> list[str]:
    longest = max((text for text, _, _ in seen), key=len)
    out = [f"{text!r} is no prefix of {longest!r}: a fork" for text, _, _ in seen if not longest.startswith(text)][:3]
    finished = sorted((ret, text) for text, _, ret in seen)
    at, known = 0, ""
    for text, call, _ in sorted(seen, key=lambda view: view[1]):
        while at < len(finished) and finished[at][0] < call:
            known = max(known, finished[at][1], key=len)
            at += 1
        if len(text) < len(known):
            out.append(f"{text!r} was seen after {known!r} had been acknowledged or read")
            break
    return out


def fractured(history: History, table: int, column: int) -> list[str]:
    """Look for cycles between transactions, as Elle infers them from lists (Adya's G1c and G-single).

    Every commit reads the lists that it extends, so the version order of a list is an order of its transactions; a
    cycle means that two lists order the same transactions differently.
    """
    order: dict[GroupKey, list[str]] = {}
    for read in history.reads:
        if read.content is not None:
            text = _list_of(read.content, table, column)
            if len(text) > sum(len(e) + 1 for e in order.get(read.key, ())):
                order[read.key] = text.rstrip(",").split(",")
    place = {(key, element): i for key, elements in order.items() for i, element in enumerate(elements)}
    writers: dict[TransactionId, list[tuple[GroupKey, int]]] = {}
    owner: dict[tuple[GroupKey, int], TransactionId] = {}
    for commit in history.commits:
        id = commit.transaction.id
        for part in commit.transaction.parts:
            for change in part.changes:
                value = change.columns.get(column)
                if change.table == table and isinstance(value, str) and value:
                    position = place.get((part.key, value.rstrip(",").rsplit(",", 1)[-1]))
                    if position is not None:
                        writers.setdefault(id, []).append((part.key, position))
                        owner[part.key, position] = id
    edges = {id: [owner[key, i + 1] for key, i in places if (key, i + 1) in owner] for id, places in writers.items()}
    cycle = _cycle(edges)
    return [] if cycle is None else [f"transactions in a cycle: {' -> '.join(id.hex()[:6] for id in cycle)}"]


def _cycle(edges: dict[TransactionId, list[TransactionId]]) -> list[TransactionId] | None:
    colour: dict[TransactionId, int] = {}
    for root, first in edges.items():
        if root in colour:
            continue
        path, stack = [root], [iter(first)]
        colour[root] = 1
        while stack:
            for following in stack[-1]:
                if following == path[-1]:
                    continue
                if colour.get(following) == 1:
                    return [*path[path.index(following) :], following]
                if following not in colour:
                    colour[following] = 1
                    path.append(following)
                    stack.append(iter(edges.get(following, [])))
                    break
            else:
                colour[path.pop()] = 2
                stack.pop()
    return None


def atomic(history: History, final: dict[GroupKey, Content], table: int, column: int) -> list[str]:
    """At the end a transaction's elements stand in all of its lists or in none; those of applied ones stand."""
    lists = {key: set(_list_of(content, table, column).split(",")) for key, content in final.items()}
    out = []
    for commit in history.commits:
        standing, wanted = 0, 0
        for part in commit.transaction.parts:
            for change in part.changes:
                text = change.columns.get(column)
                if change.table == table and isinstance(text, str) and text and part.key in lists:
                    wanted += 1
                    standing += text.rstrip(",").rsplit(",", 1)[-1] in lists[part.key]
        if standing not in (0, wanted):
            out.append(f"{show_commit(commit)} stands in {standing} of its {wanted} lists")
        elif wanted and not standing and commit.outcome == APPLIED:
            out.append(f"{show_commit(commit)} was acknowledged and is gone")
        elif standing and commit.outcome in (REFUSED, NOTHING):
            out.append(f"{show_commit(commit)} was reported as certainly not applied and stands")
    return out


# Unique entries, sequences, finds.


def unique_entries(final: dict[GroupKey, Content], table: int, column: int, entry_table: int) -> list[str]:
    """At the end each row's unique value has exactly one entry, which names the row, and no entry lacks its row."""
    entries: dict[Value, Value] = {}
    rows: dict[Value, list[Value]] = {}
    for content in final.values():
        for (t, pk), columns in content:
            if t == entry_table:
                entries[pk[0]] = dict(columns).get(0)
            elif t == table and (value := dict(columns).get(column)) is not None:
                rows.setdefault(value, []).append(pk[0])
    out = [f"value {value!r} is in {len(pks)} rows: {pks}" for value, pks in rows.items() if len(pks) > 1]
    out += [
        f"row {pks[0]!r} has value {value!r}, its entry names {entries.get(value)!r}"
        for value, pks in rows.items()
        if entries.get(value) != pks[0]
    ]
    out += [f"entry {value!r} names {pk!r}, which has it not" for value, pk in entries.items() if value not in rows]
    return out


def sequences(history: History) -> list[str]:
    """Ids never repeat, exceed what they were to exceed, and exceed what was raised before at the same machine.

    Blocks that other nodes hold when a sequence is raised are theirs: they are not recalled.
    """
    out: list[str] = []
    for draw in history.draws:
        if draw.first is not None and draw.first <= draw.above:
            out.append(f"{draw.client} drew {draw.first} of {draw.sequence}, not above {draw.above}")
    spans = sorted((d.sequence, d.first, d.count) for d in history.draws if d.first is not None)
    for (s1, f1, c1), (s2, f2, _) in pairwise(spans):
        if s1 == s2 and f2 < f1 + c1:
            out.append(f"ids from {f2} of {s1} overlap the {c1} ids from {f1}")
    for raised in history.raises:
        if not raised.done or raised.ret is None:
            continue
        for draw in history.draws:
            low = draw.first is not None and draw.first <= raised.above
            here = draw.sequence == raised.sequence and draw.machine == raised.machine
            if low and here and draw.call > raised.ret:
                out.append(f"{draw.client} drew {draw.first} after the sequence was raised above {raised.above}")
    return out


def finds(history: History) -> list[str]:
    """A find returns each row whose presence was settled during it, none that was settled absent, and no invention.

    `linearizable` takes finds in more sharply, but may give up; this one always decides, and names the row.
    Settled: the last acknowledged change of the row returned before the find began, and no other change of it,
    acknowledged or unknown, overlaps both.
    """
    changes = _changes_by_row(history)
    out: list[str] = []
    for find in history.finds:
        if find.result is not None and find.ret is not None:
            out += _find_violations(find, changes)
    return out


_RowChange = tuple[int, int, Commit, dict[int, Value] | None, Op]


def _changes_by_row(history: History) -> dict[tuple[GroupKey, RowName], list[_RowChange]]:
    changes: dict[tuple[GroupKey, RowName], list[_RowChange]] = {}
    for commit in history.commits:
        if commit.outcome not in (APPLIED, UNKNOWN):
            continue
        ret = commit.ret if commit.outcome == APPLIED and commit.ret is not None else _FOREVER
        for part in commit.transaction.parts:
            for change in part.changes:
                columns = None if change.op == Op.DELETE else dict(change.columns)
                changes.setdefault((part.key, (change.table, change.pk)), []).append(
                    (commit.call, ret, commit, columns, change.op)
                )
    return changes


def _find_violations(find: Find, changes: dict[tuple[GroupKey, RowName], list[_RowChange]]) -> list[str]:
    assert find.result is not None
    out: list[str] = []
    found: dict[tuple[GroupKey, RowName], dict[int, Value]] = {}
    for hit in find.result.rows:
        place = (hit.group, split_row_key(hit.key))
        row = found[place] = decode_row(hit.row)
        if place not in changes:
            out.append(f"{find.client} found row {place[1]}, which nobody wrote")
        if not matches(find.query, row):
            out.append(f"{find.client} found row {place[1]} = {row}, which does not match {find.query.constraints}")
    if len(found) < len(find.result.rows):
        out.append(f"{find.client} found a row twice")
    for place, row_changes in changes.items():
        name = place[1]
        settled, left = _settled(row_changes, find) if name[0] == find.query.table else (False, None)
        if not settled:
            continue
        expected = left if left is not None and matches(find.query, left) else None
        cut = find.query.limit is not None and len(found) >= find.query.limit and place not in found
        if not cut and found.get(place) != expected:
            out.append(f"{find.client} found row {name} as {found.get(place)}, settled as {left} before {find.call}")
    return out


def _settled(row_changes: list[_RowChange], find: Find) -> tuple[bool, dict[int, Value] | None]:
    """Whether all changes up to the find are ordered by time, and the row that they leave."""
    assert find.ret is not None
    relevant = sorted((c for c in row_changes if c[0] < find.ret), key=lambda c: c[0])
    end = -1
    row: dict[int, Value] | None = None
    for call, ret, _, columns, op in relevant:
        if call < end or ret > find.call:
            return False, None
        end = ret
        row = {**(row or {}), **(columns or {})} if op == Op.UPDATE else columns
    return True, row


def matches(query: FindQuery, row: dict[int, Value]) -> bool:
    return all(_holds(constraint, row.get(constraint.column)) for constraint in query.constraints)


def _holds(constraint: Constraint, value: Any) -> bool:
    match constraint.comparison:
        case Comparison.IS_NULL:
            return value is None
        case Comparison.NOT_NULL:
            return value is not None
        case Comparison.IS_NOT:
            return bool(value != constraint.values[0])
        case Comparison.EQ_OR_NULL:
            return value is None or bool(value == constraint.values[0])
    if value is None:
        return False
    wanted: Any = constraint.values
    tests: dict[Comparison, Callable[[], bool]] = {
        Comparison.EQ: lambda: value == wanted[0],
        Comparison.NE: lambda: value != wanted[0],
        Comparison.IN: lambda: value in wanted,
        Comparison.LT: lambda: value < wanted[0],
        Comparison.LE: lambda: value <= wanted[0],
        Comparison.GT: lambda: value > wanted[0],
        Comparison.GE: lambda: value >= wanted[0],
    }
    return tests[constraint.comparison]()
