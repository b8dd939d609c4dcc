"""Ids of tables whose rows live in several PoPs: k * IDS_APART + the index of the PoP that gives them out.

k comes from a sequence of the PoP's own domain, so no other PoP has a part in it, and a PoP that is cut off goes on.
MySQL's INT has to hold the id, which leaves a PoP LOCAL_IDS_MAX of them for each table. Two things use them up: rows,
and recoveries, each of which leaves out what may have been given out unseen. So a recovery takes a share of what is
left, not the same each time, and long before the end the daemon says that it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from dht.errors import Invalid
from dht.limits import IDS_APART, SPANNING_ID_MAX
from dht.model import GroupKey, RowKey
from dht.register.catalog import SEQUENCE_IDS_MAX, sequence_jumped, sequence_next
from dht.requests import Store
from dht.rows import LOCAL_MARK, is_local

LOCAL_IDS_MAX: Final = SPANNING_ID_MAX // IDS_APART
"""The greatest k, whatever the PoP's index."""
FIRST_GENERATION: Final = 1
SEQUENCE_JUMP_IDS: Final = 1_000_000
LOCAL_JUMP_SHARE: Final = 16
WARN_AT_SHARE: Final = 0.75
WATCHED_MAX: Final = 10_000
REMEDY: Final = (
    "ids are never given out again, so make new rows in another PoP: nodes with a `pop` of a new name found one, which "
    "has ids of its own"
)


def jump_ids(key: GroupKey, following: int) -> int:
    """How many ids a recovery leaves out of the sequence, which stands at `following`: more than were taken unseen.

    Of a local one a sixteenth of what is left: half a million at first, and after forty recoveries there are ids still.
    Never less than one request may take. Where there are no more, none is given out, rather than one twice.
    """
    if not is_local(key):
        return SEQUENCE_JUMP_IDS
    return max(SEQUENCE_IDS_MAX, (LOCAL_IDS_MAX - following) // LOCAL_JUMP_SHARE)


def following_in(generation: int, key: GroupKey, rows: Mapping[RowKey, bytes]) -> int | None:
    """Where the sequence goes on in this generation of its domain; None if it was never used.

    It jumps once for each that began since it jumped last: of a generation that was lost as a whole nobody knows which
    ids it has given out, but that it had jumped once itself.
    """
    following = sequence_next(rows)
    if following is not None:
        for _ in range(generation - (sequence_jumped(rows) or FIRST_GENERATION)):
            following += jump_ids(key, following)
    return following


def left_ids(following: int) -> int:
    """How many a local sequence that stands there can give out."""
    return max(0, LOCAL_IDS_MAX - following + 1)


class LocalIds:
    """Those of one PoP. `own`: its shard; `index`: the PoP's; raises Unavailable."""

    def __init__(self, pop: str, own: Store, index: Callable[[], int]) -> None:
        self._pop = pop
        self._own = own
        self._index = index
        self._high: dict[tuple[str, str], int] = {}

    async def reserve(self, database: str, name: str, count: int, above: int, timeout_s: float | None) -> int:
        """The first of `count` ids, each IDS_APART above the one before; no other PoP gives them out.

        Raises Invalid where they are used up.
        """
        index = self._index()
        first = await self._own.reserve_ids(database, name, count, above // IDS_APART, timeout_s)
        last = first + count - 1
        self._watch(database, name, last)
        if last > LOCAL_IDS_MAX:
            raise Invalid(
                f"the ids of {_named(database, name)} are used up in PoP {self._pop}: the next would be "
                f"{first * IDS_APART + index}, and columns hold {SPANNING_ID_MAX} at most; {REMEDY}"
            )
        return first * IDS_APART + index

    async def raise_to(self, database: str, name: str, above: int, timeout_s: float | None) -> None:
        """Give out only ids greater than `above`, of any PoP, from now on."""
        await self._own.raise_sequence(database, name, above // IDS_APART, timeout_s)

    def forget(self, database: str) -> None:
        """It was dropped."""
        self._high = {key: high for key, high in self._high.items() if key[0] != database}

    def warnings(self) -> list[str]:
        """One for each table whose ids come to an end here, as far as this node has drawn some since its start."""
        return [
            f"{min(100, 100 * high // LOCAL_IDS_MAX)} % of the ids of {_named(*key)} are used up in PoP {self._pop}, "
            f"{left_ids(high + 1):,} are left: {REMEDY}"
            for key, high in sorted(self._high.items())
            if high >= WARN_AT_SHARE * LOCAL_IDS_MAX
        ]

    def _watch(self, database: str, name: str, last: int) -> None:
        if len(self._high) >= WATCHED_MAX:
            self._high.clear()
        self._high[database, name] = last


def _named(database: str, name: str) -> str:
    """A sequence is named by the number of its table."""
    return f"table {name.removeprefix(LOCAL_MARK)} of {database}"
