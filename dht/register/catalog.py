"""What the store itself keeps in groups of its own: the registry of databases, a database's catalog, its sequences.

All three use table 0, which has no indexes and which no find sees. The catalog's rows belong to the SQL door; the store
reads their column 0 only (dht.model.CATALOG_TABLE).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import msgspec

from dht.errors import Invalid, NotFound, SchemaChanged
from dht.limits import SEQUENCE_BLOCK_IDS
from dht.model import (
    CATALOG_FAMILY,
    CATALOG_TABLE,
    GLOBAL,
    LOCAL,
    POPS_MAX,
    Change,
    Columns,
    GroupKey,
    NodeId,
    Op,
    Part,
    PopClaim,
    RowKey,
    Struct,
    TableSpec,
    Value,
)
from dht.rows import LOCAL_MARK, decode_row, encode_row, group_key, is_local, row_key, split_group_key, split_row_key

REGISTRY_GROUP: GroupKey = group_key("", "databases", ())
POPS_GROUP: GroupKey = group_key("", "pops", ())
DATABASE_NAME_CHARACTERS_MAX = 64
SEQUENCE_IDS_MAX = 100_000
INDEXES_LEFT_OUT = 16
"""After a recovery of `global`: so many PoPs may have been founded since what it had was written."""
_HERE = ("", GLOBAL, LOCAL)
"""Homes in a registry's rows of what lives in the registry's own domain; others are names of PoPs, or say a shard."""
_SHARD = "~"
_INCARNATION_BYTES = 16
_GENERATION_BYTES = 8
SEQUENCE_FAMILY = "sequence"
SHARDS_FAMILY = "shards"
_SEQUENCE_ROW = row_key(0, ())
_spec_decoder = msgspec.msgpack.Decoder(TableSpec)


def check_database_name(name: str) -> None:
    """Raise Invalid for a name that no database may have."""
    if not 0 < len(name) <= DATABASE_NAME_CHARACTERS_MAX or not all(c.isalnum() or c in "_-" for c in name):
        raise Invalid(
            f"{name!r} cannot name a database: 1 to {DATABASE_NAME_CHARACTERS_MAX} letters, digits, '_' and '-'"
        )


def no_such_database(name: str) -> NotFound:
    return NotFound(f"there is no database {name!r}; `lucd database create {name}` makes it", database=name)


def schema_changed(database: str, have: int, current: int) -> SchemaChanged:
    return SchemaChanged(
        f"the catalog of {database!r} is at version {current}, the request knows {have}; reload the catalog",
        database=database,
        version=current,
    )


def being_dropped(name: str) -> NotFound:
    return NotFound(
        f"database {name!r} is being dropped; `lucd database drop {name} --yes` goes on with it where that broke off, "
        f"`lucd database create {name}` does too and makes it anew",
        database=name,
    )


class Registered(Struct, frozen=True):
    """A registry's row of a database.

    `mark`: of its creation, which tells it from others that had or will have its name. `home`: empty: the registry's
    own domain. `dropping`: it is served no more, and the name stays taken until its groups are empty.
    """

    mark: Value
    home: str
    dropping: bool


def registered(rows: Mapping[RowKey, bytes]) -> dict[str, Registered]:
    """All names in the registry's rows, sorted."""
    named = ((str(split_row_key(key)[1][0]), decode_row(row)) for key, row in rows.items())
    return {name: Registered(row.get(0), str(row.get(1) or ""), bool(row.get(2))) for name, row in sorted(named)}


def databases_of(rows: Mapping[RowKey, bytes]) -> dict[str, Value]:
    """The names in the registry's rows of what its domain serves, sorted, each with the mark of its creation."""
    served = ((name, row) for name, row in registered(rows).items() if not row.dropping)
    return {name: row.mark for name, row in served if row.home in _HERE or is_shard(row.home)}


def dropping_of(rows: Mapping[RowKey, bytes]) -> frozenset[str]:
    """The names in the registry's rows that are being dropped."""
    return frozenset(name for name, row in registered(rows).items() if row.dropping)


def shard_home(mark: bytes) -> str:
    """What the registry of a PoP has for the home of its shard of the database that was created with this mark."""
    return _SHARD + mark.hex()


def is_shard(home: Value) -> bool:
    return isinstance(home, str) and home.startswith(_SHARD)


def at_home(rows: Mapping[RowKey, bytes]) -> tuple[str, ...]:
    """The names in the registry's rows of what lives in its domain, but for shards."""
    homes = homes_of(rows)
    return tuple(name for name in databases_of(rows) if not is_shard(homes[name]))


def homes_of(rows: Mapping[RowKey, bytes]) -> dict[str, str]:
    """The names in the registry's rows, sorted, each with its home, but for those that are being dropped."""
    return {name: row.home for name, row in registered(rows).items() if not row.dropping}


def registry_row(name: str) -> RowKey:
    """The key of the registry's row of a database."""
    return row_key(0, (name,))


def database_added(name: str, mark: bytes, home: str = "") -> Part:
    """The registry's part of a database's creation; `mark` tells it from others that had or will have its name."""
    columns: dict[int, Value] = {0: mark, 1: home} if home else {0: mark}
    return Part(REGISTRY_GROUP, changes=(Change(Op.INSERT, 0, (name,), columns),))


def pop_claimed(pop: str, claim: PopClaim, generation: int | None = None) -> Part:
    """The first claim of a PoP, and of an index: a row each, so that whoever comes second meets Duplicate.

    `generation`: that of `global` in which the index was given for the first time.
    """
    named = Change(Op.INSERT, 0, (pop,), {0: claim.node, 1: claim.incarnation, 2: claim.index})
    given: Columns = {0: pop} if generation is None else {0: pop, 1: generation}
    return Part(POPS_GROUP, changes=(named, Change(Op.INSERT, 0, (claim.index,), given)))


def pop_moved(pop: str, before: PopClaim, after: PopClaim) -> Part:
    """The claim goes over to another node, if it is still as it was; of two that want it one meets Conflict."""
    guards: Columns = {0: before.node, 1: before.incarnation}
    return Part(POPS_GROUP, changes=(Change(Op.UPDATE, 0, (pop,), {0: after.node, 1: after.incarnation}, guards),))


def recovering(claim: PopClaim, node: NodeId, incarnation: bytes, generation: int) -> PopClaim:
    """The PoP's claim of a node that recovers it, and begins that generation of its domain or a later one.

    The incarnation has the generation behind it. So the claim is no one's to found a domain by; and as each order
    takes a higher one, no two make the same claim, and an order on what was claimed before another meets Conflict.
    """
    return PopClaim(node, incarnation + generation.to_bytes(_GENERATION_BYTES, "big"), claim.index)


def recovered_generation(claim: PopClaim) -> int:
    """The generation that the claim's node set out to begin when it recovered the PoP; 0 where nobody did."""
    return int.from_bytes(claim.incarnation[_INCARNATION_BYTES:], "big")


def pops_of(rows: Mapping[RowKey, bytes]) -> dict[str, PopClaim]:
    """All PoPs, by index."""
    out = {}
    for key, data in rows.items():
        name, row = split_row_key(key)[1][0], decode_row(data)
        if isinstance(name, str):
            index = row.get(2)
            out[name] = PopClaim(_bytes(row.get(0)), _bytes(row.get(1)), index if isinstance(index, int) else 0)
    return dict(sorted(out.items(), key=lambda item: item[1].index))


def next_pop_index(rows: Mapping[RowKey, bytes], had: int | None = None, generation: int = 1) -> int:
    """The one above all that were given, or the one that the PoP `had`. Raises Invalid when all were, or that was.

    The first that is given in a generation of `global` which a recovery began leaves some out: they may be those of
    PoPs whose rows were lost, and which have not entered themselves again. After the highest one the gaps are filled.
    """
    given = {split_row_key(key)[1][0]: decode_row(data).get(1) for key, data in rows.items()}
    if had is not None:
        if not 0 <= had < POPS_MAX:
            raise Invalid(f"{had} is no index of a PoP: there are {POPS_MAX}, from 0 on")
        if had in given:
            raise Invalid(f"the PoP's index {had} was given to another one meanwhile: its ids are no longer its own")
        return had
    indexes = [index for index in given if isinstance(index, int)]
    generations = [since for index in indexes if isinstance(since := given[index], int)]
    index = max(indexes, default=-1) + 1
    if generation > max(generations, default=1):
        index += INDEXES_LEFT_OUT
    if index < POPS_MAX:
        return index
    lowest = next((index for index in range(POPS_MAX) if index not in given), None)
    if lowest is None:
        raise Invalid(f"this cluster has had {POPS_MAX} PoPs, which is as many as there may ever be; none can be added")
    return lowest


def _bytes(value: Value) -> bytes:
    return value if isinstance(value, bytes) else b""


def shards_group(database: str) -> GroupKey:
    """At the database's home: the PoPs that have, or had cause to make, a shard of it."""
    return group_key(database, SHARDS_FAMILY, ())


def shard_listed(database: str, pop: str) -> Part:
    return Part(shards_group(database), changes=(Change(Op.INSERT, 0, (pop,), {}),))


def shards_of(rows: Mapping[RowKey, bytes]) -> tuple[str, ...]:
    """The PoPs, sorted."""
    return tuple(sorted(str(split_row_key(key)[1][0]) for key in rows))


def database_dropping(name: str, mark: Value) -> Part:
    """That creation of the database is served no more. Without effect where it is said already."""
    return Part(REGISTRY_GROUP, changes=(Change(Op.UPDATE, 0, (name,), {2: 1}, {0: mark}),))


def database_removed(name: str, mark: Value) -> Part:
    """The end of that creation's drop: the name is free."""
    return Part(REGISTRY_GROUP, changes=(Change(Op.DELETE, 0, (name,), guards={0: mark, 2: 1}),))


@functools.lru_cache(maxsize=16_384)
def database_of(key: GroupKey) -> str:
    """The database that the group belongs to."""
    return split_group_key(key)[0]


def catalog_group(database: str) -> GroupKey:
    return group_key(database, CATALOG_FAMILY, ())


def catalog_of(rows: Mapping[RowKey, bytes]) -> tuple[int, list[TableSpec]]:
    """(version, table specs) from the rows of a catalog group; (0, []) when there is none yet."""
    version, specs = 0, []
    for key, data in rows.items():
        table, pk = split_row_key(key)
        if table != CATALOG_TABLE:
            continue
        value = decode_row(data).get(0)
        if pk == (0,):
            version = value if isinstance(value, int) else 0
        elif isinstance(value, bytes):
            try:
                specs.append(_spec_decoder.decode(value))
            except msgspec.MsgspecError as error:
                raise Invalid(f"the catalog's row {pk} has no table spec in column 0: {error}") from None
    return version, specs


def has_tables(rows: Mapping[RowKey, bytes]) -> bool:
    """Whether a catalog's rows are more than its version, which is what a drop leaves of it."""
    return any(key != row_key(CATALOG_TABLE, (0,)) for key in rows)


def emptied(key: GroupKey, rows: Mapping[RowKey, bytes]) -> dict[RowKey, bytes | None]:
    """What empties a group of a database that was dropped.

    Of a catalog the versions and table numbers used up stay, so that those of a database of the same name go on from
    there: nobody takes one of the old ones for one of the new. One that has no tables is as a drop leaves it: two that
    drop a database at once come to an end. Sequences of a shard stay: before it is known in the PoP that the database
    was created again, ids may have been drawn for it from the shard that a drop left behind.
    """
    if split_group_key(key)[1] == CATALOG_FAMILY and not has_tables(rows):
        return {}
    if is_sequence(key) and is_local(key):
        return {}
    delta: dict[RowKey, bytes | None] = dict.fromkeys(rows)
    head = row_key(CATALOG_TABLE, (0,))
    if head in rows and split_group_key(key)[1] == CATALOG_FAMILY:
        row = decode_row(rows[head])
        version = row.get(0)
        delta[head] = encode_row({**row, 0: version + 1 if isinstance(version, int) else 1})
    return delta


def sequence_group(database: str, name: str) -> GroupKey:
    """Each PoP has its own of a sequence whose name begins with the mark of local families."""
    return group_key(database, (LOCAL_MARK if name.startswith(LOCAL_MARK) else "") + SEQUENCE_FAMILY, (name,))


def is_sequence(key: GroupKey) -> bool:
    """Whether the group is a sequence's."""
    try:
        return split_group_key(key)[1].removeprefix(LOCAL_MARK) == SEQUENCE_FAMILY
    except Invalid:
        return False


def sequence_next(rows: Mapping[RowKey, bytes]) -> int | None:
    """The lowest id that the sequence never gave out; None when it was never used."""
    row = rows.get(_SEQUENCE_ROW)
    if row is None:
        return None
    value = decode_row(row).get(0)
    return value if isinstance(value, int) else None


def sequence_jumped(rows: Mapping[RowKey, bytes]) -> int | None:
    """The generation whose recovery made the sequence jump last."""
    row = rows.get(_SEQUENCE_ROW)
    value = decode_row(row).get(1) if row is not None else None
    return value if isinstance(value, int) else None


def sequence_moved(key: GroupKey, current: int | None, following: int, jumped: int | None = None) -> Part:
    """Compare-and-set of the sequence from `current` to `following`. `jumped`: see `sequence_jumped`."""
    columns: Columns = {0: following} if jumped is None else {0: following, 1: jumped}
    if current is None:
        return Part(key, changes=(Change(Op.INSERT, 0, (), columns),))
    return Part(key, changes=(Change(Op.UPDATE, 0, (), columns, {0: current}),))


def check_count(count: int) -> None:
    if not 0 < count <= SEQUENCE_IDS_MAX:
        raise Invalid(f"{count} ids were asked for; 1 to {SEQUENCE_IDS_MAX} can be reserved at once")


def block_of(count: int) -> int:
    """How many ids to take from the group so that `count` of them can be given out now."""
    return max(count, SEQUENCE_BLOCK_IDS)
