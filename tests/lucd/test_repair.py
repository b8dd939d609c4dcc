"""A daemon that was away while 2,000 groups were written: what remains to copy goes to nothing."""

from __future__ import annotations

import time

import pytest

from lucd import messages
from lucd.demo.daemons import LocalNode
from tests.cluster import Cluster
from tests.join.run import DATABASE, fill, group
from tests.lucd.test_three_daemons import eventually

pytestmark = pytest.mark.cluster
GROUPS = 2000
OPTIONS = "[limits]\nrepair_bytes_per_s = 500000\n"


def shown(node: LocalNode) -> messages.DomainReply:
    reply = node.client().call(messages.AskDomain(), repeatable=True)
    assert isinstance(reply, messages.DomainReply)
    return reply


def watch(node: LocalNode, about: str, timeout_s: float = 60.0) -> list[int]:
    """What the daemon said of the other one's remaining groups, and tablets, until all was whole and compared."""
    seen: list[int] = []
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        reply = shown(node)
        line = next((m for m in reply.members if m.node_id == about), None)
        left = 0 if line is None else line.to_copy + line.to_take_over
        if not seen or seen[-1] != left:
            seen.append(left)
        if line is not None and line.reachable and reply.state == "healthy" and max(seen) > 0 and not left:
            return seen
        time.sleep(0.05)
    raise AssertionError(f"{seen}, {shown(node).state_of_tablets}")


def test_daemon_that_was_away_copies_what_it_missed_and_says_how_much(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Cluster(tmp_path_factory.mktemp("repair"), nodes=3, options=OPTIONS) as cluster:
        first, second, third = cluster.nodes
        first.store().create_database(DATABASE)
        assert shown(first).state == "healthy"
        away = third.status()["node_id"]
        third.kill()
        eventually(lambda: shown(first).state == "degraded")
        fill([first, second], GROUPS)
        third.start()
        seen = watch(third, away)
        assert max(seen) > GROUPS / 4
        assert third.status()["to_copy"] == 0
        eventually(lambda: shown(third).unchecked == 0)
        # By itself it has what it missed: with either of the others gone, the rest is a majority.
        first.kill()
        assert all(found.rows for found in third.store().read([group(n) for n in range(GROUPS)]))
