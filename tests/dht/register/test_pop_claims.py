"""Claims of PoPs: the first that asks has the name, and every PoP an index that no other ever had."""

from __future__ import annotations

import asyncio

import pytest

from dht.errors import Invalid
from dht.register import catalog
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
    assert (await cluster[2].claim_pop("brest", node(4), b"i" * 16)).index == 1


async def test_no_pop_more_than_there_are_indexes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "POPS_MAX", 2)
    for number, pop in enumerate(("lyon", "nice")):
        await cluster[0].claim_pop(pop, node(number), b"i" * 16)
    with pytest.raises(Invalid, match="has had 2 PoPs, which is as many as there may ever be"):
        await cluster[0].claim_pop("metz", node(3), b"i" * 16)
    assert (await cluster[0].claim_pop("nice", node(4), b"i" * 16)).node == node(1)
