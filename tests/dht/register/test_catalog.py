"""What the store reads of a database's catalog."""

from __future__ import annotations

import msgspec

from dht.model import CATALOG_TABLE, IndexSpec, Reading, TableSpec
from dht.register.catalog import catalog_of, emptied, sequence_group
from dht.rows import encode_row, group_key, row_key


def rows(*specs: bytes) -> dict[bytes, bytes]:
    head = {row_key(CATALOG_TABLE, (0,)): encode_row({0: 7})}
    return head | {row_key(CATALOG_TABLE, (i + 1,)): encode_row({0: spec}) for i, spec in enumerate(specs)}


def test_catalog_of_an_earlier_version_its_specs_live_with_their_database_and_are_read_from_voters() -> None:
    version, specs = catalog_of(rows(msgspec.msgpack.encode([1, [0], [[2, [3]]]])))
    assert version == 7
    assert specs == [TableSpec(1, (0,), (IndexSpec(2, (3,)),), home="", read=0)]


def test_catalog_home_and_reading_of_a_table_come_back_as_they_were_stored() -> None:
    spec = TableSpec(1, (0,), (), "local", Reading.SERVE_STALE | Reading.PARTIAL_OK, (b"family",))
    assert catalog_of(rows(msgspec.msgpack.encode(spec)))[1] == [spec]
    assert Reading.PARTIAL_OK in Reading(catalog_of(rows(msgspec.msgpack.encode(spec)))[1][0].read)


def test_emptied_sequence_stays_in_a_shard_and_nowhere_else() -> None:
    row = {row_key(0, ()): encode_row({0: 51})}
    assert emptied(sequence_group("d", "~17"), row) == {}
    for key in (sequence_group("d", "17"), group_key("d", "~f", ("17",))):
        assert emptied(key, row) == dict.fromkeys(row)
