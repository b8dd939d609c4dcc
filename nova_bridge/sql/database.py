"""One database as a process sees it: the store, the schema, caches and id blocks that its connections share."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import apsw
import msgspec

from dht.errors import Invalid, SchemaChanged
from dht.model import GroupKey
from dht.requests import BlockingStore
from dht.rows import group_key
from nova_bridge.sql import shadow as shadows
from nova_bridge.sql.catalog import Catalog
from nova_bridge.sql.descent import Descent
from nova_bridge.sql.groups import Follows, GroupCache, GroupView, Hints
from nova_bridge.sql.schema import Schema, Table, TableDef
from nova_bridge.sql.turns import Turns

Steps = list[Callable[[apsw.Connection], None]]
"""Statements on the shadow schema, one in each."""

ID_BLOCK_MAX = 50
"""Two of them are what a daemon takes for itself at once."""
SCHEMA_ATTEMPTS = 20


_Block = tuple[int, int, int]
"""The next id, the end of the block, how many ids it had."""


class _Own(NamedTuple):
    """The blocks of one process, by sequence, and whose turn it is to change each. Replaced as a whole."""

    pid: int
    blocks: dict[str, _Block]
    turns: dict[str, Turns]


class IdBlocks:
    """Ids reserved ahead, per table: one call to the store in up to ID_BLOCK_MAX inserts. What is left over is lost.

    Blocks grow while they are used up, and shrink when others insert into the same groups, above what a block has.
    """

    def __init__(self) -> None:
        self._own = _Own(os.getpid(), {}, {})

    def take(self, table: Table, above: int, reserve: Callable[[int, int], int]) -> int:
        """An id above `above`; `reserve(count, above)` asks the store."""

        def draw(block: _Block) -> tuple[int, _Block]:
            following, end, size = block
            unused = end - following
            following = _above(following, above, table.id_step)
            if following >= end:
                size = max(1, size // 2) if unused > 0 else min(max(1, size * 2), ID_BLOCK_MAX)
                following = reserve(size, above)
                end = following + size * table.id_step
            return following, (following + table.id_step, end, size)

        own, turns = self._turns(table)

        def drawn() -> int:
            result, own.blocks[table.sequence] = draw(own.blocks.get(table.sequence, (0, 0, 0)))
            return result

        return turns.take(drawn)

    def skip(self, table: Table, number: int) -> None:
        """An explicit id was inserted: do not give it out."""

        own, turns = self._turns(table)
        # Nobody is asked, so a question that failed meanwhile is no reason to leave the block as it is.
        with turns.lock:
            following, end, size = own.blocks.get(table.sequence, (0, 0, 0))
            own.blocks[table.sequence] = _above(following, number, table.id_step), end, size

    def _turns(self, table: Table) -> tuple[_Own, Turns]:
        own = self._own
        if own.pid != os.getpid():
            # After a fork the parent goes on drawing from the blocks that both hold, and its threads hold the turns.
            own = self._own = _Own(os.getpid(), {}, {})
        return own, own.turns.get(table.sequence) or own.turns.setdefault(table.sequence, Turns())

    def clear(self) -> None:
        """Drop all blocks."""
        self._own = _Own(os.getpid(), {}, {})


def _above(following: int, number: int, step: int) -> int:
    """The first of `following`, `following + step`, .. that is above the number."""
    return following if following > number else following + ((number - following) // step + 1) * step


class Database:
    """Thread-safe. `timeout_s` bounds each call to the store."""

    def __init__(self, store: BlockingStore, name: str, timeout_s: float | None = None) -> None:
        self.store, self.name, self.timeout_s = store, name, timeout_s
        self.groups, self.hints, self.ids = GroupCache(), Hints(), IdBlocks()
        self.follows = Follows()
        self._raised: dict[str, int] = {}
        self._reloads = Turns()
        self._lock = self._reloads.lock
        self._catalog = Catalog(store, name)
        self._schema: Schema | None = None
        self._shadow: tuple[Schema, apsw.Connection] | None = None
        self._preview: tuple[Schema, Steps, tuple[dict[str, TableDef], int, apsw.Connection]] | None = None
        self.exists = False

    @property
    def schema(self) -> Schema:
        """The newest catalog that this process knows; read from the store the first time."""
        schema = self._schema
        return schema if schema is not None else self.reload()

    @property
    def known(self) -> bool:
        """Whether this process has read the catalog."""
        return self._schema is not None

    def reload(self) -> Schema:
        """Read the catalog again."""
        return self._reloads.take(self._load)

    def _load(self) -> Schema:
        self._schema = self._catalog.load(self.timeout_s)
        self.exists = self.exists or bool(self._schema.definitions)
        return self._schema

    def catalog_for(self, store: BlockingStore) -> Catalog:
        """What this process knows of the catalog, for a store of the same content."""
        return self._catalog.on(store)

    def replace_store(self, store: BlockingStore, catalog: Catalog) -> None:
        """Go on with another store, whose catalog is known."""
        with self._lock:
            self.store, self._catalog = store, catalog.on(store)
            self._schema = None
            self.groups.clear()
            self.hints.clear()
            self.ids.clear()
            self._raised.clear()
            self.reload()

    def check_exists(self) -> None:
        """Raise when the store has no database of this name."""
        if not self.exists:
            self.exists = self.name in self.store.list_databases(self.timeout_s)
        if not self.exists:
            raise sqlite3.OperationalError(
                f"unable to open database file: there is no database {self.name!r} in this cluster; "
                f"run the service's db sync, or `lucd database create {self.name}`"
            )

    def shadow(self) -> apsw.Connection:
        """The shadow of the current schema. Only for reading, and under `shadow_lock`."""
        with self._lock:
            schema = self.schema
            if self._shadow is None or self._shadow[0] is not schema:
                self._shadow = (schema, shadows.build(schema.definitions.values()))
            return self._shadow[1]

    def query_shadow(self, run: Callable[[apsw.Connection], None]) -> None:
        """Run a query on the shadow; one at a time."""
        with self._lock:
            run(self.shadow())

    def preview(self, before: Schema, ddl: Steps) -> dict[str, TableDef]:
        """What DDL would make of the schema `before`."""
        with self._lock:
            return self._run_ddl(before, ddl)[0]

    def change(self, before: Schema, ddl: Steps, cleared: Collection[int] = ()) -> tuple[Schema, Schema]:
        """Run DDL on a copy of the shadow of `before`, the newest known, and commit what it made of the schema.

        Returns the schema that it was run on and the one that it made. Tables that go are kept as dropped ones; those
        that were `cleared` of rows are forgotten.
        """
        with self._lock:
            self._ensure_created()
            for attempt in range(SCHEMA_ATTEMPTS):
                before = self.reload() if attempt else before
                after, next_table, shadow = self._run_ddl(before, ddl)
                try:
                    return before, self._publish(before, after, next_table, shadow, cleared)
                except SchemaChanged:
                    continue
            raise SchemaChanged(f"the schema of {self.name} kept changing; run the statement again")

    def _run_ddl(self, before: Schema, ddl: Steps) -> tuple[dict[str, TableDef], int, apsw.Connection]:
        if self._preview is not None and self._preview[:2] == (before, ddl):
            return self._preview[2]
        # Another thread may have learned a newer schema; the commit finds out, and this is run on that one then.
        of_before = self.shadow() if before is self.schema else shadows.build(before.definitions.values())
        shadow = shadows.clone(of_before)
        descent = Descent(shadow, before.definitions)
        for step in ddl:
            step(shadow)
            descent.follow()
        reader = shadows.Introspection(shadow, before.definitions, before.next_table, self.home)
        result = reader.definitions(descent), reader.next_table, shadow
        self._preview = (before, ddl, result)
        return result

    def home(self) -> str:
        """Where the database lives, or will be created by the next statement: in the PoP of whoever asks."""
        return self.store.home(self.name, self.timeout_s)

    def publish(self, content: Schema) -> None:
        """Give an empty database the tables of another."""
        with self._lock:
            self._ensure_created()
            before = self.reload()
            if before.definitions:
                raise SchemaChanged(f"the database {self.name} has tables already")
            following = max(before.next_table, content.next_table)
            schema = self._catalog.replace(before, content.definitions, following, before.dropped)
            self._schema = schema

    def mark_used(self, number: int, built: Collection[int]) -> Schema:
        """Every row of the table has its entries of these indexes now: look-ups may rely on them.

        Other indexes of the table stay as they are; somebody else may be building them. What is gone meanwhile is gone.
        """
        with self._lock:
            for _ in range(SCHEMA_ATTEMPTS):
                before = self.reload()
                if number not in before.by_number:
                    return before
                definitions = dict(before.definitions)
                definition = before.by_number[number].definition
                indexes = tuple(msgspec.structs.replace(i, used=i.used or i.id in built) for i in definition.indexes)
                definitions[definition.name.lower()] = msgspec.structs.replace(definition, indexes=indexes)
                try:
                    return self._publish(before, definitions, before.next_table, self.shadow())
                except SchemaChanged:
                    continue
            raise SchemaChanged(f"the schema of {self.name} kept changing; run the statement again")

    def _publish(
        self,
        before: Schema,
        after: dict[str, TableDef],
        next_table: int,
        shadow: apsw.Connection,
        cleared: Collection[int] = (),
    ) -> Schema:
        if after == before.definitions:
            return before
        kept = {definition.number for definition in after.values()}
        dropped = {number: definition for number, definition in before.dropped.items() if number not in cleared}
        dropped |= {
            table.number: msgspec.structs.replace(table.definition, dropped=True)
            for table in before.tables.values()
            if table.number not in kept
        }
        schema = self._catalog.replace(before, after, next_table, dropped)
        self._shadow, self._schema, self._preview = (schema, shadow), schema, None
        self.groups.clear()
        return schema

    def fence(self, version: int, tables: Collection[Table]) -> None:
        """Return when no transaction made under an older catalog can change a row of the tables any more."""
        prefixes = {group_key(self.name, table.row_family, (table.number,)): None for table in tables}
        prefixes |= {group_key(self.name, t.family, ()): None for t in tables if t.family != t.row_family}
        following = 0
        while following >= 0:
            following = self.store.fence(self.name, version, tuple(prefixes), following, self.timeout_s)

    def _ensure_created(self) -> None:
        if not self.exists:
            self.store.create_database(self.name, self.timeout_s)
            self.exists = True

    def read_groups(self, keys: Sequence[GroupKey], version: int, near: bool = False) -> list[GroupView]:
        """The groups now, each at one ballot, in one call, or in more where one reply would be too large."""
        known = [self.groups.get(key, version) for key in keys]
        ballots = [None if v is None else v.ballot for v in known]
        try:
            reads = self.store.read(keys, ballots, self.timeout_s, near)
        except Invalid:
            if len(keys) < 2:
                raise
            half = len(keys) // 2
            return [*self.read_groups(keys[:half], version, near), *self.read_groups(keys[half:], version, near)]
        return [self.groups.take(read, view, version) for read, view in zip(reads, known, strict=True)]

    def next_id(self, table: Table, above: int) -> int:
        """A new id of the table's sequence, above all that its group holds."""

        def reserve(count: int, floor: int) -> int:
            try:
                return self.store.reserve_ids(self.name, table.sequence, count, floor, self.timeout_s)
            except Invalid as error:
                raise Invalid(f"there is no id for a new row of {table.name}: {error.message}") from None

        return self.ids.take(table, above, reserve)

    def raise_sequence(self, table: Table, number: int) -> None:
        """Never give out ids up to `number`."""
        if number > self._raised.get(table.sequence, 0):
            self.store.raise_sequence(self.name, table.sequence, number, self.timeout_s)
            self._raised[table.sequence] = number
            self.ids.skip(table, number)
