"""What a node serves, asked after each change: no answer outlives what it was made of."""

from __future__ import annotations

from dht.domain.rules import RULES
from dht.domain.tablets import Tablets
from dht.model import ZERO
from dht.storage.memory import MemoryDisk
from dht.world import Batch


async def test_tablet_is_served_when_it_is_initialised_durably_and_until_it_is_sealed() -> None:
    disk = MemoryDisk()
    tablets = Tablets(disk, RULES)
    assert tablets.serves(3) == 0
    batch = Batch()
    tablets.found(batch, 3, 1)
    assert tablets.serves(3) == 0
    tablets.submit(batch)
    assert tablets.serves(3) == 1
    tablets.seal(3, 1)
    assert tablets.serves(3) == 0
    batch = Batch()
    tablets.initialise(batch, 3, 2, 1, ZERO)
    assert tablets.serves(3) == 0
    number = tablets.flip(batch, 3)
    assert tablets.serves(3) == 0
    await tablets.confirm(3, number)
    assert tablets.serves(3) == 2
    batch = Batch()
    tablets.drop(batch, 3)
    assert tablets.serves(3) == 2
    tablets.submit(batch)
    assert (tablets.serves(3), tablets.serves(4)) == (0, 0)
    assert Tablets(disk, RULES).serves(3) == 0
