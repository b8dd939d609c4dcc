"""What a node's own clients have seen, so that a copy never tells them less (DESIGN section 8, read-your-writes).

Of a group that was written or read here, the ballot; of a database, a moment that a copy has to be covered beyond: when
something was committed or learned here that no ballot of a group tells, and where ballots had to be forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from dht.model import ZERO, Ballot, GroupKey
from dht.storage.indexes import database_prefix

GROUPS_SEEN_MAX: Final = 20_000
DATABASES_SEEN_MAX: Final = 1_000
_EVERYWHERE: Final = b""


class Seen:
    """Moments are of the monotonic clock; -inf where none is known."""

    def __init__(self, groups_max: int = GROUPS_SEEN_MAX, databases_max: int = DATABASES_SEEN_MAX) -> None:
        self._groups: OrderedDict[GroupKey, Ballot] = OrderedDict()
        self._beyond_s: dict[bytes, float] = {}
        self._groups_max = groups_max
        self._databases_max = databases_max

    def note(self, key: GroupKey, ballot: Ballot, now_s: float) -> None:
        """The group was seen at this ballot."""
        known = self._groups.pop(key, ZERO)
        self._groups[key] = max(known, ballot)
        if len(self._groups) > self._groups_max:
            oldest, _ = self._groups.popitem(last=False)
            self.note_database(database_prefix(oldest), now_s)

    def note_database(self, prefix: bytes, covered_s: float) -> None:
        """Only what is covered up to that moment will do for the database from now on. `prefix`: its encoded name."""
        if prefix not in self._beyond_s and len(self._beyond_s) >= self._databases_max:
            self.note_all(max(self._beyond_s.values()))
        self._beyond_s[prefix] = max(covered_s, self._beyond_s.get(prefix, covered_s))

    def note_all(self, covered_s: float) -> None:
        """The same for every database."""
        self._beyond_s = {_EVERYWHERE: max(covered_s, self._beyond_s.get(_EVERYWHERE, covered_s))}

    def ballot(self, key: GroupKey) -> Ballot:
        """The group must not be told at a lower one; ZERO if it was not seen."""
        return self._groups.get(key, ZERO)

    def beyond_s(self, prefix: bytes) -> float:
        """What is told of the database must be covered up to this moment."""
        never = float("-inf")
        return max(self._beyond_s.get(prefix, never), self._beyond_s.get(_EVERYWHERE, never))
