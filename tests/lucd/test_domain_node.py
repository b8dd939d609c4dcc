"""A node's files of its two domains, and what it refuses of its peers before any store is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dht import requests
from dht.errors import Invalid, StorageError
from dht.model import GLOBAL, PopClaim
from dht.overlay.messages import pop_prefix
from lucd.domain_node import DomainNode, open_file

IDENTITY: Any = SimpleNamespace(node_id=b"n" * 20, incarnation=b"i" * 16)
NODE = pop_prefix("lyon") + b"n" * 16


def test_file_of_the_other_domain_is_refused(tmp_path: Path) -> None:
    """Both are this node's and as new as they should be, so nothing else tells that they were exchanged."""
    path = tmp_path / "store.sqlite"
    open_file(path, IDENTITY, 0, 0, "lyon").close()
    open_file(path, IDENTITY, 0, 0, "lyon").close()
    with pytest.raises(StorageError, match=r"is the file of domain lyon, and the one of global is expected.*wipe"):
        open_file(path, IDENTITY, 0, 0, GLOBAL)


class Registry:
    async def claim_pop(self, pop: str, node: bytes, incarnation: bytes, *more: object) -> PopClaim:
        return PopClaim(node, incarnation, 0)


async def claim(sender: bytes, pop: str, node: bytes) -> PopClaim:
    wide: Any = SimpleNamespace(name=GLOBAL, domain=SimpleNamespace(joined=True), store=Registry())
    reply = await DomainNode._answer_client(wide, sender, requests.ClaimPop(pop, node, b"i" * 16))
    assert isinstance(reply, requests.ClaimPopReply)
    return reply.claim


async def test_pop_is_claimed_by_its_own_nodes_each_for_itself() -> None:
    assert (await claim(NODE, "lyon", NODE)).node == NODE
    other = pop_prefix("lyon") + b"o" * 16
    for sender, pop, node in ((other, "lyon", NODE), (NODE, "nice", NODE), (NODE, "", NODE)):
        with pytest.raises(Invalid, match="claimed by its own nodes"):
            await claim(sender, pop, node)
