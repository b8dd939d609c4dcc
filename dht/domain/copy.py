"""A follower's copy of another domain: registers, and up to which moment each tablet of them is covered.

Only chosen states are kept. A tablet is covered up to T when every write of it that was acknowledged before T is in the
copy, but for its open registers: of those more was heard than is here, or they hold an intent. An open register is
covered up to where its tablet was when it was opened; what happened to it was acknowledged later.

`as_of_s` and `since_s` are of the monotonic clock, so they do not outlive a restart; what the file says of coverage is
wall-clock time, which may be set: for humans, whom it tells what a PoP that lost all its disks gets back, and for
answers whose age does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from dht.domain.messages import RegisterCopy
from dht.domain.rules import FOLLOW_RULES, FollowRules
from dht.errors import StorageError
from dht.model import ZERO, Ballot, GroupKey, Struct
from dht.storage.registers import Header, RegisterFile
from dht.world import Batch, Disk, Space

NEVER_S: Final = float("-inf")
OPEN_TOLD_MAX: Final = 1_000
ERASE_KEYS: Final = 200
_KEY: Final = b"copy"


class Coverage(Struct, frozen=True):
    """What the file says of itself. `wall_s[t]`: since 1970, as the follower's clock had it; 0: never.

    `open`: registers that are covered up to an earlier moment, with that.
    """

    generation: int = 0
    wall_s: tuple[float, ...] = ()
    open: dict[GroupKey, float] = {}


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Coverage).decode


@dataclass(slots=True)
class Open:
    """`doubtful`: the register's replicas must be asked where it stands. `floor`: the tablet's when it was opened."""

    since_s: float
    floor: Ballot
    doubtful: bool


class Copy:
    """`on_change`: is told which registers changed here."""

    def __init__(self, disk: Disk, tablets: int, rules: FollowRules = FOLLOW_RULES) -> None:
        self.registers = RegisterFile(disk, tablets)
        self.tablets = tablets
        self.on_change: Callable[[Sequence[GroupKey]], None] = lambda keys: None
        self.as_of_s: dict[int, float] = {}
        self.floors: dict[int, Ballot] = {}
        self.counters = {"applied": 0, "applied_bytes": 0, "erased": 0}
        self._disk = disk
        self._rules = rules
        self._open: dict[int, dict[GroupKey, Open]] = {}
        self._collected: dict[int, dict[GroupKey, Ballot]] = {}
        value = disk.get(Space.META, _KEY)
        try:
            self.noted = Coverage() if value is None else _decode(value)
        except msgspec.MsgspecError as error:
            raise StorageError(f"what a copy covers cannot be read ({error}): wipe the file, it is made anew") from None
        for key in self.registers.all_unsettled():
            self.open(key, doubtful=False)

    # ---- what is covered

    def covered_s(self, key: GroupKey) -> float:
        """Every write of the group that was acknowledged before this moment is in the copy; -inf: nothing is known."""
        tablet = self.registers.tablet(key)
        known = self._open.get(tablet, {}).get(key)
        if known is not None and self._rules.open_is_older:
            return known.since_s
        return self.as_of_s.get(tablet, NEVER_S)

    def prefix_covered_s(self, prefix: bytes) -> float:
        """The same of all groups that begin so, in whatever tablet."""
        covered_s = self.tablets_covered_s()
        if self._rules.open_is_older:
            for keys in self._open.values():
                covered_s = min([covered_s, *(one.since_s for key, one in keys.items() if key.startswith(prefix))])
        return covered_s

    def tablets_covered_s(self) -> float:
        """Up to which moment all tablets are covered, open registers aside."""
        return min((self.as_of_s.get(tablet, NEVER_S) for tablet in range(self.tablets)), default=NEVER_S)

    def noted_wall_s(self, key: GroupKey) -> float:
        """Up to when the group is covered by what the file says, with the registers that were open then; 0: never."""
        tablet = self.registers.tablet(key)
        return self.noted.open.get(key, self.noted.wall_s[tablet] if tablet < len(self.noted.wall_s) else 0.0)

    def noted_prefix_wall_s(self, prefix: bytes) -> float:
        """The same of all groups that begin so."""
        opened = (wall_s for key, wall_s in self.noted.open.items() if key.startswith(prefix))
        return min([*self.noted.wall_s, *opened], default=0.0)

    def told_at(self, key: GroupKey) -> Ballot:
        """The ballot of the state that is here; of none, a floor that nothing of the group can be below any more.

        What was heard of a register since it was opened may be below the floor that the tablet has now.
        """
        standing = self.standing(key)
        if standing != ZERO:
            return standing
        opened = self.opened(key)
        return self.floors.get(self.registers.tablet(key), ZERO) if opened is None else opened.floor

    def cover(self, tablet: int, begin_s: float, floor: Ballot = ZERO) -> None:
        """A round that began then is over: what its replicas named is here, or open. `floor`: as they told it then."""
        self.floors[tablet] = floor = max(floor, self.floors.get(tablet, ZERO))
        collected = self._collected.get(tablet, {})
        for key in [key for key, at in collected.items() if at <= floor]:
            if self.standing(key) == collected.pop(key):
                batch = Batch()
                self.registers.erase(batch, key)
                self._disk.submit(batch)
        self.as_of_s[tablet] = max(begin_s, self.as_of_s.get(tablet, NEVER_S))

    def open(self, key: GroupKey, *, doubtful: bool) -> None:
        """More is heard of the register than is here."""
        tablet = self.registers.tablet(key)
        opened = self._open.setdefault(tablet, {})
        known = opened.get(key)
        since_s = self.as_of_s.get(tablet, NEVER_S) if known is None else known.since_s
        floor = self.floors.get(tablet, ZERO) if known is None else known.floor
        opened[key] = Open(since_s, floor, doubtful or (known is not None and known.doubtful))

    def opened(self, key: GroupKey) -> Open | None:
        return self._open.get(self.registers.tablet(key), {}).get(key)

    def close(self, key: GroupKey) -> None:
        """What is here is where the register stood; one that holds an intent stays open.

        Should it have moved since it was asked, that was acknowledged after the round began, and the next one names it.
        """
        tablet = self.registers.tablet(key)
        known = self._open.get(tablet, {}).get(key)
        if known is None:
            return
        if self._rules.intents_stay_open and self.registers.header(key).intents:
            known.doubtful = False
            return
        del self._open[tablet][key]

    def doubtful(self) -> dict[int, list[GroupKey]]:
        """Registers whose replicas have to be asked, by tablet."""
        found = {t: [key for key, one in keys.items() if one.doubtful] for t, keys in self._open.items()}
        return {tablet: keys for tablet, keys in found.items() if keys}

    def open_count(self) -> int:
        return sum(len(keys) for keys in self._open.values())

    # ---- content

    def standing(self, key: GroupKey) -> Ballot:
        """The ballot of the state that is here; ZERO for none."""
        return self.registers.header(key).accepted

    def install(self, copies: Sequence[RegisterCopy]) -> int:
        """Submit these states, which are chosen, where they are newer; returns the batch's number, 0 for none."""
        changed, number = [], 0
        for copy in copies:
            header = copy.header
            if header.accepted <= self.standing(copy.key):
                continue
            batch = Batch()
            kept = Header(header.accepted, header.accepted, header.accepted, header.digest, header.deleted)
            stored = self.registers.replace(batch, copy.key, kept, copy.rows)
            number = self._disk.submit(batch)
            changed.append(copy.key)
            self.counters["applied"] += 1
            self.counters["applied_bytes"] += stored.size_bytes
            if stored.intents:
                self.open(copy.key, doubtful=False)
        if changed:
            self.on_change(changed)
        return number

    def collect(self, key: GroupKey, floors: Sequence[Ballot]) -> bool:
        """The register is gone from its replicas: deleted, and collected. `floors`: as they told them, ascending.

        A tombstone takes its place until the tablet has its floor here, too: the lowest that is above where it stood.
        A higher one may be of a later collection, and above what was made in its place since. False if there is none.
        """
        floor = next((floor for floor in floors if floor >= self.standing(key)), None)
        if floor is None:
            return False
        batch = Batch()
        self.registers.replace(batch, key, Header(floor, floor, floor, bytes(16), True), {})
        self._disk.submit(batch)
        self._collected.setdefault(self.registers.tablet(key), {})[key] = floor
        self.counters["erased"] += 1
        self.on_change([key])
        return True

    async def begin_again(self, generation: int) -> None:
        """Forget everything: the domain went on without some of it. In pieces, each on the disk before the next.

        The generation comes last: of a copy whose file names an earlier one than its chain not all may be forgotten.
        """
        self.as_of_s.clear()
        self._open.clear()
        self._collected.clear()
        self.floors.clear()
        self.noted = Coverage(self.noted.generation)
        self._note(self.noted)
        for tablet in range(self.tablets):
            while keys := self.registers.keys(tablet, limit=ERASE_KEYS):
                batch = Batch()
                for key in keys:
                    self.registers.erase(batch, key)
                await self._disk.durable(self._disk.submit(batch))
        self.noted = Coverage(generation)
        self._note(self.noted)

    # ---- for humans

    @property
    def complete(self) -> bool:
        """Whether all tablets were covered once, by what the file says: a PoP can be begun anew with that."""
        return len(self.noted.wall_s) == self.tablets and all(self.noted.wall_s)

    def note(self, now_s: float, wall_s: float) -> None:
        """Put into the file what is covered now; what came before the start counts until a tablet is covered anew."""
        ahead_s = wall_s - now_s
        before = (*self.noted.wall_s, *(0.0,) * self.tablets)
        covered = tuple(self.as_of_s[t] + ahead_s if t in self.as_of_s else before[t] for t in range(self.tablets))
        opened = {k: wall for k, wall in self.noted.open.items() if self.registers.tablet(k) not in self.as_of_s}
        for tablet, keys in self._open.items():
            for key, one in keys.items():
                known = one.since_s > NEVER_S
                opened[key] = one.since_s + ahead_s if known else self.noted.open.get(key, before[tablet])
        if len(opened) > OPEN_TOLD_MAX:
            least = min(opened.values())
            covered, opened = tuple(min(wall, least) for wall in covered), {}
        self.noted = Coverage(self.noted.generation, covered, opened)
        self._note(self.noted)

    def _note(self, coverage: Coverage) -> None:
        batch = Batch()
        batch.put(Space.META, _KEY, _encode(coverage))
        self._disk.submit(batch)


def is_chosen(copy: RegisterCopy, known: Ballot) -> bool:
    """Whether the state is known to be chosen: it is the one known to be, or carries its mark."""
    header = copy.header
    return header.accepted != ZERO and header.accepted >= known and header.accepted in (known, header.chosen)
