"""Seats in `global` of nodes that a recovered PoP had before: freed by the recovery, or by hand on any node."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dht.domain.roster import Member
from dht.errors import Invalid
from lucd.pop_recovery import PopRecoverer
from lucd.report import Report

NEW, DEAD, BACK, FAR = (bytes([n]) * 20 for n in (1, 2, 3, 4))


def member(node: bytes, pop: str) -> Member:
    return Member(node, b"i" * 16, pop, "host", "h:1")


class Domain:
    """With these members now, who had those before; takes out whoever does not answer."""

    def __init__(
        self, name: str, members: list[Member], before: list[bytes], answering: tuple[bytes, ...] = ()
    ) -> None:
        by_node = {m.node_id: m for m in members}
        self.name, self.local = name, SimpleNamespace(node_id=NEW)
        newest = SimpleNamespace(members=tuple(members), member=by_node.get)
        self.chain = SimpleNamespace(newest=newest, knows=[*by_node, *before].__contains__)
        self.left: list[tuple[bytes, bool]] = []
        self._answering = answering

    async def leave(self, node: bytes, *, drain: bool) -> int:
        if node in self._answering:
            raise Invalid(f"node {node.hex()} answers; drain it, or stop it first")
        self.left.append((node, drain))
        return 1


def domains() -> tuple[Any, Any]:
    seats = [member(DEAD, "lyon"), member(NEW, "lyon"), member(BACK, "lyon"), member(FAR, "nice")]
    return Domain("lyon", [member(NEW, "lyon")], [DEAD, BACK]), Domain("global", seats, [], (BACK,))


async def test_recovery_frees_the_seats_of_its_own_pop_alone_and_says_how_to_free_what_it_could_not() -> None:
    own, wide = domains()
    recoverer = PopRecoverer(SimpleNamespace(domain=own), wide, b"i" * 16, *[None] * 4)  # type: ignore[arg-type]
    freed, kept = await recoverer.free_seats()
    assert freed.startswith(f"node {DEAD.hex()} was taken out of domain global")
    assert kept == (
        f"node {BACK.hex()} keeps its seat in domain global (node {BACK.hex()} answers; drain it, or stop it first); "
        f"when it is gone for good, free it with `lucd node remove {BACK.hex()}`"
    )
    assert wide.left == [(DEAD, False)]


async def test_recovery_that_is_ordered_again_leaves_the_seats_of_nodes_that_joined_the_pop_meanwhile() -> None:
    own, wide = domains()
    own.chain.newest.member = {NEW: member(NEW, "lyon"), DEAD: member(DEAD, "lyon")}.get
    recoverer = PopRecoverer(SimpleNamespace(domain=own), wide, b"i" * 16, *[None] * 4)  # type: ignore[arg-type]
    assert len(await recoverer.free_seats()) == 1
    assert wide.left == []


async def test_node_of_the_pop_before_its_recovery_is_removed_from_global_on_a_new_node_of_the_pop() -> None:
    own, wide = domains()
    parts: Any = SimpleNamespace(own=SimpleNamespace(domain=own), wide=SimpleNamespace(domain=wide))
    report = Report.__new__(Report)
    report._parts = parts
    await report.drain(DEAD.hex(), lost=True)
    await report.drain(FAR.hex(), lost=True)
    assert (own.left, wide.left) == ([], [(DEAD, False), (FAR, False)])
    await report.drain(NEW.hex())
    assert own.left == [(NEW, True)]
