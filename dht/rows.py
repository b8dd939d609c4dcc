"""Row keys, group keys and rows as bytes.

Keys use an order-preserving encoding (the idea of FoundationDB's tuple layer): comparing two encodings with memcmp
gives SQLite's order of values: NULL, then numbers by value whatever their type, then text by code point, then blobs.

    0x05                         NULL
    0x10  8-byte double, 2-byte  number: the nearest double with its sign bits flipped to sort, then the distance of an
                                 integer from that double, so that large integers stay distinct
    0x20  utf-8, 0x00 -> 00 FF   text, ended by 0x00
    0x30  bytes, 0x00 -> 00 FF   blob, ended by 0x00
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from typing import Any, Final

import msgspec

from dht.errors import Invalid
from dht.model import GroupKey, Row, RowKey, Value

_NULL: Final = b"\x05"
_NUMBER: Final = b"\x10"
_TEXT: Final = b"\x20"
_BLOB: Final = b"\x30"
_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1
_OFFSET_BIAS: Final = 1 << 15
_DIGESTS_KEPT: Final = 4096
_DIGESTED_ROW_BYTES_KEPT: Final = 4096
_row_encoder = msgspec.msgpack.Encoder()
_row_decoder: msgspec.msgpack.Decoder[Row] = msgspec.msgpack.Decoder(dict[int, Any])


def check_value(value: object) -> None:
    """Raise Invalid unless the value is None, a 64-bit int, a float that is a number, str or bytes (bool is not)."""
    kind = type(value)
    if kind is int:
        if not _INT_MIN <= value <= _INT_MAX:  # type: ignore[operator]
            raise Invalid(f"integer {value} does not fit 64 bits")
    elif kind is float:
        if math.isnan(value):  # type: ignore[arg-type]
            raise Invalid("NaN is not a value")
    elif kind is not str and kind is not bytes and value is not None:
        raise Invalid(f"a value of type {kind.__name__} cannot be stored")


def encode_value(value: Value) -> bytes:
    """One value, sortable and self-delimiting. Raises Invalid for a type or size that SQL has no word for."""
    if value is None:
        return _NULL
    if isinstance(value, str):
        return _TEXT + value.encode("utf-8", "surrogatepass").replace(b"\x00", b"\x00\xff") + b"\x00"
    if isinstance(value, bytes):
        return _BLOB + value.replace(b"\x00", b"\x00\xff") + b"\x00"
    if isinstance(value, int):
        if not _INT_MIN <= value <= _INT_MAX:
            raise Invalid(f"integer {value} does not fit 64 bits")
        nearest = float(value)
        return _NUMBER + _double(nearest) + (value - int(nearest) + _OFFSET_BIAS).to_bytes(2, "big")
    if isinstance(value, float):
        if math.isnan(value):
            raise Invalid("NaN is not a value")
        return _NUMBER + _double(value) + _OFFSET_BIAS.to_bytes(2, "big")
    raise Invalid(f"a value of type {type(value).__name__} cannot be stored")


def _double(number: float) -> bytes:
    bits: int = struct.unpack(">Q", struct.pack(">d", number + 0.0))[0]
    bits = bits ^ 0xFFFFFFFFFFFFFFFF if bits >> 63 else bits | 1 << 63
    return bits.to_bytes(8, "big")


def encode_values(values: tuple[Value, ...] | list[Value]) -> bytes:
    """Several values; order is that of the tuples, and a prefix of values is a prefix of bytes."""
    return b"".join([encode_value(v) for v in values])


def decode_values(data: bytes) -> tuple[Value, ...]:
    """The values of `encode_values`; an integral number that fits 64 bits comes back as int.

    Raises Invalid on anything else.
    """
    out: list[Value] = []
    at = 0
    while at < len(data):
        tag = data[at : at + 1]
        at += 1
        if tag == _NULL:
            out.append(None)
        elif tag == _NUMBER and at + 10 <= len(data):
            bits = int.from_bytes(data[at : at + 8], "big")
            bits = bits & ~(1 << 63) if bits >> 63 else bits ^ 0xFFFFFFFFFFFFFFFF
            number: float = struct.unpack(">d", bits.to_bytes(8, "big"))[0]
            offset = int.from_bytes(data[at + 8 : at + 10], "big") - _OFFSET_BIAS
            whole = int(number) + offset if abs(number) <= 2.0**63 and number.is_integer() else None
            out.append(number if whole is None or whole > _INT_MAX else whole)
            at += 10
        elif tag in (_TEXT, _BLOB):
            end = at
            while (end := data.find(b"\x00", end)) >= 0 and data[end + 1 : end + 2] == b"\xff":
                end += 2
            if end < 0:
                raise Invalid("key ends inside a value")
            raw = data[at:end].replace(b"\x00\xff", b"\x00")
            out.append(raw.decode("utf-8", "surrogatepass") if tag == _TEXT else raw)
            at = end + 1
        else:
            raise Invalid(f"unknown tag {tag.hex()} in a key")
    return tuple(out)


@functools.lru_cache(maxsize=4096)
def group_key(database: str, family: str, key: tuple[Value, ...]) -> GroupKey:
    """The name of a group. Groups of a database, and of a family in it, share a prefix.

    Kept, because all rows of a group ask for it; values that are equal are encoded the same, whatever their types.
    """
    return encode_values((database, family, *key))


LOCAL_MARK: Final = "~"
"""What the name of a family begins with whose groups live in the PoP that made them (`dht.register.places`)."""
_LOCAL_FAMILY: Final = _TEXT + LOCAL_MARK.encode()


def is_local(group: GroupKey) -> bool:
    """Whether the group, or the groups that begin so, are of a local family. Names of databases hold no NUL."""
    return group.startswith(_LOCAL_FAMILY, group.find(b"\x00") + 1)


def split_group_key(group: GroupKey) -> tuple[str, str, tuple[Value, ...]]:
    """(database, family, key) of a group's name."""
    parts = decode_values(group)
    if len(parts) < 2 or not isinstance(parts[0], str) or not isinstance(parts[1], str):
        raise Invalid("not a group key")
    return parts[0], parts[1], parts[2:]


def group_name(group: GroupKey) -> str:
    """For messages to humans: DATABASE/FAMILY/VALUE, as `lucd data where` takes it."""
    try:
        return "/".join(str(value) for value in decode_values(group))
    except Invalid:
        return group.hex()


def row_key(table: int, pk: tuple[Value, ...]) -> RowKey:
    """The name of a row inside its group."""
    return table_prefix(table) + encode_values(pk)


def split_row_key(key: RowKey) -> tuple[int, tuple[Value, ...]]:
    """(table, primary key) of a row's name."""
    parts = decode_values(key)
    if not parts or not isinstance(parts[0], int):
        raise Invalid("not a row key")
    return parts[0], parts[1:]


@functools.lru_cache(maxsize=4_096)
def table_prefix(table: int) -> bytes:
    """What the keys of all rows of the table begin with."""
    return encode_value(table)


def encode_row(row: Row) -> bytes:
    """A row as it rests on disk and travels."""
    return _row_encoder.encode(row)


def decode_row(data: bytes) -> Row:
    """Raises Invalid when the bytes are not a row."""
    try:
        return _row_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Invalid(f"not a row: {error}") from None


@functools.lru_cache(maxsize=16_384)
def tablet_of(group: GroupKey, tablets: int) -> int:
    """The tablet that a group falls into: uniform by hash, fixed for the domain's life."""
    return int.from_bytes(hashlib.blake2b(group, digest_size=8).digest(), "big") % tablets


def row_digest(key: RowKey, row: bytes) -> int:
    """A row's share of its group's digest; a group's digest is the sum of them modulo 2**128, so deltas update it."""
    return (_kept_digest if len(row) <= _DIGESTED_ROW_BYTES_KEPT else _digest)(key, row)


def _digest(key: RowKey, row: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(len(key).to_bytes(4, "big") + key + row, digest_size=16).digest(), "big")


_kept_digest = functools.lru_cache(maxsize=_DIGESTS_KEPT)(_digest)
"""A row is digested when it is written, and when it is written over; by a coordinator's node for its acceptor too."""
