"""The small parts: statements, values, families, id blocks, the cache of groups."""

from __future__ import annotations

import datetime
import enum
import sqlite3
from collections.abc import Callable
from typing import Any

import apsw
import pytest

from dht.errors import Invalid
from dht.model import ZERO, GroupRead
from dht.rows import encode_row, encode_value, group_key
from nova_bridge.sql import families, pages, statements
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.database import IdBlocks
from nova_bridge.sql.groups import Follows, GroupCache
from nova_bridge.sql.reads import WHOLE_ENOUGH
from nova_bridge.sql.schema import ColumnDef, IndexDef, Table, TableDef
from nova_bridge.sql.values import adapt, affinity_of, coerce
from tests.nova_bridge.sql.conftest import CountingStore

Connect = Callable[..., Connection]


@pytest.mark.parametrize(
    ("sql", "word"),
    [
        ("select 1", "SELECT"),
        ("  -- a comment\n  /* another */ INSERT INTO t", "INSERT"),
        ("", ""),
        (";", ""),
    ],
)
def test_first_word(sql: str, word: str) -> None:
    assert statements.first_word(sql) == word


@pytest.mark.parametrize(
    ("sql", "columns"),
    [
        ("INSERT INTO t VALUES (1)", None),
        ('INSERT INTO t (a, "B", `c`) VALUES (1, 2, 3)', {"a", "b", "c"}),
        ("insert or ignore into main.t(a) select 1", {"a"}),
        ("INSERT INTO t DEFAULT VALUES", set()),
        ("INSERT INTO t AS other (a) VALUES (1)", {"a"}),
        ('INSERT INTO "t"AS other DEFAULT VALUES', set()),
        ("INSERT INTO t AS other SELECT 1", None),
        ("INSERT INTO t /* (b) */ ( -- first\n a, /* and */ b) VALUES (1, 2)", {"a", "b"}),
        ("INSERT INTO 't' ('a', \"b\"\"c\", 'd''e') VALUES (1, 2, 3)", {"a", 'b"c', "d'e"}),
        ("UPDATE t SET a = 1", None),
    ],
)
def test_inserted_columns(sql: str, columns: set[str] | None) -> None:
    assert statements.inserted_columns(sql) == columns


@pytest.mark.parametrize(
    ("sql", "asks"),
    [
        ("SELECT name FROM sqlite_master", True),
        ('SELECT name FROM main."sqlite_schema" WHERE name = ?', True),
        ("SELECT * FROM pragma_table_info('t')", True),
        ("SELECT a FROM t WHERE b = 'sqlite_master'", False),
        ("SELECT a FROM t /* not sqlite_master */ WHERE b = ? -- pragma_x", False),
        ('SELECT a AS "it\'s" FROM sqlite_master', True),
    ],
)
def test_asks_for_schema(sql: str, asks: bool) -> None:
    assert statements.asks_for_schema(sql) == asks


def test_split_respects_quotes_and_comments() -> None:
    script = "CREATE TABLE \"a;b\" (x); -- one; two\nINSERT INTO t VALUES ('a;''b'); SELECT 1"
    assert list(statements.split(script)) == [
        'CREATE TABLE "a;b" (x)',
        "-- one; two\nINSERT INTO t VALUES ('a;''b')",
        "SELECT 1",
    ]


@pytest.mark.parametrize(
    ("sql", "name"),
    [
        ("SAVEPOINT sa_1", "sa_1"),
        ('RELEASE SAVEPOINT "X y"', "x y"),
        ("ROLLBACK TO s", "s"),
        ("ROLLBACK TRANSACTION TO SAVEPOINT s", "s"),
        ("ROLLBACK", None),
    ],
)
def test_savepoint_name(sql: str, name: str | None) -> None:
    assert statements.savepoint_name(sql) == name


@pytest.mark.parametrize(
    "declared", ["INTEGER", "VARCHAR(3)", "FLOAT", "DECIMAL(5)", "BLOB", "", "DATETIME", "BOOLEAN"]
)
@pytest.mark.parametrize(
    "value", [None, 1, 1.0, 1.5, "1", " 1 ", "1.0", "1e3", "x", "", "1_0", "inf", b"1", 2**62, "0x10", "+5"]
)
def test_coerce_same_as_a_stored_column(declared: str, value: Any) -> None:
    stock = sqlite3.connect(":memory:")
    stock.execute(f"CREATE TABLE t (a {declared})")
    stock.execute("INSERT INTO t VALUES (?)", (value,))
    expected = stock.execute("SELECT a FROM t").fetchone()[0]
    stock.close()
    got = coerce(affinity_of(declared), value)
    assert (type(got), got) == (type(expected), expected)


@pytest.mark.parametrize("number", [0.1 + 0.2, 1 / 3, 1e16, 2.0**53, 9.3e18, 5e-324, -1.5e300, -0.0, float("inf")])
def test_real_in_a_text_column_is_the_text_that_the_engine_compares_with(number: float) -> None:
    engine = apsw.Connection(":memory:")
    engine.execute("CREATE TABLE t (a TEXT)")
    engine.execute("INSERT INTO t VALUES (?)", (number,))
    assert coerce(affinity_of("TEXT"), number) == engine.execute("SELECT a FROM t").get
    engine.close()


class State(str, enum.Enum):
    """Whose str() is the member's name."""

    DOWN = "down"


def test_adapt_what_sqlite_adapts() -> None:
    assert adapt(True) == 1
    assert adapt(datetime.datetime(2026, 1, 2, 3, 4, 5)) == "2026-01-02 03:04:05"  # noqa: DTZ001
    assert adapt(datetime.date(2026, 1, 2)) == "2026-01-02"
    assert adapt(bytearray(b"x")) == b"x"
    assert (type(adapt(State.DOWN)), adapt(State.DOWN)) == (str, "down")
    with pytest.raises(sqlite3.ProgrammingError, match="type 'list' is not supported"):
        adapt([1])


def test_rule_of_known_table_and_of_its_batch_copy() -> None:
    columns = {"id", "uuid", "updated_at"}
    rule = families.rule_of("instances", columns)
    assert (rule.family, rule.key, rule.merge_last) == ("instance", ("uuid",), ("updated_at",))
    assert families.rule_of("_alembic_tmp_instances", columns) == rule
    assert families.rule_of("instances", {"id"}).family == families.ROW_FAMILY
    assert families.rule_of("shadow_instances", columns).family == families.ROW_FAMILY


@pytest.mark.parametrize(("family", "columns"), [("row", ()), ("quota", (1,))])
def test_spec_names_what_the_keys_of_its_groups_begin_with(family: str, columns: tuple[int, ...]) -> None:
    unique = IndexDef(1, (2,), "entry")
    named = tuple(ColumnDef(i, f"c{i}", "INTEGER") for i in (1, 2))
    definition = TableDef(7, "t", "", named, 3, (1,), False, (unique,), family=family, family_columns=columns)
    table = Table("db", definition)
    start = len(encode_value("db"))
    of_rows, of_entries = definition.spec().groups
    entry = table.entry_key(table.uniques[0], (5, 6))
    assert table.group_of((5, 6), (5,))[start:].startswith(of_rows)
    assert entry is not None
    assert entry[start:].startswith(of_entries)
    assert not group_key("db", "other", (7,))[start:].startswith((of_rows, of_entries))


def test_group_cache_evicts_by_size() -> None:
    cache = GroupCache(bytes_max=250)
    for number in range(4):
        key = bytes([number])
        cache.take(GroupRead(key, ZERO, {b"k" * 11: b"v" * 89}), None, 1)
    assert cache.get(b"\x00", 1) is None
    assert cache.get(b"\x03", 1) is not None
    assert cache.get(b"\x03", 2) is None


def test_group_cache_keeps_what_was_used_last() -> None:
    cache = GroupCache(bytes_max=250)
    reads = [GroupRead(bytes([number]), ZERO, {b"k" * 11: b"v" * 89}) for number in range(3)]
    for read in (reads[0], reads[1], reads[0], reads[2]):
        cache.take(read, cache.get(read.key, 1), 1)
    assert cache.get(reads[1].key, 1) is None
    assert cache.get(reads[0].key, 1) is not None


def test_group_at_another_ballot_only_tables_whose_rows_changed_are_decoded_again() -> None:
    columns = (ColumnDef(1, "id", "I"), ColumnDef(2, "a", "I"))
    one, other, third = [Table("db", TableDef(n, f"t{n}", "", columns, 3, (1,), True)) for n in (16, 17, 18)]

    def rows(values: dict[Table, list[int]]) -> dict[bytes, bytes]:
        return {t.pk_key((i,)): encode_row({1: i, 2: a}) for t, of in values.items() for i, a in enumerate(of)}

    cache = GroupCache()
    before = cache.take(GroupRead(b"g", ZERO, rows({one: [5, 6], other: [7], third: [8]})), None, 1)
    known = {table.number: before.records(table) for table in (one, other, third)}
    changed = rows({one: [5, 6], other: [7, 9]})
    after = cache.take(GroupRead(b"g", ZERO._replace(round=1), changed), cache.get(b"g", 1), 1)
    assert after.records(one) is known[16]
    assert [r.values for r in after.records(other).values()] == [(0, 7), (1, 9)]
    assert [r.values for r in before.records(other).values()] == [(0, 7)]
    assert after.records(third) == {}


def test_savepoint_without_begin_commits_at_release(connect: Connect) -> None:
    a = connect(isolation_level=None)
    a.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    a.execute("SAVEPOINT s")
    a.execute("INSERT INTO t VALUES (1)")
    a.execute("RELEASE s")
    assert not a.in_transaction
    assert connect().execute("SELECT * FROM t").fetchall() == [(1,)]


def test_savepoint_after_ddl_does_not_commit_at_release(connect: Connect) -> None:
    a = connect(isolation_level=None)
    a.execute("SAVEPOINT s")
    a.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    a.execute("INSERT INTO t VALUES (1)")
    a.execute("SAVEPOINT r")
    a.execute("RELEASE r")
    assert connect().execute("SELECT * FROM t").fetchall() == []
    a.execute("ROLLBACK")


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        ("COMMIT", "cannot commit - no transaction is active"),
        ("ROLLBACK", "cannot rollback - no transaction is active"),
        ("RELEASE s", "no such savepoint: s"),
        ("ATTACH 'x' AS y", "not a statement that this database runs"),
        ("SELECT * FROM", "incomplete input"),
        ("SELECT nope", "no such column"),
    ],
)
def test_wrong_statement_is_an_operational_error(connect: Connect, sql: str, error: str) -> None:
    a = connect(isolation_level=None)
    a.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    with pytest.raises(sqlite3.OperationalError, match=error):
        a.execute(sql)


def test_closed_connection_refuses(connect: Connect) -> None:
    a = connect()
    a.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        a.execute("SELECT 1")


def test_client_gone_in_mid_transaction_leaves_nothing(connect: Connect) -> None:
    a = connect(isolation_level=None)
    a.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, n TEXT UNIQUE)")
    a.execute("BEGIN")
    a.execute("INSERT INTO t (n) VALUES ('x')")
    a.close()
    b = connect(isolation_level=None)
    b.execute("INSERT INTO t (n) VALUES ('x')")
    assert b.execute("SELECT n FROM t").fetchall() == [("x",)]


def test_in_subquery_without_rows_runs_again_without_lists(connect: Connect) -> None:
    a = connect(isolation_level=None)
    a.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, n TEXT)")
    a.execute("CREATE INDEX tn ON t (n)")
    a.execute("INSERT INTO t (n) VALUES ('x')")
    assert a.execute("SELECT * FROM t WHERE n IN (SELECT n FROM t WHERE id > 5)").fetchall() == []
    assert a.execute("DELETE FROM t WHERE id IN (SELECT id FROM t WHERE n = 'y')").rowcount == 0
    assert a.execute("UPDATE t SET n = 'z' WHERE n IN (SELECT n FROM t)").rowcount == 1


def test_joined_family_comes_with_its_root(connect: Connect, store: Any) -> None:
    a = connect(isolation_level=None)
    a.execute("CREATE TABLE instances (id INTEGER PRIMARY KEY, uuid VARCHAR(36) NOT NULL UNIQUE, host TEXT)")
    a.execute("CREATE INDEX ih ON instances (host)")
    a.execute("CREATE TABLE instance_extra (id INTEGER PRIMARY KEY, instance_uuid VARCHAR(36), flavor TEXT)")
    for number in range(20):
        a.execute("INSERT INTO instances (uuid, host) VALUES (?, 'h')", (f"u{number}",))
        a.execute("INSERT INTO instance_extra (instance_uuid, flavor) VALUES (?, 'f')", (f"u{number}",))
    a.execute("BEGIN")
    store.calls.clear()
    sql = "SELECT * FROM instances i LEFT JOIN instance_extra e ON e.instance_uuid = i.uuid WHERE i.host = 'h'"
    assert len(a.execute(sql).fetchall()) == 20
    assert store.calls.count("find") == 1
    assert store.calls.count("read") <= 1  # the in-process store's own, inside find
    a.execute("ROLLBACK")
    a.execute("BEGIN")
    uuids = [row[0] for row in a.execute("SELECT uuid FROM instances WHERE host = 'h'")]
    store.calls.clear()
    for uuid in uuids:
        a.execute("SELECT * FROM instance_extra WHERE instance_uuid = ?", (uuid,)).fetchall()
    assert store.calls == ["read", "read"]


def test_row_asked_by_its_id_where_this_process_made_it_is_read_and_not_found(connect: Connect, store: Any) -> None:
    a, b = connect(isolation_level=None), connect(isolation_level=None)
    a.execute("CREATE TABLE instance_extra (id INTEGER PRIMARY KEY, instance_uuid VARCHAR(36), flavor TEXT)")
    update = "UPDATE instance_extra SET flavor = ? WHERE id = ?"
    first = a.execute("INSERT INTO instance_extra (instance_uuid) VALUES ('u1')").lastrowid
    assert a.execute(update, ("x", first)).rowcount == 1
    assert "find" in store.calls
    second, gone = [
        a.execute("INSERT INTO instance_extra (instance_uuid) VALUES (?)", (uuid,)).lastrowid for uuid in ("u2", "u3")
    ]
    store.calls.clear()
    assert a.execute(update, ("x", second)).rowcount == 1
    assert store.calls == ["read", "commit"]
    # Where it was made says nothing of where it is.
    b.execute("UPDATE instance_extra SET instance_uuid = 'u4' WHERE id = ?", (second,))
    b.execute("DELETE FROM instance_extra WHERE id = ?", (gone,))
    assert a.execute(update, ("y", second)).rowcount == 1
    assert a.execute(update, ("y", gone)).rowcount == 0
    rows = a.execute("SELECT instance_uuid, flavor FROM instance_extra WHERE id IN (?, ?)", (second, gone)).fetchall()
    assert rows == [("u4", "y")]


def test_groups_that_a_transaction_has_many_of_are_not_brought_again(connect: Connect, store: Any) -> None:
    a = connect(isolation_level=None)
    a.execute("CREATE TABLE instances (id INTEGER PRIMARY KEY, uuid VARCHAR(36) NOT NULL UNIQUE, host TEXT)")
    a.execute("CREATE TABLE instance_extra (id INTEGER PRIMARY KEY, instance_uuid VARCHAR(36), flavor TEXT)")
    for number in range(WHOLE_ENOUGH + 10):
        host = "h" if number < WHOLE_ENOUGH else "other"
        a.execute("INSERT INTO instances (uuid, host) VALUES (?, ?)", (f"u{number}", host))
        a.execute("INSERT INTO instance_extra (instance_uuid, flavor) VALUES (?, 'f')", (f"u{number}",))
    sql = "SELECT * FROM instances i LEFT JOIN instance_extra e ON e.instance_uuid = i.uuid WHERE i.host "
    a.execute("BEGIN")
    store.questions.clear()
    assert len(a.execute(f"{sql} = 'h'").fetchall()) == WHOLE_ENOUGH
    store.calls.clear()
    assert len(a.execute(f"{sql} <= 'h'").fetchall()) == WHOLE_ENOUGH
    assert store.calls == ["find"]
    assert len(a.execute(f"{sql} IN ('h', 'other')").fetchall()) == WHOLE_ENOUGH + 10
    assert store.calls == ["find", "find", "read"]
    assert [query.whole_groups for query in store.questions] == [True, False, False]


def test_answers_too_large_for_a_frame_come_in_pieces(
    connect: Connect, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = connect(isolation_level=None)
    a.execute("CREATE TABLE instances (id INTEGER PRIMARY KEY, uuid VARCHAR(36) NOT NULL UNIQUE, host TEXT)")
    a.execute("CREATE TABLE instance_extra (id INTEGER PRIMARY KEY, instance_uuid VARCHAR(36), flavor TEXT)")
    for number in range(25):
        a.execute("INSERT INTO instances (uuid, host) VALUES (?, 'h')", (f"u{number}",))
        a.execute("INSERT INTO instance_extra (instance_uuid, flavor) VALUES (?, 'f')", (f"u{number}",))
    find, read = store.find, store.read

    def small_find(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        if len(result.rows) > 4 or result.groups:
            raise Invalid("larger than a frame may be")
        return result

    def small_read(keys: Any, *arguments: Any) -> Any:
        if len(keys) > 3:
            raise Invalid("larger than a frame may be")
        return read(keys, *arguments)

    monkeypatch.setattr(store, "find", small_find)
    monkeypatch.setattr(store, "read", small_read)
    monkeypatch.setattr(pages, "PAGE_ROWS", 9)
    sql = (
        "SELECT i.uuid FROM instances i LEFT JOIN instance_extra e ON e.instance_uuid = i.uuid"
        " WHERE i.host = 'h' AND e.flavor = 'f' ORDER BY i.id DESC"
    )
    assert [row[0] for row in a.execute(sql)] == [f"u{number}" for number in reversed(range(25))]
    monkeypatch.undo()


def test_follows_believe_longer_what_keeps_coming_true() -> None:
    follows = Follows()
    assert not follows.expected("look-up")
    believed = []
    for _ in range(4):
        follows.confirm("look-up")
        follows.confirm("look-up")
        times = 0
        while follows.expected("look-up"):
            times += 1
        believed.append(times)
    assert believed == [4, 8, 16, 32]
    for _ in range(8):
        assert not follows.expected("look-up")
    follows.confirm("look-up")
    assert [follows.expected("look-up") for _ in range(5)] == [True] * 4 + [False]
    assert not follows.expected("other")


def test_id_blocks_shrink_when_others_insert_above_them(connect: Connect) -> None:
    a = connect()
    a.execute("CREATE TABLE things (id INTEGER NOT NULL PRIMARY KEY, name TEXT)")
    table = a.tx.schema.tables["things"]
    asked: list[int] = []
    following = 1

    def reserve(count: int, above: int) -> int:
        nonlocal following
        asked.append(count)
        first = max(following, above + 1)
        following = first + count
        return first

    ids = IdBlocks()
    drawn = [ids.take(table, 0, reserve) for _ in range(200)]
    assert drawn == sorted(set(drawn))
    assert asked == [1, 2, 4, 8, 16, 32, 50, 50, 50]
    asked.clear()
    for _ in range(6):
        following += 10
        assert ids.take(table, following - 1, reserve) == following - asked[-1]
    assert asked == [25, 12, 6, 3, 1, 2]


def test_look_up_whose_group_is_read_next_brings_it_along(
    connect: Callable[..., Connection], store: CountingStore
) -> None:
    a = connect()
    a.execute("CREATE TABLE instance_actions (id INTEGER NOT NULL PRIMARY KEY, request_id TEXT)")
    a.execute("CREATE INDEX by_request ON instance_actions (request_id)")
    a.execute("CREATE TABLE instance_actions_events (id INTEGER NOT NULL PRIMARY KEY, action_id INTEGER, event TEXT)")
    a.executemany("INSERT INTO instance_actions (request_id) VALUES (?)", [(f"r{n}",) for n in range(4)])
    a.commit()
    process = connect()
    calls = []
    for number in range(4):
        store.calls.clear()
        process.execute("BEGIN")
        found = process.execute("SELECT id, request_id FROM instance_actions WHERE request_id = ?", (f"r{number}",))
        process.execute("INSERT INTO instance_actions_events (action_id, event) VALUES (?, 'x')", found.fetchone()[:1])
        process.commit()
        calls.append([call for call in store.calls if call != "reserve_ids"])
    # Of the store in memory, what a find brings along counts as a read inside it.
    assert calls[-1] == ["find", "read", "commit"]
    assert [question.whole_groups for question in store.questions] == [False, True, True, True]
    assert a.execute("SELECT count(*) FROM instance_actions_events").fetchall() == [(4,)]
