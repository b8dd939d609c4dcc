"""Clients that count rows up through real daemons, remember what was acknowledged, and check what they read.

Every client has a column of its own in every row and sets it to the next number, guarded by the last one, now and then
in two rows at once: clients of different daemons write the same groups all the time without conflict, and a lost,
repeated, torn or invented write shows as a wrong number, to reads and to finds. What each of the four outcomes says is
believed and then checked (`dht.errors`).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from dht.errors import Conflict, DhtError, Indeterminate
from dht.model import Change, FindQuery, Op, Part, Row, Transaction
from dht.requests import BlockingStore
from dht.rows import decode_row, group_key
from lucd.demo.daemons import LocalNode
from tests.cluster import Cluster

DATABASE = "d"
TABLE = 1
CLIENTS_MAX = 8
FIRST_COLUMN = 10
GAP_S = 0.1
LATE_S = 1.0


@dataclass
class Cell:
    """One client's counter in one row. `low` to `high`: what it may be; they differ while an outcome is unknown.

    `unknown`: the id of the transaction whose outcome that is. `told`: what the last one not applied met.
    """

    low: int = 0
    high: int = 0
    unknown: bytes = b""
    told: str = "nothing"

    def expects(self) -> str:
        """For who finds another number."""
        return f"{self.low} to {self.high}; not applied, by what was told: {self.told}"


@dataclass
class Report:
    """What a client met. `pause_s`: the longest time between two acknowledged writes.

    `gaps`: when each pause of more than GAP_S began and ended, if that is kept.
    """

    acknowledged: int = 0
    unknown: int = 0
    gave_way: int = 0
    """Transactions that ended because another held one of their groups; both began at about the same time."""
    late: int = 0
    """Those that their group had forgotten the beginning of, after they hung for more than LATE_S."""
    finds: int = 0
    pause_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)


def row_group(row: int) -> bytes:
    return group_key(DATABASE, "f", (row,))


def changed(row: int, op: Op, columns: dict[int, int], guards: dict[int, int]) -> Transaction:
    """A transaction that changes the row."""
    change = Change(op, TABLE, (row,), columns, guards)
    return Transaction(os.urandom(16), DATABASE, 0, (Part(row_group(row), None, (change,)),))


def counters(store: BlockingStore, row: int) -> dict[int, int]:
    """Column -> number, as a read says now."""
    (found,) = store.read([row_group(row)])
    assert found.rows
    (data,) = found.rows.values()
    return {column: value for column, value in decode_row(data).items() if isinstance(value, int)}


class Load:
    """`rows` rows and clients of them; use `client` threads in a with block, then `verify`."""

    def __init__(self, store: BlockingStore, rows: int = 24) -> None:
        self.rows = rows
        self.cells = [[Cell() for _ in range(CLIENTS_MAX)] for _ in range(rows)]
        store.create_database(DATABASE)
        for row in range(rows):
            zeros = {FIRST_COLUMN + client: 0 for client in range(CLIENTS_MAX)}
            store.commit(changed(row, Op.INSERT, zeros, {}))

    def verify(self, store: BlockingStore) -> list[str]:
        """What does not fit the acknowledged writes, read through one daemon."""
        wrong = []
        for row, cells in enumerate(self.cells):
            found = counters(store, row)
            for client, cell in enumerate(cells):
                value = found[FIRST_COLUMN + client]
                if not cell.low <= value <= cell.high:
                    wrong.append(f"row {row} client {client}: {value}, not {cell.expects()}")
        return wrong

    def acknowledged(self) -> int:
        return sum(cell.low for cells in self.cells for cell in cells)


class Clients:
    """Threads, one for each entry of `nodes`, that write and read until the block ends. `reports`: one for each."""

    def __init__(
        self,
        load: Load,
        nodes: Sequence[LocalNode],
        first: int = 0,
        timeout_s: float = 10.0,
        keep_gaps: bool = False,
    ) -> None:
        self.reports = [Report() for _ in nodes]
        self._keep_gaps = keep_gaps
        self._load = load
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(first + number, node, self.reports[number], timeout_s))
            for number, node in enumerate(nodes)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int, timeout_s: float = 60.0) -> None:
        """Return when every client had that many more writes acknowledged."""
        goals = [report.acknowledged + more for report in self.reports]
        deadline = time.monotonic() + timeout_s
        while any(report.acknowledged < goal for report, goal in zip(self.reports, goals, strict=True)):
            assert time.monotonic() < deadline, f"the load stands still: {self.reports}"
            time.sleep(0.02)

    @property
    def errors(self) -> list[str]:
        """What all of them met."""
        return [error for report in self.reports for error in report.errors]

    @property
    def pause_s(self) -> float:
        return max(report.pause_s for report in self.reports)

    def said(self) -> str:
        """One line for the test's output."""
        total = sum(report.acknowledged for report in self.reports)
        unknown = sum(report.unknown for report in self.reports)
        finds = sum(report.finds for report in self.reports)
        text = f"{total} writes acknowledged, {unknown} unknown, {finds} finds"
        return f"{text}, longest pause of writes {self.pause_s * 1000:.0f} ms"

    def _run(self, client: int, node: LocalNode, report: Report, timeout_s: float) -> None:
        store, chance = node.store(timeout_s), random.Random(client)
        last_s = time.monotonic()
        while not self._stop.is_set():
            row = chance.randrange(self._load.rows)
            kind = chance.random()
            try:
                if kind < 0.15:
                    self._look(store, row, report)
                    continue
                if kind < 0.2:
                    self._search(store, report)
                    continue
                rows = chance.sample(range(self._load.rows), 2) if kind < 0.3 else [row]
                if self._count_up(store, rows, client, report):
                    now_s = time.monotonic()
                    report.pause_s = max(report.pause_s, now_s - last_s)
                    if self._keep_gaps and now_s - last_s > GAP_S:
                        report.gaps.append((last_s, now_s))
                    last_s = now_s
            except DhtError as error:
                report.errors.append(f"{type(error).__name__}: {error.message}")
                time.sleep(0.02)
            except Exception as error:
                # A thread that dies silently would look like a pause without end.
                report.wrong.append(repr(error))
                return

    def _count_up(self, store: BlockingStore, rows: Sequence[int], client: int, report: Report) -> bool:
        """One write of one or several rows; whether it was acknowledged. Raises what else came."""
        cells, column = [self._load.cells[row][client] for row in rows], FIRST_COLUMN + client
        for row, cell in zip(rows, cells, strict=True):
            if cell.unknown and not self._settle(store, row, cell):
                return False
        for cell in cells:
            cell.high += 1
        parts = [
            changed(row, Op.UPDATE, {column: cell.high}, {column: cell.low}).parts[0]
            for row, cell in zip(rows, cells, strict=True)
        ]
        transaction = Transaction(os.urandom(16), DATABASE, 0, tuple(parts))
        began_s = time.monotonic()
        try:
            store.commit(transaction)
        except Indeterminate:
            for cell in cells:
                cell.unknown = transaction.id
            report.unknown += 1
            raise
        except DhtError as error:
            # Certainly not applied: the next write's guard and the reads hold it to that.
            for cell in cells:
                cell.told = f"{cell.high}, transaction {transaction.id.hex()} of rows {rows}: {error!r} {error.detail}"
                cell.high -= 1
            if not isinstance(error, Conflict):
                raise
            if len(rows) > 1 and error.detail.get("what") == "intent":
                report.gave_way += 1
                return False
            if error.detail.get("what") == "window" and time.monotonic() - began_s > LATE_S:
                # It hung on somebody for so long that its group forgot what it first saw.
                report.late += 1
                return False
            report.wrong.append(f"rows {rows}: refused although nobody else writes its column: {error.message}")
            raise
        for cell in cells:
            cell.low = cell.high
        report.acknowledged += 1
        return True

    @staticmethod
    def _settle(store: BlockingStore, row: int, cell: Cell) -> bool:
        """Ask what became of the write; whether it is known now. What is not applied by then never will be."""
        outcome = store.outcome(cell.unknown, row_group(row))
        if outcome == "unknown":
            return False
        if outcome != "applied":
            cell.told = f"{cell.high}, transaction {cell.unknown.hex()}: {outcome} when asked for later"
        cell.low = cell.high = cell.high if outcome == "applied" else cell.low
        cell.unknown = b""
        return True

    def _look(self, store: BlockingStore, row: int, report: Report) -> None:
        """A read shows every write that was acknowledged before it began, whoever's client wrote it."""
        before = [cell.low for cell in self._load.cells[row]]
        found = counters(store, row)
        self._compare(row, before, found, report)

    def _search(self, store: BlockingStore, report: Report) -> None:
        """So does a find, of all rows at once."""
        before = [[cell.low for cell in cells] for cells in self._load.cells]
        result = store.find(FindQuery(DATABASE, TABLE, 0))
        report.finds += 1
        found = {row.group: decode_row(row.row) for row in result.rows}
        for row, lows in enumerate(before):
            if row_group(row) not in found:
                report.wrong.append(f"row {row} was not found")
            else:
                self._compare(row, lows, found[row_group(row)], report)

    def _compare(self, row: int, before: list[int], found: Row, report: Report) -> None:
        after = [cell.high for cell in self._load.cells[row]]
        for client, (low, high) in enumerate(zip(before, after, strict=True)):
            value = found[FIRST_COLUMN + client]
            if not isinstance(value, int) or not low <= value <= high:
                told = self._load.cells[row][client].told
                report.wrong.append(f"read of row {row} client {client}: {value}, not {low} to {high}; {told}")


class Standstills:
    """Whether one of these daemons stood still, by its own account, for so long that the others took it for gone.

    The machine had no time for it, or was halted itself: who then hears no majority is right to refuse.
    """

    def __init__(self, nodes: Sequence[LocalNode]) -> None:
        self._nodes = list(nodes)
        self._before = self._count()

    def _count(self) -> int:
        return sum(int(node.status()["counters"]["links"]["pauses"]) for node in self._nodes)

    def unexplained(self, errors: Iterable[str]) -> list[str]:
        """Errors of clients, but for those refusals if one did."""
        stood_still = self._count() > self._before
        return [error for error in errors if not stood_still or "replicas this node hears" not in error]


def assert_whole(load: Load, cluster: Cluster) -> None:
    """Nothing acknowledged is missing and nothing refused is there, whichever daemon is asked."""
    with ExitStack() as stack:
        stack.callback(lambda: [node.close_clients() for node in cluster.nodes])
        for node in cluster.nodes:
            assert load.verify(node.store()) == [], f"through daemon {node.number}"
