"""Claims of PoPs: the first that asks has the name, and every PoP an index that no other ever had."""

from __future__ import annotations

import asyncio

import pytest

from dht.errors import Conflict, Invalid
from dht.limits import WINDOW_TRANSACTIONS
from dht.model import Applied, PopClaim, Transaction
from dht.register import catalog
from dht.register.group import WINDOW_SLACK_TRANSACTIONS
from dht.rows import encode_row, row_key
from tests.dht.register.register_cluster import Cluster


def node(number: int) -> bytes:
    return bytes([number]) * 20


@pytest.fixture
async def cluster():
    started = Cluster()
    yield started
    await started.stop()


async def test_many_that_claim_one_pop_at_once_are_told_of_one(cluster: Cluster) -> None:
    claims = await asyncio.gather(*(cluster[n % 3].claim_pop("lyon", node(n), b"i" * 16) for n in range(9)))
    assert len(set(claims)) == 1
    assert await cluster[1].pops() == {"lyon": claims[0]}


async def test_pops_that_are_claimed_at_once_have_indexes_of_their_own(cluster: Cluster) -> None:
    claims = await asyncio.gather(*(cluster[n % 3].claim_pop(f"pop{n}", node(n), b"i" * 16) for n in range(9)))
    assert sorted(claim.index for claim in claims) == list(range(9))
    assert list((await cluster[0].pops()).values()) == sorted(claims, key=lambda claim: claim.index)


async def test_pop_that_was_founded_already_gets_the_index_that_it_had_or_none(cluster: Cluster) -> None:
    await cluster[0].claim_pop("lyon", node(1), b"i" * 16)
    assert (await cluster[1].claim_pop("nice", node(2), b"i" * 16, index=7)).index == 7
    with pytest.raises(Invalid, match="index 7 was given to another"):
        await cluster[1].claim_pop("metz", node(3), b"i" * 16, index=7)
    for senseless in (-1, 255, 300):
        with pytest.raises(Invalid, match="no index of a PoP"):
            await cluster[1].claim_pop("metz", node(3), b"i" * 16, index=senseless)
    assert (await cluster[2].claim_pop("brest", node(4), b"i" * 16)).index == 8


async def test_of_two_recoveries_that_read_one_claim_only_one_takes_the_pop(cluster: Cluster) -> None:
    """Also where the claim is the first one's already, of an order that broke off."""
    first = await cluster[0].claim_pop("lyon", node(1), b"i" * 16)
    broke_off = catalog.recovering(first, node(2), b"j" * 16, 2)
    await cluster[1].move_pop("lyon", first, broke_off)
    assert await cluster[0].pops() == {"lyon": broke_off}
    again = catalog.recovering(broke_off, node(2), b"j" * 16, 3)
    other = catalog.recovering(broke_off, node(3), b"k" * 16, 3)
    told = await asyncio.gather(
        cluster[0].move_pop("lyon", broke_off, again),
        cluster[2].move_pop("lyon", broke_off, other),
        return_exceptions=True,
    )
    assert sorted(type(one) for one in told if one is not None) == [Conflict]
    assert await cluster[1].pops() == {"lyon": again if told[0] is None else other}
    assert (catalog.recovered_generation(first), catalog.recovered_generation(again)) == (0, 3)


def given(*claims: tuple[str, int, int | None]) -> dict[bytes, bytes]:
    """The list's rows after these claims: (PoP, index, generation in which it was new)."""
    parts = [catalog.pop_claimed(pop, PopClaim(node(index), b"i" * 16, index), since) for pop, index, since in claims]
    return {row_key(0, change.pk): encode_row(change.columns) for part in parts for change in part.changes}


def test_first_index_of_a_recovered_list_is_none_that_a_lost_pop_may_have() -> None:
    kept = [("lyon", 0, 1), ("nice", 1, 1)]
    first = 2 + catalog.INDEXES_LEFT_OUT
    assert catalog.next_pop_index(given(*kept), generation=1) == 2
    assert catalog.next_pop_index(given(*kept), generation=2) == first
    entered_again = ("metz", 3, None)
    assert catalog.next_pop_index(given(*kept, entered_again), generation=2) == first + 2
    new = ("brest", first, 2)
    assert catalog.next_pop_index(given(*kept, new), generation=2) == first + 1
    assert catalog.next_pop_index(given(*kept, new), 2, generation=2) == 2, "who had one has it again"
    assert catalog.next_pop_index({}, generation=2) == catalog.INDEXES_LEFT_OUT


def test_gaps_are_filled_when_the_highest_index_was_given() -> None:
    assert catalog.next_pop_index(given(("lyon", 0, 1), ("nice", catalog.POPS_MAX - 1, None))) == 1
    assert catalog.next_pop_index(given(("lyon", catalog.POPS_MAX - 10, 1)), generation=2) == 0


async def test_claim_after_a_recovery_notes_in_which_generation_the_index_was_new(cluster: Cluster) -> None:
    await cluster[0].claim_pop("lyon", node(1), b"i" * 16)
    for domain in cluster.domains.values():
        domain.generation = 2
    indexes = [(await cluster[n % 3].claim_pop(f"pop{n}", node(n), b"i" * 16)).index for n in (2, 3, 4)]
    assert indexes == [1 + catalog.INDEXES_LEFT_OUT + n for n in range(3)]


async def test_no_pop_more_than_there_are_indexes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "POPS_MAX", 2)
    for number, pop in enumerate(("lyon", "nice")):
        await cluster[0].claim_pop(pop, node(number), b"i" * 16)
    with pytest.raises(Invalid, match="has had 2 PoPs, which is as many as there may ever be"):
        await cluster[0].claim_pop("metz", node(3), b"i" * 16)
    assert (await cluster[0].claim_pop("nice", node(4), b"i" * 16)).node == node(1)


async def test_change_of_a_long_used_list_that_is_sent_again_is_still_told_from_an_old_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(WINDOW_TRANSACTIONS + WINDOW_SLACK_TRANSACTIONS + 1):
        await cluster[0].create_database(f"db{number}")
    transactions = cluster[1]._databases._transactions
    commit = transactions.commit

    async def again(transaction: Transaction, attempt: int, deadline: float) -> Applied:
        return await commit(transaction, attempt + 1, deadline)

    monkeypatch.setattr(transactions, "commit", again)
    assert await cluster[1].create_database("late")
    assert await cluster[1].drop_database("db1")
