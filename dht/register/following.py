"""Reads and finds answered out of a follower's copy (DESIGN section 8), with how old the answer may be.

An answer is as old as the least covered of what it rests on: whatever was acknowledged before that moment is in it. So
it is what a linearizable read that began then could have returned. The caller says how old is too old; then there is no
answer, and the voters are asked. Whoever takes any age is answered also after a restart, before the copy is covered
anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from dht.domain.copy import NEVER_S, Copy
from dht.limits import FIND_ROWS_MAX, READ_GROUPS_MAX
from dht.model import (
    CATALOG_FAMILY,
    ZERO,
    Ballot,
    FindQuery,
    FindResult,
    FoundRow,
    GroupKey,
    GroupRead,
    RowKey,
    TableSpec,
)
from dht.register import catalog
from dht.register.admission import check_query
from dht.rows import encode_value, split_group_key
from dht.world import Batch, Disk

GROUPS_BYTES_MAX = 12 * 1024 * 1024
"""Of whole groups that come with a find; more are asked of the voters."""
DATABASES_KEPT_MAX = 1_000


class FollowedReads:
    """Of one copy. The tables' specs follow the catalogs that are in it."""

    def __init__(self, copy: Copy, disk: Disk) -> None:
        self._copy = copy
        self._file = copy.registers
        self._disk = disk
        self._catalog_suffix = encode_value(CATALOG_FAMILY)
        self._specs: dict[str, tuple[Ballot, tuple[TableSpec, ...]]] = {}
        copy.on_change = self._changed

    def read(self, keys: Sequence[GroupKey], known: Sequence[Ballot | None] | None) -> tuple[list[GroupRead], float]:
        """The groups as they are here, and the moment up to which they are covered; -inf: of one nothing is known."""
        groups, covered_s = [], float("inf")
        for at, key in enumerate(keys[:READ_GROUPS_MAX]):
            covered_s = min(covered_s, self._copy.covered_s(key))
            ballot = self.ballot(key)
            rows = None if known is not None and known[at] == ballot else self._rows(key)
            groups.append(GroupRead(key, ballot, rows))
        return groups, covered_s if len(groups) == len(keys) else NEVER_S

    def noted_wall_s(self, keys: Sequence[GroupKey]) -> float:
        """Up to which moment the groups are covered by what the file says, by the wall clock; 0: one never was."""
        return min(map(self._copy.noted_wall_s, keys), default=0.0)

    def noted_database_wall_s(self, database: str) -> float:
        """The same of everything of the database."""
        return self._copy.noted_prefix_wall_s(encode_value(database))

    def ballot(self, key: GroupKey) -> Ballot:
        """See `Copy.told_at`."""
        return self._copy.told_at(key)

    def covered_s(self, database: str) -> float:
        """Up to which moment everything of the database is covered."""
        return self._copy.prefix_covered_s(encode_value(database))

    def specs(self, database: str) -> tuple[TableSpec, ...]:
        """Of the database's tables, by the catalog that is here."""
        key = catalog.catalog_group(database)
        ballot, specs = self._specs.get(database, (ZERO, ()))
        if ballot != self._copy.standing(key):
            if len(self._specs) >= DATABASES_KEPT_MAX:
                self._specs.clear()
            specs = tuple(catalog.catalog_of(self._rows(key))[1])
            self._specs[database] = self._copy.standing(key), specs
        return specs

    def version(self, database: str) -> int:
        """Of the catalog that the copy has, once its indexes follow that: they are filled, each call by a piece."""
        key = catalog.catalog_group(database)
        version, specs = catalog.catalog_of(self._rows(key))
        if version != self._file.spec_version(database):
            batch = Batch()
            if self._file.fill(batch, database, specs):
                self._file.set_specs(batch, database, version, specs)
            self._disk.submit(batch)
        return self._file.spec_version(database)

    def find(self, query: FindQuery, covered_s: float | None = None) -> tuple[FindResult | None, float]:
        """The rows that match here, and how far they are covered; None where the voters have to be asked in any case.

        That is so if the catalog here is of another version, or more matches than one answer holds. `covered_s`: as far
        as the caller takes it to be. Raises Invalid if the query is not well formed.
        """
        check_query(query)
        covered_s = self.covered_s(query.database) if covered_s is None else covered_s
        if covered_s == NEVER_S or self.version(query.database) != query.catalog_version:
            return None, NEVER_S
        limit = FIND_ROWS_MAX
        if query.limit is not None and query.order is not None:
            limit = min(query.limit, FIND_ROWS_MAX)
        matches, truncated = self._file.find_local(query, None, limit)
        if truncated and limit == FIND_ROWS_MAX:
            return None, NEVER_S
        rows = tuple(FoundRow(key, self.ballot(key), rowkey, row) for key, rowkey, row in matches)
        groups: list[GroupRead] = []
        if query.whole_groups:
            room = GROUPS_BYTES_MAX
            for key in dict.fromkeys(row.group for row in rows):
                room -= self._file.header(key).size_bytes
                if room < 0:
                    return None, NEVER_S
                groups.append(GroupRead(key, self.ballot(key), self._rows(key)))
        return FindResult(rows, tuple(groups)), covered_s

    def _rows(self, key: GroupKey) -> dict[RowKey, bytes]:
        return self._file.rows(key, system=False)

    def _changed(self, keys: Sequence[GroupKey]) -> None:
        for key in keys:
            if self._catalog_suffix in key and split_group_key(key)[1:] == (CATALOG_FAMILY, ()):
                self.version(split_group_key(key)[0])
