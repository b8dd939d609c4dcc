"""What this node has promised about each tablet: sealed and initialised epochs, durable (DESIGN section 5, rules 1-4).

Key in Space.TABLET: tablet (2 bytes). Pure bookkeeping over the disk: nothing here talks to peers.
"""

from __future__ import annotations

import msgspec

from dht.domain.rules import DomainRules
from dht.errors import StorageError
from dht.model import ZERO, Ballot, Struct
from dht.world import Batch, Disk, Space


class TabletState(Struct, frozen=True):
    """`sealed`: nothing at this or a lower epoch is answered any more. `initialised`: all epochs ever initialised,
    ascending; the content belongs to the last. `floor`: promise of registers without a value (rule 7). `dropped`: the
    content was erased when no replica set up to this epoch could be asked for any more. `agreed`: a floor that every
    replica is known to have, or one of an epoch before; no register without a value can get one at a ballot below.
    """

    sealed: int = 0
    initialised: tuple[int, ...] = ()
    floor: Ballot = ZERO
    dropped: int = 0
    agreed: Ballot = ZERO

    @property
    def current(self) -> int:
        """The newest initialised epoch, 0 if none."""
        return self.initialised[-1] if self.initialised else 0


_EMPTY = TabletState()
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(TabletState).decode


def tablet_key(tablet: int) -> bytes:
    return tablet.to_bytes(2, "big")


class Tablets:
    """States of all tablets, read at construction, changed through batches only: as they are submitted, not before.

    So nothing is told of a change that the disk did not take.
    """

    def __init__(self, disk: Disk, rules: DomainRules) -> None:
        self._disk = disk
        self._rules = rules
        self._states: dict[int, TabletState] = {}
        self._submitted = 0
        self._unconfirmed: dict[int, int] = {}
        # What `serves` answered since anything changed: every message asks, and a find asks for every tablet.
        self._served: dict[int, int] = {}
        for key, value in disk.range(Space.TABLET, b"", None):
            try:
                self._take(key, value)
            except msgspec.MsgspecError as error:
                raise StorageError(
                    f"the state of a tablet cannot be read ({error}): the file is damaged or of another version; wipe "
                    "this node's data directory, it is rebuilt from the other replicas"
                ) from None

    def state(self, tablet: int) -> TabletState:
        return self._states.get(tablet, _EMPTY)

    def known(self) -> tuple[int, ...]:
        """Tablets with a state, ascending."""
        return tuple(sorted(self._states))

    def held(self) -> tuple[int, ...]:
        """Tablets with content here to hand over, or to let go of, as a member or after having been one."""
        return tuple(t for t in self.known() if self.state(t).initialised)

    def serves(self, tablet: int) -> int:
        """The epoch at which this node votes on the tablet, 0 if none."""
        served = self._served.get(tablet)
        if served is None:
            if (state := self._states.get(tablet)) is None:
                return 0
            voting = state.sealed < state.current and tablet not in self._unconfirmed
            served = self._served[tablet] = state.current if voting else 0
        return served

    def confirmed(self, tablet: int) -> bool:
        """Whether the newest initialisation is durable."""
        return tablet not in self._unconfirmed

    async def confirm(self, tablet: int, number: int) -> None:
        """Wait until the initialisation in the batch is durable; only from then on is the tablet served."""
        await self._disk.durable(number)
        if self._unconfirmed.get(tablet) == number:
            del self._unconfirmed[tablet]
            self._served.clear()

    def seal(self, tablet: int, epoch: int) -> int:
        """Submit the seal; returns the number to await before answering, also where it was sealed before.

        Raises StorageError when the disk has failed: nothing can be taken over from here, so this seal must not count.
        """
        if self._disk.failed is not None:
            raise StorageError(self._disk.failed)
        state = self.state(tablet)
        if self._rules.seal and state.sealed < epoch:
            batch = Batch()
            self._put(batch, tablet, msgspec.structs.replace(state, sealed=epoch))
            self.submit(batch)
        return self._submitted

    def submit(self, batch: Batch) -> int:
        """Submit a batch that changes states; they are in force at once. Raises StorageError, and none is."""
        self._submitted = self._disk.submit(batch)
        for space, key, value in batch.writes:
            if space == Space.TABLET and value is not None:
                self._take(key, value)
        return self._submitted

    def flip(self, batch: Batch, tablet: int) -> int:
        """Submit a batch that holds `initialise`; `confirm` follows."""
        self._unconfirmed[tablet] = number = self.submit(batch)
        self._served.clear()
        return number

    def may_initialise(self, tablet: int, epoch: int) -> bool:
        """Rule 3: once, and not when that or a newer epoch is sealed or initialised."""
        state = self.state(tablet)
        return not self._rules.refuse_stale_init or (state.sealed < epoch and state.current < epoch)

    def found(self, batch: Batch, tablet: int, epoch: int) -> None:
        """Into the founder's batch: initialised and empty."""
        self._put(batch, tablet, TabletState(initialised=(epoch,)))

    def initialise(self, batch: Batch, tablet: int, epoch: int, before: int, floor: Ballot) -> None:
        """Into the batch that makes the content the tablet's: initialised at `epoch`, sealed at the one before."""
        state = self.state(tablet)
        carried = max(state.floor, floor) if self._rules.floor_carried else ZERO
        after = TabletState(
            max(state.sealed, before), tuple(sorted({*state.initialised, epoch})), carried, state.dropped, carried
        )
        if self._rules.init_durable:
            self._put(batch, tablet, after)
        else:
            self._states[tablet] = after
            self._served.clear()

    def raise_floor(self, batch: Batch, tablet: int, floor: Ballot) -> None:
        """Into the batch: nothing without a value is accepted below the floor any more (rule 7)."""
        state = self.state(tablet)
        if self._rules.floor_raised:
            self._put(batch, tablet, msgspec.structs.replace(state, floor=max(state.floor, floor)))

    def agree(self, batch: Batch, tablet: int, floor: Ballot) -> None:
        """Into the batch: every replica of the tablet has raised its floor so far."""
        state = self.state(tablet)
        if self._rules.floor_raised:
            raised = msgspec.structs.replace(state, floor=max(state.floor, floor), agreed=max(state.agreed, floor))
            self._put(batch, tablet, raised)

    def drop(self, batch: Batch, tablet: int) -> None:
        """Into the batch that erases the content, once every current replica is initialised without it."""
        state = self.state(tablet)
        upto = max(state.sealed, state.current)
        self._put(batch, tablet, TabletState(upto, (), ZERO, upto))

    def _take(self, key: bytes, value: bytes) -> None:
        self._states[int.from_bytes(key, "big")] = _decode(value)
        self._served.clear()

    @staticmethod
    def _put(batch: Batch, tablet: int, state: TabletState) -> None:
        batch.put(Space.TABLET, tablet_key(tablet), _encode(state))
