"""What a coordinator tries again by itself, in a group that forgets: one hand-made schedule for each way there.

As in test_rare_rules_register: every story is told with the rule and without it.
"""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from dht.errors import DhtError, Indeterminate
from dht.limits import WINDOW_TRANSACTIONS
from dht.model import Columns, GroupKey, Struct
from dht.register.group import WINDOW_SLACK_TRANSACTIONS
from dht.register.messages import Accept, Coordinate, Kind, Prepare
from dht.register.rules import Rules
from tests.dht.register.register_cluster import StaticDomain
from tests.sim.bench import Bench, failed, insert, play, update

BOTH = pytest.mark.parametrize("on", [True, False], ids=["on", "off"])


async def forgetful(bench: Bench, key: GroupKey, columns: Columns) -> None:
    """A group that has forgotten transactions, coordinated by 0."""
    await bench.propose(0, insert(key, columns))
    for number in range(WINDOW_TRANSACTIONS + WINDOW_SLACK_TRANSACTIONS + 1):
        await bench.propose(0, update(key, {0: number}))


def check(on: bool, outcome: tuple[DhtError | None, Columns | None], applied: Columns) -> None:
    error, row = outcome
    if on:
        assert error is None
        assert row == applied
    else:
        assert isinstance(error, Indeterminate)
        assert error.detail["forgotten"]


@BOTH
def test_seen_kept_write_that_met_an_intent_after_its_accept_failed_is_applied(on: bool) -> None:
    """0's accept of a write reaches nobody. Meanwhile 2 puts an intent into the group, of a transaction whose commit is
    held back for a moment; so 0 finds it when it prepares anew, and the write waits for the transaction's end.
    """

    async def story(bench: Bench) -> tuple[DhtError | None, Columns | None]:
        await bench.define()
        key, primary = bench.key(0), bench.key(1)
        await forgetful(bench, key, {0: 0, 1: 0, 2: 0})
        await bench[1].commit(bench.transaction(insert(primary, {0: 0, 1: 0})))
        go_on = asyncio.Event()
        apart = True

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Coordinate) and message.operation.kind == Kind.COMMIT_PRIMARY:
                await go_on.wait()
            return not (apart and 0 in (sender, to) and isinstance(message, (Accept, Prepare)))

        bench.gate = gate
        write = asyncio.create_task(failed(bench[0].commit(bench.transaction(update(key, {1: 1})), timeout_s=9.0)))
        await asyncio.sleep(0.01)
        bench.silent = lambda me, node: node == bench.ids[0] and node != me
        both = bench.transaction(update(primary, {0: 1, 1: 1}), update(key, {2: 2}))
        other = asyncio.create_task(bench[2].commit(both, timeout_s=9.0))
        await asyncio.sleep(0.1)
        apart = False
        bench.silent = lambda me, node: False
        await asyncio.sleep(2.0)
        go_on.set()
        await other
        return await write, await bench.row(1, key)

    applied = {0: WINDOW_TRANSACTIONS + WINDOW_SLACK_TRANSACTIONS, 1: 1, 2: 2}
    check(on, play(story, Rules(seen_kept=on)), applied)


@BOTH
def test_seen_kept_write_whose_coordinator_lost_the_tablet_is_applied_by_another(on: bool) -> None:
    """0's accept of a write reaches nobody, and by the time it fails the tablet has moved away from 0, which asks 1."""

    async def story(bench: Bench) -> tuple[DhtError | None, Columns | None]:
        await bench.define()
        key = bench.key(0)
        await forgetful(bench, key, {0: 0, 1: 0})

        async def gate(sender: int, to: int, message: Struct) -> bool:
            return not (sender == 0 and isinstance(message, (Accept, Prepare)))

        bench.gate = gate
        write = asyncio.create_task(failed(bench[0].commit(bench.transaction(update(key, {1: 1})), timeout_s=9.0)))
        await asyncio.sleep(0.01)
        for number in range(3):
            domain = bench[number]._context.domain
            assert isinstance(domain, StaticDomain)
            tablets = tuple(tuple(node for node in nodes if node != bench.ids[0]) for nodes in domain.roster.tablets)
            domain.roster = msgspec.structs.replace(domain.roster, tablets=tablets)
        return await write, await bench.row(1, key)

    check(on, play(story, Rules(seen_kept=on)), {0: WINDOW_TRANSACTIONS + WINDOW_SLACK_TRANSACTIONS, 1: 1})
