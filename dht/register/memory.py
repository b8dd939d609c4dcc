"""The store in one process, without replicas: for unit tests of what is built on it (`lucd+memory://`).

It uses the very rules of the real store (`dht.register.group`) over the very file layout, on a disk in memory, so that
outcomes and errors are those of a cluster. Calls come from any thread; one lock makes each of them atomic.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dht.errors import Conflict, DhtError, Duplicate, Indeterminate, Invalid
from dht.limits import FIND_ROWS_MAX
from dht.model import (
    Applied,
    Ballot,
    FindQuery,
    FindResult,
    FoundRow,
    GroupKey,
    GroupRead,
    Part,
    Transaction,
    TransactionId,
)
from dht.register import catalog, group
from dht.register.admission import check_query, check_transaction
from dht.register.group import APPLIED, REFUSED, Delta, GroupState
from dht.rows import is_local, split_group_key
from dht.storage.memory import MemoryDisk
from dht.storage.registers import Header, RegisterFile
from dht.world import Batch

_STATES_KEPT = 2_000


class MemoryStore:
    """`dht.requests.BlockingStore`. `timeout_s` is taken and not needed: nothing here waits for anybody."""

    def __init__(self, disk: MemoryDisk | None = None) -> None:
        self._disk = disk or MemoryDisk()
        self._file = RegisterFile(self._disk)
        self._lock = threading.RLock()
        self._states: dict[GroupKey, GroupState] = {}
        self._round = self._last_round()

    def clone(self) -> MemoryStore:
        """An independent store with the same content; cheap, for fixtures that start many tests from one state."""
        with self._lock:
            return MemoryStore(self._disk.clone())

    def _last_round(self) -> int:
        newest = 0
        for tablet in range(64):
            for key in self._file.keys(tablet):
                newest = max(newest, self._file.header(key).accepted.round)
        return newest

    def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        with self._lock:
            out = []
            for index, key in enumerate(keys):
                state = self._state(key)
                same = known is not None and known[index] == state.ballot
                out.append(GroupRead(key, state.ballot, None if same else state.data()))
            return tuple(out)

    def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        check_query(query)
        with self._lock:
            self._check_catalog(query.database, query.catalog_version)
            matches, truncated = self._file.find_local(query, None, FIND_ROWS_MAX)
            if truncated and (query.order is None or query.limit is None or query.limit > FIND_ROWS_MAX):
                raise Invalid(f"more than {FIND_ROWS_MAX} rows match; ask with narrower conditions or in pieces")
            rows = tuple(FoundRow(key, self._state(key).ballot, rowkey, row) for key, rowkey, row in matches)
            groups: tuple[GroupRead, ...] = ()
            if query.whole_groups:
                groups = self.read(list(dict.fromkeys(row.group for row in rows)))
            return FindResult(rows, groups)

    def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        check_transaction(transaction)
        with self._lock:
            self._check_catalog(transaction.database, transaction.catalog_version)
            return self._commit(transaction, attempt)

    def _commit(self, transaction: Transaction, attempt: int) -> Applied:
        ballot = self._next_ballot()
        recorded: list[Ballot] = []
        deltas: list[tuple[GroupKey, GroupState, Delta]] = []
        try:
            for index, part in enumerate(transaction.parts):
                state = self._state(part.key)
                found = group.recall(state, transaction.id, self._seen(part, state, attempt), attempt)
                if found is not None:
                    recorded.append(found[0])
                else:
                    deltas.append((part.key, state, group.evaluate(state, part, index)))
        except Conflict as refusal:
            if attempt:
                self._record_refusal(transaction, ballot, refusal)
            raise
        if recorded and not deltas:
            return Applied(tuple(recorded))
        for key, state, delta in deltas:
            group.remember(state, delta, transaction.id, ballot, APPLIED)
            self._write(key, state, delta, ballot)
        self._learn(transaction)
        return Applied((ballot,) * len(transaction.parts))

    @staticmethod
    def _seen(part: Part, state: GroupState, attempt: int) -> Ballot | None:
        """A first attempt arrives once and at once here, so one that saw nothing sees the group now."""
        return state.ballot if part.seen is None and not attempt else part.seen

    def _record_refusal(self, transaction: Transaction, ballot: Ballot, refusal: DhtError) -> None:
        for part in transaction.parts:
            state = self._state(part.key)
            if transaction.id not in state.window:
                delta: Delta = {}
                group.remember(state, delta, transaction.id, ballot, REFUSED, refusal)
                self._write(part.key, state, delta, ballot)

    def _write(self, key: GroupKey, state: GroupState, delta: Delta, ballot: Ballot) -> None:
        state.apply(delta)
        state.ballot = ballot
        batch = Batch()
        header = Header(ballot, ballot, ballot, group.digest_bytes(state.digest), state.deleted)
        self._file.write(batch, key, header, delta)
        self._disk.submit(batch)

    def _state(self, key: GroupKey) -> GroupState:
        state = self._states.get(key)
        if state is None:
            if len(self._states) >= _STATES_KEPT:
                self._states.clear()
            state = GroupState(self._file.rows(key), self._file.header(key).accepted)
            self._states[key] = state
        return state

    def _next_ballot(self) -> Ballot:
        self._round += 1
        return Ballot(1, 1, self._round, b"memory", 1, self._round)

    # The catalog, databases and sequences.

    def _check_catalog(self, database: str, version: int) -> None:
        if catalog.registry_row(database) not in self._state(catalog.REGISTRY_GROUP).rows:
            raise catalog.no_such_database(database)
        current = self._file.spec_version(database)
        if version and version < current:
            raise catalog.schema_changed(database, version, current)

    def _learn(self, transaction: Transaction) -> None:
        key = catalog.catalog_group(transaction.database)
        if any(part.key == key for part in transaction.parts):
            version, specs = catalog.catalog_of(self._state(key).data())
            batch = Batch()
            self._file.set_specs(batch, transaction.database, version, specs)
            self._disk.submit(batch)

    def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        with self._lock:
            try:
                found = group.recall(self._state(key), id, seen, 1)
            except Indeterminate:
                return "unknown"
            except DhtError:
                return "not_applied"
            return "applied" if found is not None and found[1] == APPLIED else "not_applied"

    def reserve_ids(self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None) -> int:
        catalog.check_count(count)
        with self._lock:
            self._check_catalog(database, 0)
            current = catalog.sequence_next(self._state(catalog.sequence_group(database, name)).data())
            first = max(current or 1, above + 1)
            self._move_sequence(database, name, current, first + count)
            return first

    def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        with self._lock:
            self._check_catalog(database, 0)
            current = catalog.sequence_next(self._state(catalog.sequence_group(database, name)).data())
            if above >= (current or 1):
                self._move_sequence(database, name, current, above + 1)

    def _move_sequence(self, database: str, name: str, current: int | None, following: int) -> None:
        key = catalog.sequence_group(database, name)
        state = self._state(key)
        self._write(
            key, state, group.evaluate(state, catalog.sequence_moved(key, current, following)), self._next_ballot()
        )

    def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        """Nothing is ever on its way here: a commit is compared with the catalog and applied in one step."""
        return -1

    def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        with self._lock:
            return catalog.at_home(self._state(catalog.REGISTRY_GROUP).data())

    def home(self, database: str, timeout_s: float | None = None) -> str:
        return self.homes(timeout_s).get(database, "")

    def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        with self._lock:
            return catalog.homes_of(self._state(catalog.REGISTRY_GROUP).data())

    def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool:
        catalog.check_database_name(name)
        with self._lock:
            state = self._state(catalog.REGISTRY_GROUP)
            try:
                delta = group.evaluate(state, catalog.database_added(name, b"%d" % self._round, home))
            except Duplicate:
                return False
            self._write(catalog.REGISTRY_GROUP, state, delta, self._next_ballot())
            return True

    def drop_database(self, name: str, timeout_s: float | None = None, home: str | None = None) -> bool:
        """In one step: nobody ever meets a database that is being dropped."""
        with self._lock:
            state = self._state(catalog.REGISTRY_GROUP)
            row = catalog.registered(state.data()).get(name)
            if row is None or home not in (None, row.home):
                return False
            self._write(catalog.REGISTRY_GROUP, state, {catalog.registry_row(name): None}, self._next_ballot())
            for tablet in range(64):
                for key in self._file.keys(tablet):
                    if split_group_key(key)[0] != name or (catalog.is_sequence(key) and is_local(key)):
                        continue
                    if key != catalog.catalog_group(name):
                        batch = Batch()
                        self._file.erase(batch, key)
                        self._disk.submit(batch)
                        self._states.pop(key, None)
            key = catalog.catalog_group(name)
            state = self._state(key)
            if state.data():
                self._write(key, state, catalog.emptied(key, state.data()), self._next_ballot())
            version, _ = catalog.catalog_of(state.data())
            batch = Batch()
            self._file.set_specs(batch, name, version, ())
            self._disk.submit(batch)
            return True
