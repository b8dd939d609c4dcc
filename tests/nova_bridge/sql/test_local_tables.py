"""Tables whose rows live in the PoP that made them: what CREATE TABLE makes of them, and what is asked for them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

import pytest

from dht.errors import Invalid
from dht.limits import IDS_APART, SPANNING_ID_MAX
from dht.model import ZERO, Applied, Ballot, GroupKey, GroupRead, Reading, Scope, Transaction
from dht.register.catalog import sequence_group
from dht.register.local_ids import jump_ids
from dht.rows import group_key, is_local
from nova_bridge.sql import families, plan
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.database import Database, _above
from nova_bridge.sql.repair import check
from tests.nova_bridge.sql.conftest import NAME, CountingStore

MAPPINGS = """CREATE TABLE instance_mappings (
    id INTEGER PRIMARY KEY, instance_uuid VARCHAR(36) NOT NULL, cell_id INTEGER REFERENCES cell_mappings(id),
    project_id VARCHAR(255), CONSTRAINT u UNIQUE (instance_uuid))"""
CELLS = "CREATE TABLE cell_mappings (id INTEGER PRIMARY KEY, uuid VARCHAR(36) NOT NULL UNIQUE, name VARCHAR(255))"


class SpanningStore(CountingStore):
    """The store of a database whose home spans PoPs, where all is in this one; notes what is asked of it."""

    def __init__(self, home: str = "global") -> None:
        super().__init__()
        self.lives = home
        self.read_near: list[tuple[GroupKey, bool]] = []
        self.committed: list[Transaction] = []
        self.behind = b""
        self.elsewhere = b""

    def home(self, database: str, timeout_s: float | None = None) -> str:
        return self.lives

    def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        self.read_near += [(key, near) for key in keys if is_local(key)]
        found = super().read(keys, known, timeout_s)
        hidden = (self.behind, self.elsewhere if near else b"")
        return tuple(GroupRead(g.key, ZERO, {}) if g.key in hidden else g for g in found)

    def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        self.committed.append(transaction)
        return super().commit(transaction, attempt, timeout_s)


@pytest.fixture
def store() -> SpanningStore:
    return SpanningStore()


def test_local_family_counts_only_where_the_database_spans_pops() -> None:
    columns = {"id", "instance_uuid", "project_id"}
    here = families.rule_of("instance_mappings", columns)
    assert (here.family, here.home, here.read, here.root) == ("instance_mapping", "", 0, False)
    spanning = families.rule_of("instance_mappings", columns, "global")
    assert (spanning.family, spanning.home, spanning.root) == ("~instance_mapping", "local", True)
    assert spanning.read == Reading.PARTIAL_OK
    assert families.rule_of("_alembic_tmp_instance_mappings", columns, "global") == spanning


def test_unsaid_home_is_the_databases_and_a_whole_family_is_never_local() -> None:
    assert families.rule_of("anything", {"id"}, "global").home == ""
    anything = families.rule_of("anything", {"id"}, "local")
    assert (anything.family, anything.home, anything.root) == ("~row", "local", True)
    assert families.rule_of("flavors", {"id"}, "local").home == ""
    assert families.rule_of("flavors", {"id"}, "global").read == Reading.FOLLOW | Reading.SERVE_STALE
    extra = families.rule_of("instance_extra", {"instance_uuid"}, "local")
    assert (extra.family, extra.root) == ("~instance", False)


def test_group_of_a_local_family_is_told_by_its_key() -> None:
    assert is_local(group_key(NAME, "~instance_mapping", ("u",)))
    assert is_local(group_key(NAME, "~row", (16, 1)))
    assert not is_local(group_key(NAME, "instance_mapping", ("~",)))
    assert not is_local(group_key("~", "x", ()))


def test_unique_key_over_local_rows_is_refused_unless_it_is_declared_or_holds_the_family_key(
    connect: Callable[..., Connection], store: SpanningStore
) -> None:
    connection = connect()
    connection.execute(CELLS)
    connection.execute(MAPPINGS)
    store.lives = "local"
    connection.execute("CREATE TABLE consumers (id INTEGER PRIMARY KEY, uuid VARCHAR(36) UNIQUE)")
    with pytest.raises(sqlite3.NotSupportedError, match=r"services .* \(host\): name it under `local` in families"):
        connection.execute("CREATE TABLE services (id INTEGER PRIMARY KEY, host VARCHAR(36) UNIQUE)")
    assert "services" not in connection.database.reload().tables


def test_insert_asks_only_the_own_pop_and_says_that_it_makes_the_group(
    connect: Callable[..., Connection], store: SpanningStore
) -> None:
    connection = connect()
    connection.execute(CELLS)
    connection.execute(MAPPINGS)
    connection.execute("INSERT INTO cell_mappings (uuid, name) VALUES ('c', 'one')")
    connection.commit()
    connection.execute("INSERT INTO instance_mappings (instance_uuid, cell_id, project_id) VALUES ('u', 1, 'p')")
    connection.commit()
    key = group_key(NAME, "~instance_mapping", ("u",))
    assert store.read_near == [(key, True)]
    assert [q.scope for q in store.questions if q.scope is not Scope.HOME] == []
    made = store.committed[-1]
    assert made.created == (0,)
    assert [part.key for part in made.parts] == [key]
    # What is there already is changed, not made.
    connection.execute("UPDATE instance_mappings SET project_id = 'q' WHERE instance_uuid = 'u'")
    connection.commit()
    assert store.read_near[1:] == [(key, False)]
    assert store.committed[-1].created == ()


def test_parent_that_a_copy_does_not_have_yet_is_asked_of_the_voters(
    connect: Callable[..., Connection], store: SpanningStore
) -> None:
    first, second = connect(), connect()
    first.execute(CELLS)
    first.execute(MAPPINGS)
    first.execute("INSERT INTO cell_mappings (uuid) VALUES ('c')")
    first.commit()
    store.behind = group_key(NAME, "cell", ())
    second.execute("INSERT INTO instance_mappings (instance_uuid, cell_id) VALUES ('u', 1)")
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        second.execute("INSERT INTO instance_mappings (instance_uuid, cell_id) VALUES ('v', 2)")
    second.commit()
    assert first.execute("SELECT instance_uuid FROM instance_mappings").fetchall() == [("u",)]


@pytest.mark.parametrize("failed", [True, False])
def test_group_whose_insert_is_undone_is_looked_for_everywhere_by_a_read(
    connect: Callable[..., Connection], store: SpanningStore, failed: bool
) -> None:
    connection, other = connect(), Connection(Database(store, NAME), "", False)
    connection.execute(CELLS)
    connection.execute(MAPPINGS)
    other.execute("INSERT INTO instance_mappings (instance_uuid, project_id) VALUES ('u', 'p')")
    other.commit()
    other.close()
    store.elsewhere = group_key(NAME, "~instance_mapping", ("u",))
    connection.execute("INSERT INTO instance_mappings (instance_uuid) VALUES ('v')")
    if failed:
        with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
            connection.execute("INSERT INTO instance_mappings (instance_uuid, cell_id) VALUES ('u', 9)")
    else:
        connection.execute("SAVEPOINT s")
        connection.execute("INSERT INTO instance_mappings (instance_uuid) VALUES ('u')")
        connection.execute("ROLLBACK TO SAVEPOINT s")
    store.read_near.clear()
    select = "SELECT project_id FROM instance_mappings WHERE instance_uuid = '{}'"
    assert connection.execute(select.format("v")).fetchall() == [(None,)]
    assert store.read_near == [], "what is made stays as it was met"
    assert connection.execute(select.format("u")).fetchall() == [("p",)]
    connection.execute("UPDATE instance_mappings SET project_id = 'q' WHERE instance_uuid = 'u'")
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        connection.execute("INSERT INTO instance_mappings (instance_uuid) VALUES ('u')")


def test_group_that_the_process_has_seen_is_looked_for_everywhere_before_a_row_is_inserted(
    connect: Callable[..., Connection], store: SpanningStore
) -> None:
    connection = connect(foreign_keys=False)
    connection.execute(MAPPINGS)
    connection.execute("INSERT INTO instance_mappings (instance_uuid) VALUES ('u')")
    connection.commit()
    assert connection.execute("SELECT count(*) FROM instance_mappings WHERE instance_uuid = 'u'").fetchone() == (1,)
    store.read_near.clear()
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        connection.execute("INSERT INTO instance_mappings (instance_uuid) VALUES ('u')")
    assert store.read_near == [(group_key(NAME, "~instance_mapping", ("u",)), False)]


def test_scan_may_leave_pops_out_but_no_look_up_and_no_statement_that_writes(
    connect: Callable[..., Connection], store: SpanningStore
) -> None:
    connection = connect(foreign_keys=False)
    connection.execute(MAPPINGS)
    for number, statement in enumerate(
        (
            "SELECT * FROM instance_mappings WHERE project_id = 'p'",
            "SELECT count(*) FROM instance_mappings",
            "SELECT * FROM instance_mappings WHERE id = 5",
            "SELECT * FROM instance_mappings WHERE id IN (5, 6)",
            "DELETE FROM instance_mappings WHERE project_id = 'p'",
            "UPDATE instance_mappings SET cell_id = 1 WHERE project_id = 'r'",
        )
    ):
        store.questions.clear()
        connection.execute(statement)
        wanted = [Scope.REACHABLE] if number < 2 else [Scope.NEAR, Scope.POPS] if " id " in statement else [Scope.POPS]
        assert [q.scope for q in store.questions] == wanted, statement


def test_long_list_of_keys_is_a_look_up_too(
    connect: Callable[..., Connection], store: SpanningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connect(foreign_keys=False)
    connection.execute(MAPPINGS)
    monkeypatch.setattr(plan, "PRODUCT_MAX", 1)
    connection.execute("SELECT * FROM instance_mappings WHERE instance_uuid IN ('u', 'v')").fetchall()
    assert [q.scope for q in store.questions] == [Scope.POPS]


def test_copy_of_a_row_into_its_group_makes_no_group(connect: Callable[..., Connection], store: SpanningStore) -> None:
    connection = connect(foreign_keys=False)
    connection.execute(MAPPINGS)
    connection.execute(MAPPINGS.replace("instance_mappings", "_alembic_tmp_instance_mappings"))
    connection.execute("INSERT INTO instance_mappings (instance_uuid) VALUES ('u')")
    connection.commit()
    connection.execute("INSERT INTO _alembic_tmp_instance_mappings SELECT * FROM instance_mappings")
    connection.commit()
    assert [len(sent.created) for sent in store.committed[-2:]] == [1, 0]


def test_ids_of_local_tables_are_drawn_in_steps(connect: Callable[..., Connection], store: SpanningStore) -> None:
    connection = connect(foreign_keys=False)
    connection.execute(MAPPINGS)
    asked: list[tuple[str, int, int]] = []

    def reserve_ids(database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None) -> int:
        first = 7 + IDS_APART * (1 + sum(count for _, count, _ in asked))
        asked.append((name, count, above))
        return first

    store.reserve_ids = reserve_ids  # type: ignore[method-assign]
    for number in range(5):
        connection.execute("INSERT INTO instance_mappings (instance_uuid) VALUES (?)", (f"u{number}",))
    connection.commit()
    found = [n for (n,) in connection.execute("SELECT id FROM instance_mappings ORDER BY id").fetchall()]
    assert found == [7 + IDS_APART * k for k in range(1, 6)]
    assert {name for name, _, _ in asked} == {f"~{connection.database.schema.tables['instance_mappings'].number}"}


def test_lost_sequence_of_a_local_table_is_raised_by_what_a_recovery_leaves_out_of_it(
    connect: Callable[..., Connection], store: SpanningStore
) -> None:
    connection = connect(foreign_keys=False)
    connection.execute(MAPPINGS)
    connection.execute("INSERT INTO instance_mappings (id, instance_uuid) VALUES (?, 'u')", (7 + 500 * IDS_APART,))
    connection.commit()
    raised: list[int] = []

    def raise_sequence(database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        raised.append(above)

    store.raise_sequence = raise_sequence  # type: ignore[method-assign]
    store.behind = sequence_group(NAME, connection.database.schema.tables["instance_mappings"].sequence)
    (text,) = check(Database(store, NAME), repair=True)
    assert "a row has id 128007" in text
    assert raised == [(500 + jump_ids(store.behind, 501)) * IDS_APART]
    assert raised[0] < SPANNING_ID_MAX


@pytest.mark.parametrize(
    ("following", "number", "step", "first"), [(5, 4, 1, 5), (5, 5, 1, 6), (263, 262, 256, 263), (263, 263, 256, 519)]
)
def test_next_id_of_a_block_above_a_number(following: int, number: int, step: int, first: int) -> None:
    assert _above(following, number, step) == first


def test_database_of_one_pop_knows_nothing_of_homes(connect: Callable[..., Connection], store: SpanningStore) -> None:
    store.lives = "lyon"
    connection = connect(foreign_keys=False)
    connection.execute(MAPPINGS)
    connection.execute("INSERT INTO instance_mappings (instance_uuid) VALUES ('u')")
    connection.commit()
    assert connection.database.schema.tables["instance_mappings"].family == "instance_mapping"
    assert not store.read_near
    assert store.committed[-1].created == ()


def test_second_process_has_the_homes_from_the_catalog(store: SpanningStore) -> None:
    first = Connection(Database(store, NAME), "", False)
    first.execute(MAPPINGS)
    store.lives = ""
    second = Connection(Database(store, NAME), "", False)
    table = second.database.schema.tables["instance_mappings"]
    assert (table.local, table.root, table.family) == (True, True, "~instance_mapping")
    second.execute("ALTER TABLE instance_mappings ADD COLUMN more INTEGER")
    assert second.database.schema.tables["instance_mappings"].local
    first.close()
    second.close()


def test_made_once_key_of_a_build_request_and_of_no_mapping():
    assert families.made_once(group_key("nova_api", "~build_request", ("u",)))
    assert not families.made_once(group_key("nova_api", "build_request", ("u",)))
    assert not families.made_once(group_key("nova_api", "~host_mapping", ("h",)))


def test_scan_that_learns_of_a_newer_catalog_still_leaves_out_pops_out_of_reach(
    connect: Callable[..., Connection], store: SpanningStore
) -> None:
    a, b = connect(), connect(isolation_level=None)
    a.execute(CELLS)
    a.execute(MAPPINGS)
    b.execute("SELECT id FROM instance_mappings")
    a.execute("CREATE TABLE other (id INTEGER NOT NULL PRIMARY KEY)")
    store.questions.clear()
    b.execute("SELECT id FROM instance_mappings")
    assert [q.scope for q in store.questions] == [Scope.REACHABLE, Scope.REACHABLE]


def test_insert_where_the_ids_are_used_up_names_the_table(
    monkeypatch: pytest.MonkeyPatch, store: CountingStore, connect: Callable[..., Connection]
) -> None:
    """The store knows the table by its number alone."""
    connection = connect()
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x INTEGER)")

    def used_up(*asked: object) -> int:
        raise Invalid("the ids of table 16 of cell are used up")

    monkeypatch.setattr(store, "reserve_ids", used_up)
    with pytest.raises(sqlite3.DataError, match="no id for a new row of t: the ids of table 16 of cell are used up"):
        connection.execute("INSERT INTO t (x) VALUES (1)")
