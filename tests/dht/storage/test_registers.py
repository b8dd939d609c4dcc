"""RegisterFile: headers, rows and indexes against a model that has none."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.errors import StorageError
from dht.model import (
    SYSTEM_INTENT,
    SYSTEM_META,
    SYSTEM_WINDOW,
    ZERO,
    Ballot,
    Comparison,
    Constraint,
    FindQuery,
    IndexSpec,
    Order,
    Row,
    TableSpec,
    Value,
)
from dht.rows import (
    decode_row,
    decode_values,
    encode_row,
    encode_value,
    encode_values,
    group_key,
    row_key,
    table_prefix,
    tablet_of,
)
from dht.storage.memory import MemoryDisk
from dht.storage.registers import ABSENT, Header, RegisterFile
from dht.world import Batch, Space

B1 = Ballot(1, 1, 1, b"n", 1, 1)
B2 = Ballot(1, 1, 2, b"n", 1, 2)
SETTLED = Header(B1, B1, B1, b"d" * 16)
OPEN = Header(B2, B2, B1, b"e" * 16)
SPEC = TableSpec(1, (0,), (IndexSpec(1, (1, 2)), IndexSpec(2, (3,)), IndexSpec(3, (2, 0))))


def group(number: int, database: str = "db") -> bytes:
    return group_key(database, "f", (number,))


def put(
    file: RegisterFile, disk: MemoryDisk, key: bytes, delta: dict[bytes, bytes | None], header: Header = SETTLED
) -> Header:
    batch = Batch()
    stored = file.write(batch, key, header, delta)
    disk.submit(batch)
    return stored


def make(specs: tuple[TableSpec, ...] = (SPEC,)) -> tuple[MemoryDisk, RegisterFile]:
    disk = MemoryDisk()
    file = RegisterFile(disk)
    batch = Batch()
    file.set_specs(batch, "db", 1, specs)
    disk.submit(batch)
    return disk, file


def row(*values: Value) -> bytes:
    return encode_row(dict(enumerate(values)))


def rows_found(file: RegisterFile, *constraints: Constraint, **options: object) -> list[Row]:
    found, _ = file.find_local(FindQuery("db", 1, 1, constraints, **options), None, None)  # type: ignore[arg-type]
    return [decode_row(data) for _, _, data in found]


def test_header_of_unknown_register_is_absent() -> None:
    _, file = make()
    assert file.header(group(1)) == ABSENT
    assert file.header(group(1)).promise == ZERO
    assert file.rows(group(1)) == {}


def test_write_then_reopen_gives_header_rows_and_specs() -> None:
    disk, file = make()
    stored = put(file, disk, group(1), {row_key(1, (1,)): row(1, "a"), row_key(SYSTEM_INTENT, (b"t",)): b"x"}, OPEN)
    again = RegisterFile(disk)
    assert again.header(group(1)) == stored
    assert (stored.intents, stored.accepted, stored.chosen) == (1, B2, B1)
    assert stored.size_bytes == sum(len(k) + len(v) for k, v in again.rows(group(1)).items())
    assert again.row(group(1), row_key(1, (1,))) == row(1, "a")
    assert again.spec_version("db") == 1
    assert again.spec_version("other") == 0


def test_write_of_row_that_changes_moves_its_index_entries() -> None:
    disk, file = make()
    put(file, disk, group(1), {row_key(1, (1,)): row(1, "a", 5)})
    put(file, disk, group(1), {row_key(1, (1,)): row(1, "b", 5)})
    assert rows_found(file, Constraint(1, Comparison.EQ, ("a",))) == []
    assert rows_found(file, Constraint(1, Comparison.EQ, ("b",))) == [{0: 1, 1: "b", 2: 5}]
    put(file, disk, group(1), {row_key(1, (1,)): None})
    assert disk.range(Space.INDEX, b"", None) == []
    assert file.header(group(1)).size_bytes == 0


def test_rows_of_the_store_and_those_of_the_application_are_read_apart() -> None:
    disk, file = make()
    own = {row_key(SYSTEM_META, ()): b"floor", row_key(SYSTEM_WINDOW, (b"t",)): b"entry"}
    others = {row_key(0, ()): row(0), row_key(1, (1,)): row(1, "a"), row_key(2**40, (2,)): row(2)}
    put(file, disk, group(1), {**own, **others})
    assert file.rows(group(1)) == {**own, **others}
    assert file.rows(group(1), system=True) == own
    assert file.rows(group(1), system=False) == others


def test_replace_and_erase_leave_nothing_behind() -> None:
    disk, file = make()
    put(file, disk, group(1), {row_key(1, (n,)): row(n, "a") for n in range(5)})
    batch = Batch()
    file.replace(batch, group(1), SETTLED, {row_key(1, (9,)): row(9, "z")})
    disk.submit(batch)
    assert rows_found(file) == [{0: 9, 1: "z"}]
    batch = Batch()
    file.erase(batch, group(1))
    disk.submit(batch)
    assert file.header(group(1)) == ABSENT
    for space in (Space.INDEX, Space.ROW, Space.REGISTER):
        assert disk.range(space, b"", None) == []


def test_keys_lists_groups_of_a_tablet_in_pages() -> None:
    disk, file = make()
    for number in range(300):
        put(file, disk, group(number), {})
    tablet = tablet_of(group(0), 64)
    expected = sorted(group(n) for n in range(300) if tablet_of(group(n), 64) == tablet)
    assert file.keys(tablet) == expected
    assert file.keys(tablet, limit=1) == expected[:1]
    assert file.keys(tablet, expected[0]) == expected[1:]


def test_headers_of_a_tablet_in_pages_and_up_to_a_key_are_those_of_its_keys_with_their_marks() -> None:
    disk, file = make()
    for number in range(200):
        put(file, disk, group(number), {}, OPEN if number % 3 else SETTLED)
    tablet = tablet_of(group(0), 64)
    keys = file.keys(tablet)
    assert len(keys) > 2
    file.mark(next(key for key in keys if file.header(key).accepted == B2), B2)
    expected = [(key, file.header(key)) for key in keys]
    assert [header.chosen for _, header in expected].count(B2) == 1
    assert file.headers(tablet) == expected
    assert file.headers(tablet, limit=2) == expected[:2]
    assert file.headers(tablet, keys[0]) == expected[1:]
    assert file.headers(tablet, keys[0], keys[-2]) == expected[1:-1]
    assert file.headers(tablet, keys[-1], keys[-1]) == []


def test_keys_with_a_prefix_are_those_behind_a_key_up_to_a_limit_and_of_no_other_database() -> None:
    disk, file = make()
    keys = [group(number) for number in range(400) if file.tablet(group(number)) == 3]
    others = [group(number, name) for number in range(400) for name in ("da", "db1", "dc")]
    for key in keys + others:
        put(file, disk, key, {})
    assert file.keys_with(3, encode_value("db")) == sorted(keys)
    assert file.keys_with(3, encode_value("db"), limit=2) == sorted(keys)[:2]
    assert file.keys_with(3, encode_value("db"), sorted(keys)[1], 2) == sorted(keys)[2:4]
    assert file.keys_with(3, encode_value("db"), sorted(keys)[-1]) == []


def test_unsettled_group_is_reported_until_chosen_and_after_restart() -> None:
    disk, file = make()
    put(file, disk, group(1), {row_key(1, (1,)): row(1)}, OPEN)
    put(file, disk, group(2), {row_key(1, (2,)): row(2)}, SETTLED)
    assert file.unsettled("db", 1, None) == [group(1)]
    assert file.unsettled("db", 2, None) == []
    assert file.unsettled("other", 1, None) == []
    assert file.unsettled("db", 1, [tablet_of(group(1), 64)]) == [group(1)]
    assert file.unsettled("db", 1, []) == []
    assert RegisterFile(disk).unsettled("db", 2, None) == [group(1)]
    put(file, disk, group(1), {}, Header(B2, B2, B2))
    assert file.unsettled("db", 1, None) == []
    assert RegisterFile(disk).unsettled("db", 1, None) == []


def test_mark_counts_at_once_and_is_on_the_disk_with_the_next_change_or_when_marks_are_kept() -> None:
    disk, file = make()
    for number in (1, 2, 3):
        put(file, disk, group(number), {row_key(1, (1,)): row(1)}, OPEN)
    assert not file.mark(group(1), B1)
    assert [file.mark(group(number), B2) for number in (1, 2)] == [True, True]
    assert not file.mark(group(1), B2)
    assert [file.header(group(number)).settled for number in (1, 2, 3)] == [True, True, False]
    assert file.unsettled("db", 1, None) == [group(3)]
    assert RegisterFile(disk).unsettled("db", 1, None) == [group(1), group(2), group(3)]
    put(file, disk, group(1), {}, file.header(group(1)))
    assert RegisterFile(disk).unsettled("db", 1, None) == [group(2), group(3)]
    batch = Batch()
    file.keep_marks(batch)
    assert [space for space, _, _ in batch.writes] == [Space.REGISTER]
    disk.submit(batch)
    assert RegisterFile(disk).unsettled("db", 1, None) == file.unsettled("db", 1, None) == [group(3)]


def test_mark_of_a_value_that_was_overtaken_or_erased_does_not_count() -> None:
    disk, file = make()
    for number in (1, 2):
        put(file, disk, group(number), {row_key(1, (1,)): row(1)}, Header(B1, B1, ZERO, b"d" * 16))
        assert file.mark(group(number), B1)
    put(file, disk, group(1), {row_key(1, (1,)): row(2)}, OPEN)
    batch = Batch()
    file.erase(batch, group(2))
    disk.submit(batch)
    again = Batch()
    file.keep_marks(again)
    assert not again.writes
    assert not file.header(group(1)).settled
    assert file.header(group(2)) == ABSENT


def test_unsettled_group_with_intent_counts_for_every_table() -> None:
    disk, file = make()
    put(file, disk, group(1), {row_key(SYSTEM_INTENT, (b"t",)): b"x"}, SETTLED)
    assert file.unsettled("db", 7, None) == [group(1)]
    put(file, disk, group(1), {row_key(SYSTEM_INTENT, (b"t",)): None}, SETTLED)
    assert file.unsettled("db", 7, None) == []


def test_set_specs_with_new_index_fills_it_and_drops_the_old() -> None:
    disk, file = make(())
    put(file, disk, group(1), {row_key(1, (n,)): row(n, "a" if n % 2 else "b") for n in range(10)})
    batch = Batch()
    file.set_specs(batch, "db", 2, (SPEC,))
    disk.submit(batch)
    assert [r[0] for r in rows_found(file, Constraint(1, Comparison.EQ, ("a",)))] == [1, 3, 5, 7, 9]
    full = list(disk.range(Space.INDEX, b"", None))
    batch = Batch()
    file.set_specs(batch, "db", 3, (TableSpec(1, (0,), SPEC.indexes[:1]),))
    disk.submit(batch)
    left = disk.range(Space.INDEX, b"", None)
    assert len(full) == 40
    assert len(left) == 20
    assert file.spec_version("db") == 3


def entries_of(disk: MemoryDisk, specs: tuple[TableSpec, ...]) -> list[tuple[bytes, bytes]]:
    """Of the rows on that disk, where the specs were known before the first of them."""
    other, file = make(specs)
    source = RegisterFile(disk)
    for tablet in range(64):
        for key in source.keys(tablet):
            put(file, other, key, dict(source.rows(key)))
    return list(other.range(Space.INDEX, b"", None))


def fill_piece(file: RegisterFile, disk: MemoryDisk, specs: tuple[TableSpec, ...]) -> bool:
    batch = Batch()
    last = file.fill(batch, "db", specs)
    assert len(batch.writes) <= 10 * 4
    if last:
        file.set_specs(batch, "db", 2, specs)
    disk.submit(batch)
    return last


def change_some(file: RegisterFile, disk: MemoryDisk, chance: random.Random) -> None:
    for n in chance.sample(range(70), 12):
        new = None if chance.random() < 0.3 else row(n, chance.randint(0, 5), chance.randint(0, 5), n % 7)
        put(file, disk, group(n % 20), {row_key(1, (n,)): new})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("crash", [False, True])
def test_index_that_is_filled_in_pieces_has_what_is_changed_between_them(
    monkeypatch: pytest.MonkeyPatch, seed: int, crash: bool
) -> None:
    """Also where the node stops in the midst, and rows change before it begins again."""
    monkeypatch.setattr("dht.storage.indexes.FILL_ROWS_MAX", 10)
    chance = random.Random(seed)
    disk, file = make((TableSpec(1, (0,), SPEC.indexes[:1]),))
    for n in range(60):
        put(file, disk, group(n % 20), {row_key(1, (n,)): row(n, n % 5, n % 3, n % 7)})
    pieces = 1
    while not fill_piece(file, disk, (SPEC,)):
        pieces += 1
        change_some(file, disk, chance)
        assert len(rows_found(file, Constraint(2, Comparison.GE, (0,)))) == len(rows_found(file))
        if crash and pieces == 4:
            file = RegisterFile(disk)
            change_some(file, disk, chance)
    assert pieces >= 5
    assert file.spec_version("db") == RegisterFile(disk).spec_version("db") == 2
    assert list(disk.range(Space.INDEX, b"", None)) == entries_of(disk, (SPEC,))
    change_some(file, disk, chance)
    assert list(disk.range(Space.INDEX, b"", None)) == entries_of(disk, (SPEC,))


@pytest.mark.parametrize("then", [SPEC.indexes[:1], SPEC.indexes[1:2], SPEC.indexes[:2]], ids=["none", "one", "other"])
def test_index_that_is_gone_before_it_is_filled_leaves_no_entries(
    monkeypatch: pytest.MonkeyPatch, then: tuple[IndexSpec, ...]
) -> None:
    monkeypatch.setattr("dht.storage.indexes.FILL_ROWS_MAX", 10)
    disk, file = make((TableSpec(1, (0,), SPEC.indexes[:1]),))
    for n in range(60):
        put(file, disk, group(n % 20), {row_key(1, (n,)): row(n, n % 5, n % 3, n % 7)})
    for _ in range(3):
        assert not fill_piece(file, disk, (SPEC,))
    specs = (TableSpec(1, (0,), then),)
    batch = Batch()
    while not file.fill(batch, "db", specs):
        disk.submit(batch)
        batch = Batch()
    file.set_specs(batch, "db", 2, specs)
    disk.submit(batch)
    change_some(file, disk, random.Random(1))
    assert list(disk.range(Space.INDEX, b"", None)) == entries_of(disk, specs)


@pytest.mark.parametrize("rows", [0, 1])
def test_set_specs_looks_at_each_index_only_where_the_database_has_rows(rows: int) -> None:
    disk, file = make()
    put(file, disk, group(1, "da"), {row_key(1, (0,)): row(0, 7)})
    if rows:
        # Of a table that no spec names: only its own entries tell of it.
        put(file, disk, group(1), {row_key(9, (0,)): row(0, 7)})
    ranges: list[bytes] = []
    whole_range = disk.range
    disk.range = lambda space, low, *rest, **named: (  # type: ignore[method-assign,assignment]
        ranges.append(low) or whole_range(space, low, *rest, **named)
    )
    batch = Batch()
    file.set_specs(batch, "db", 2, tuple(TableSpec(n, (0,), SPEC.indexes) for n in range(1, 31)))
    disk.submit(batch)
    file.set_specs(Batch(), "db", 3, ())
    assert len(ranges) == (2 if not rows else 2 + 29 + 90)


def test_set_specs_of_one_changed_table_keeps_what_was_made_of_the_others() -> None:
    disk, file = make((SPEC, TableSpec(2, (0,), SPEC.indexes[:1])))
    indexes = file._indexes
    first, second = (indexes.of(encode_value("db"), table_prefix(n)) for n in (1, 2))
    put(file, disk, group(1), {row_key(2, (n,)): row(n, n % 2, 0, n % 3) for n in range(6)})
    batch = Batch()
    file.set_specs(batch, "db", 2, (SPEC, TableSpec(2, (0,), SPEC.indexes[:2])))
    disk.submit(batch)
    assert indexes.of(encode_value("db"), table_prefix(1)) is first
    changed = indexes.of(encode_value("db"), table_prefix(2))
    assert [index.id for index in second.others] == [1]
    assert [index.id for index in changed.others] == [1, 2]
    for again in (file, RegisterFile(disk)):
        assert again._indexes.of(encode_value("db"), table_prefix(2)) == changed
        query = FindQuery("db", 2, 2, (Constraint(3, Comparison.EQ, (2,)),))
        assert [decode_row(r)[0] for _, _, r in again.find_local(query)[0]] == [2, 5]
    changed_entries = disk.range(Space.INDEX, changed.others[1].prefix, changed.others[1].prefix + b"\xff")
    assert len(changed_entries) == 6
    file.set_specs(batch := Batch(), "db", 3, (SPEC,))
    disk.submit(batch)
    assert indexes.of(encode_value("db"), table_prefix(2)).others == ()
    assert disk.range(Space.INDEX, changed.others[1].prefix, changed.others[1].prefix + b"\xff") == []


def test_find_with_dangling_index_entry_raises_storage_error() -> None:
    disk, file = make()
    put(file, disk, group(1), {row_key(1, (1,)): row(1)})
    batch = Batch()
    for key, _ in disk.range(Space.ROW, b"", None):
        batch.delete(Space.ROW, key)
    disk.submit(batch)
    with pytest.raises(StorageError, match="contradicts itself"):
        rows_found(file)


def test_header_that_is_garbage_raises_storage_error() -> None:
    disk, _ = make()
    batch = Batch()
    batch.put(Space.REGISTER, tablet_of(group(1), 64).to_bytes(2, "big") + group(1), b"\xff\x00")
    disk.submit(batch)
    with pytest.raises(StorageError, match="wipe"):
        RegisterFile(disk)


def test_header_that_was_not_submitted_is_not_told() -> None:
    disk, file = make()
    put(file, disk, group(1), {row_key(1, (1,)): row(1)})
    before = file.header(group(1))
    file.write(Batch(), group(1), Header(Ballot(1, 1, 9, b"n", 1, 9)), {})
    assert file.header(group(1)) == before


VALUES = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.sampled_from([0.5, -1.0, 2.0, 2**53, 2**53 + 1, float(2**53), "", "a", "a\x00b", "b", b"", b"a", b"\x00"]),
)


def rank(value: Value) -> tuple[int, Value]:
    if value is None:
        return (0, 0)
    return (1 if isinstance(value, (int, float)) else 2 if isinstance(value, str) else 3, value)


def satisfies(value: Value, constraint: Constraint) -> bool:
    match constraint.comparison:
        case Comparison.IS_NULL:
            return value is None
        case Comparison.NOT_NULL:
            return value is not None
        case Comparison.IS_NOT:
            return rank(value) != rank(constraint.values[0])
        case Comparison.EQ_OR_NULL:
            return value is None or rank(value) == rank(constraint.values[0])
    if value is None:
        return False
    own, others = rank(value), [rank(v) for v in constraint.values if v is not None]
    if not others:
        return False
    return {
        Comparison.EQ: own == others[0],
        Comparison.IN: own in others,
        Comparison.NE: own != others[0],
        Comparison.LT: own < others[0],
        Comparison.LE: own <= others[0],
        Comparison.GT: own > others[0],
        Comparison.GE: own >= others[0],
    }[constraint.comparison]


@st.composite
def constraints(draw: st.DrawFn) -> Constraint:
    comparison = draw(st.sampled_from(list(Comparison)))
    if comparison in (Comparison.IS_NULL, Comparison.NOT_NULL):
        return Constraint(draw(st.integers(0, 3)), comparison)
    count = draw(st.integers(1, 4)) if comparison is Comparison.IN else 1
    return Constraint(draw(st.integers(0, 3)), comparison, tuple(draw(VALUES) for _ in range(count)))


QUERIES = st.builds(
    FindQuery,
    st.just("db"),
    st.just(1),
    st.just(1),
    st.lists(constraints(), max_size=3).map(tuple),
    st.none() | st.builds(Order, st.lists(st.integers(0, 3), max_size=2, unique=True).map(tuple), st.booleans()),
    st.none() | st.integers(0, 5),
)


def brute_force(content: dict[tuple[bytes, bytes], bytes], query: FindQuery, limit: int) -> tuple[list[bytes], bool]:
    found = []
    for (key, rowkey), data in content.items():
        decoded = decode_row(data)
        if all(satisfies(decoded.get(c.column), c) for c in query.constraints):
            columns = query.order.columns if query.order else ()
            found.append(([rank(decoded.get(c)) for c in columns], rowkey, key, data))
    found.sort(reverse=query.order is not None and query.order.descending)
    if query.order is not None and query.limit is not None:
        limit = min(limit, query.limit)
    return [f[3] for f in found[:limit]], len(found) > limit


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9), st.none() | st.lists(VALUES, min_size=3, max_size=3)),
        max_size=40,
    ),
    st.lists(QUERIES, min_size=1, max_size=8),
    st.integers(0, 40),
)
@settings(max_examples=300, deadline=None)
def test_find_after_random_writes_equals_brute_force(writes, queries, respec_at) -> None:
    disk, file = make()
    content: dict[tuple[bytes, bytes], bytes] = {}
    for at, (number, pk, columns) in enumerate(writes):
        if at == respec_at:
            batch = Batch()
            file.set_specs(batch, "db", 2, (TableSpec(1, (0,), (IndexSpec(4, (2, 1, 0)), SPEC.indexes[1])),))
            disk.submit(batch)
        key, rowkey = group(number), row_key(1, (pk,))
        data = None if columns is None else row(pk, *columns)
        put(file, disk, key, {rowkey: data})
        content.pop((key, rowkey), None)
        if data is not None:
            content[key, rowkey] = data
    for query in queries:
        found, truncated = file.find_local(query, None, 7)
        assert ([f[2] for f in found], truncated) == brute_force(content, query, 7), query


def test_find_restricted_to_tablets_gives_only_theirs() -> None:
    disk, file = make()
    for number in range(50):
        put(file, disk, group(number), {row_key(1, (number,)): row(number)})
    wanted = {tablet_of(group(n), 64) for n in range(5)}
    found, truncated = file.find_local(FindQuery("db", 1, 1), wanted, None)
    assert {f[0] for f in found} == {group(n) for n in range(50) if tablet_of(group(n), 64) in wanted}
    assert not truncated


def test_find_by_key_column_that_the_row_does_not_carry_uses_the_key() -> None:
    disk, file = make()
    put(file, disk, group(1), {row_key(1, (7,)): encode_row({1: "a"})})
    assert rows_found(file, Constraint(0, Comparison.EQ, (7,))) == [{1: "a"}]
    assert rows_found(file, Constraint(0, Comparison.GT, (7,))) == []
    assert rows_found(file, order=Order((0,))) == [{1: "a"}]


@pytest.mark.parametrize("number", [2.0**63, -(2.0**63), 2.0**62, 2**63 - 1, 2**63 - 512, 1e300, 0.5, float("inf")])
def test_find_by_key_that_is_a_number_at_the_end_of_64_bits_and_that_the_row_does_not_carry(number: float) -> None:
    disk, file = make()
    assert encode_values(decode_values(encode_value(number))) == encode_value(number)
    put(file, disk, group(1), {row_key(1, (number,)): encode_row({1: "a"})})
    put(file, disk, group(2), {row_key(1, (-1,)): encode_row({1: "a"})})
    assert rows_found(file, Constraint(0, Comparison.EQ, (number,)), order=Order((1, 0))) == [{1: "a"}]
    assert len(rows_found(file, order=Order((1, 0)))) == 2


def test_find_with_order_and_limit_reads_few_entries() -> None:
    disk, file = make()
    put(file, disk, group(1), {row_key(1, (n,)): row(n, None, n % 7, n) for n in range(2000)})
    reads = 0
    original = disk.get

    def counted(space: int, key: bytes) -> bytes | None:
        nonlocal reads
        reads += 1
        return original(space, key)

    disk.get = counted  # type: ignore[method-assign]
    assert [r[3] for r in rows_found(file, order=Order((3,), descending=True), limit=3)] == [1999, 1998, 1997]
    assert reads == 4


NEWEST = TableSpec(1, (0,), (IndexSpec(4, (1,)), IndexSpec(5, (2,))))


def newest_of(file: RegisterFile, disk: MemoryDisk, owner: str) -> tuple[list[Value], int]:
    """The three newest of the owner (column 1, indexed) by age (column 2, indexed), and how many rows were read."""
    reads, get = 0, disk.get

    def counted(space: int, key: bytes) -> bytes | None:
        nonlocal reads
        reads += 1
        return get(space, key)

    disk.get = counted  # type: ignore[method-assign]
    order = Order((2, 0, 3), descending=True)
    found = rows_found(file, Constraint(1, Comparison.EQ, (owner,)), order=order, limit=3)
    disk.get = get  # type: ignore[method-assign]
    return [row[2] for row in found], reads


def test_find_of_many_that_fit_in_the_order_of_another_index_reads_few() -> None:
    disk, file = make()
    batch = Batch()
    file.set_specs(batch, "db", 2, (NEWEST,))
    disk.submit(batch)
    for number in range(1000):
        owner = "few" if number in (7, 9) else "old" if number < 300 else "new" if number % 2 else "other"
        put(file, disk, group(number), {row_key(1, (number,)): row(number, owner, number, None)})
    newest, reads = newest_of(file, disk, "new")
    assert newest == [999, 997, 995]
    assert reads < 16
    # Those of one owner are so old that the other index is given up, and two are so few that it is not begun.
    newest, reads = newest_of(file, disk, "old")
    assert newest == [299, 298, 297]
    assert 298 <= reads < 298 + 32
    newest, reads = newest_of(file, disk, "few")
    assert newest == [9, 7]
    assert reads < 4


@pytest.mark.parametrize("descending", [False, True])
def test_find_in_an_order_behind_the_key_sorts_rows_of_one_key_in_several_groups(descending: bool) -> None:
    disk, file = make()
    for number, letter in enumerate("cabd"):
        put(file, disk, group(number), {row_key(1, (7,)): row(7, letter), row_key(1, (number,)): row(number, letter)})
    found = rows_found(file, order=Order((0, 1), descending), limit=3)
    letters = [r[1] for r in found]
    assert letters == (["d", "c", "b"] if descending else ["c", "a", "b"])


@pytest.mark.parametrize("descending", [False, True])
def test_find_that_gives_an_index_up_among_rows_of_one_key_has_the_first_of_them(descending: bool) -> None:
    """For two rows eight entries are looked at, of which the last are two of the four rows of one key."""
    disk, file = make()
    batch = Batch()
    file.set_specs(batch, "db", 2, (TableSpec(1, (0,), (IndexSpec(4, (1,)),)),))
    disk.submit(batch)
    for number in range(6):
        put(file, disk, group(number), {row_key(1, (number,)): row(number, "a", None, "n")})
        put(file, disk, group(number), {row_key(1, (14 - number,)): row(14 - number, "a", None, "n")})
    for number, letter in enumerate("dcab" if descending else "cdba"):
        put(file, disk, group(number), {row_key(1, (7,)): row(7, "z", None, letter)})
    for number in range(100, 120):
        behind = -number if descending else number
        put(file, disk, group(number), {row_key(1, (behind,)): row(behind, "z", None, "n")})
    found = rows_found(file, Constraint(1, Comparison.GT, ("a",)), order=Order((0, 3), descending), limit=1)
    assert [r[3] for r in found] == ["d" if descending else "a"]


@pytest.mark.parametrize("descending", [False, True])
def test_find_in_an_order_that_no_index_has_keeps_no_more_rows_than_it_gives(descending: bool) -> None:
    disk, file = make()
    for number in range(300):
        put(file, disk, group(number), {row_key(1, (number,)): encode_row({0: number, 4: number * 7 % 300})})
    alive, most = 0, 0

    class Counted(bytes):
        def __init__(self, _: bytes) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    row_of_entry = file._indexes.row_of_entry
    file._indexes.row_of_entry = lambda *place: Counted(row_of_entry(*place))  # type: ignore[method-assign]
    found = rows_found(file, order=Order((4,), descending), limit=5)
    assert [row[4] for row in found] == ([299, 298, 297, 296, 295] if descending else [0, 1, 2, 3, 4])
    assert most < 12


def test_find_in_database_name_with_zero_byte_stays_in_its_database() -> None:
    disk = MemoryDisk()
    file = RegisterFile(disk)
    names = ["d", "d\x00", "d\x00\x00e", "é"]
    random.Random(1).shuffle(names)
    for name in names:
        put(file, disk, group(1, name), {row_key(1, (1,)): row(name)}, OPEN)
    for name in names:
        found, _ = file.find_local(FindQuery(name, 1, 0), None, None)
        assert [decode_row(f[2]) for f in found] == [{0: name}]
        assert file.unsettled(name, 1, None) == [group(1, name)]
        assert group(1, name).startswith(encode_value(name))
