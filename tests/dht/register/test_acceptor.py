"""An acceptor's rules, one by one."""

from __future__ import annotations

import asyncio
import random

import pytest
from register_cluster import LoopClock, StaticDomain, eventually

from dht.errors import Invalid, NotServing, RemoteProtocolError
from dht.model import ZERO, Ballot, Comparison, Constraint, FindQuery
from dht.register.acceptor import Acceptor
from dht.register.admission import check_query
from dht.register.context import Context
from dht.register.group import APPLIED, GroupState, pack_ballot, window_key
from dht.register.messages import Accept, Chosen, Prepare, ReadItem, ReadReplica, Verdict, Wanted
from dht.rows import encode_row, group_key, row_key
from dht.storage.memory import MemoryDisk
from dht.storage.registers import RegisterFile

KEY = group_key("db", "f", ("g",))
ME = b"A" * 20


def ballot(n: int, epoch: int = 1, generation: int = 1) -> Ballot:
    return Ballot(generation, epoch, n, ME, 1, n)


@pytest.fixture
def acceptor() -> Acceptor:
    disk = MemoryDisk()
    file = RegisterFile(disk)
    domain = StaticDomain(ME, [ME], 1, 64)
    return Acceptor(Context(ME, 1, LoopClock(), random.Random(1), None, disk, file, domain))


def accept(n: int, base: Ballot, delta: dict, state: GroupState, next: Ballot | None = None, whole=False) -> Accept:
    state.apply(delta)
    rows = dict(state.rows) if whole else delta
    return Accept(KEY, ballot(n), next, base, whole, rows, state.digest.to_bytes(16, "big"), state.deleted)


def row(n: int) -> dict:
    return {row_key(1, (n,)): encode_row({0: n})}


def test_promise_below_the_promise_is_refused_and_names_it(acceptor):
    assert acceptor.prepare(Prepare(KEY, ballot(5), None))[0].ok
    for n in (4, 5):
        reply, _ = acceptor.prepare(Prepare(KEY, ballot(n), None))
        assert (reply.ok, reply.promise) == (False, ballot(5))


def test_accept_below_the_promise_is_refused_and_names_it(acceptor):
    acceptor.prepare(Prepare(KEY, ballot(5), None))
    reply, _ = acceptor.accept(accept(4, ZERO, row(1), GroupState({}, ZERO)))
    assert (reply.verdict, reply.promise, reply.accepted) == (Verdict.REFUSED, ballot(5), ZERO)


def test_accept_promises_the_next_ballot_with_it(acceptor):
    acceptor.accept(accept(2, ZERO, row(1), GroupState({}, ZERO), next=ballot(3)))
    assert not acceptor.prepare(Prepare(KEY, ballot(3), None))[0].ok
    reply, _ = acceptor.prepare(Prepare(KEY, ballot(4), None))
    assert (reply.ok, reply.accepted, reply.rows) == (True, ballot(2), row(1))


def test_prepare_brings_no_rows_that_are_known(acceptor):
    acceptor.accept(accept(2, ZERO, row(1), GroupState({}, ZERO)))
    assert acceptor.prepare(Prepare(KEY, ballot(3), ballot(2)))[0].rows is None


def test_delta_on_another_base_or_with_another_digest_asks_for_the_whole(acceptor):
    state = GroupState({}, ZERO)
    acceptor.accept(accept(2, ZERO, row(1), state))
    other = GroupState(dict(state.rows), ballot(2))
    assert acceptor.accept(accept(4, ballot(3), row(2), other))[0].verdict == Verdict.NEED_WHOLE
    wrong = GroupState(row(9), ballot(2))
    assert acceptor.accept(accept(4, ballot(2), row(2), wrong))[0].verdict == Verdict.NEED_WHOLE
    assert acceptor.accept(accept(4, ballot(3), {}, other, whole=True))[0].verdict == Verdict.ACCEPTED
    (read,) = acceptor.read(ReadReplica((ReadItem(KEY, 1, Wanted.DATA),)))[0].items
    assert (read.accepted, read.rows) == (ballot(4), row(1) | row(2))


def test_entry_of_the_window_that_is_here_already_brings_the_whole(acceptor):
    """Nobody looks for one before he writes it, so the digest has to tell."""
    entry = window_key(b"t" * 16)
    old, new = ({entry: encode_row({0: pack_ballot(ballot(n)), 1: APPLIED})} for n in (2, 3))
    state = GroupState({}, ZERO)
    acceptor.accept(accept(2, ZERO, row(1) | old, state))
    assert acceptor.accept(accept(3, ballot(2), new, state))[0].verdict == Verdict.NEED_WHOLE
    assert acceptor.accept(accept(3, ballot(2), {}, state, whole=True))[0].verdict == Verdict.ACCEPTED
    assert acceptor.rows(KEY, Wanted.SYSTEM) == new
    assert acceptor.accept(accept(4, ballot(3), {entry: None}, state))[0].verdict == Verdict.ACCEPTED
    assert acceptor.rows(KEY, Wanted.SYSTEM) == {}


def test_accept_reads_nothing_of_a_new_entry_of_the_window_nor_of_a_register_without_a_value(acceptor, monkeypatch):
    looked_for = []
    monkeypatch.setattr(acceptor._file, "row", lambda key, rowkey: looked_for.append(rowkey) or encode_row({0: 1}))
    state = GroupState({}, ZERO)
    acceptor.accept(accept(2, ZERO, row(1), state))
    assert looked_for == []
    delta = {window_key(b"t" * 16): encode_row({0: pack_ballot(ballot(3)), 1: APPLIED}), row_key(1, (1,)): b"\x80"}
    assert acceptor.accept(accept(3, ballot(2), delta, state))[0].verdict == Verdict.ACCEPTED
    assert looked_for == [row_key(1, (1,))]


def test_whole_whose_rows_do_not_give_the_digest_is_a_protocol_error(acceptor):
    with pytest.raises(RemoteProtocolError):
        acceptor.accept(Accept(KEY, ballot(2), None, ZERO, True, row(1), b"x" * 16, False))


@pytest.mark.parametrize("wrong", [ballot(9, epoch=2), ballot(9, generation=2)])
def test_ballot_of_another_epoch_or_generation_is_not_served(acceptor, wrong):
    with pytest.raises(NotServing) as caught:
        acceptor.prepare(Prepare(KEY, wrong, None))
    assert caught.value.detail["roster_epoch"] == 1


def test_read_at_another_epoch_is_answered_as_not_serving(acceptor):
    here, there = acceptor.read(ReadReplica((ReadItem(KEY, 1, Wanted.DATA), ReadItem(KEY, 2, Wanted.DATA))))[0].items
    assert (here.serving, here.rows) == (True, {})
    assert (there.serving, there.rows) == (False, None)


async def test_chosen_mark_counts_only_for_the_state_held(acceptor):
    acceptor.accept(accept(2, ZERO, row(1), GroupState({}, ZERO)))
    file = acceptor._file
    acceptor.chosen(Chosen((KEY,), (ballot(1),)))
    assert not file.header(KEY).settled
    acceptor.chosen(Chosen((KEY,), (ballot(2),)))
    assert file.header(KEY).settled


async def test_chosen_marks_of_a_while_are_one_batch(acceptor, monkeypatch):
    monkeypatch.setattr("dht.register.acceptor.MARKS_KEPT_AFTER_S", 0.01)
    acceptor.accept(accept(2, ZERO, row(1), GroupState({}, ZERO)))
    batches = []
    submit = acceptor._disk.submit
    monkeypatch.setattr(acceptor._disk, "submit", lambda batch: batches.append(batch) or submit(batch))
    for _ in range(3):
        acceptor.chosen(Chosen((KEY,), (ballot(2),)))
    assert not batches
    await eventually(lambda: batches)
    assert RegisterFile(acceptor._disk).header(KEY).settled
    await asyncio.sleep(0.03)
    assert len(batches) == 1


def test_register_without_header_keeps_the_floor_of_its_tablet(acceptor):
    acceptor._context.domain.floors = ballot(7)
    assert not acceptor.prepare(Prepare(KEY, ballot(7), None))[0].ok
    assert acceptor.prepare(Prepare(KEY, ballot(8), None))[0].ok


def test_register_without_value_keeps_the_floor_of_its_tablet_above_its_own_promise(acceptor):
    assert acceptor.prepare(Prepare(KEY, ballot(2), None))[0].ok
    acceptor._context.domain.floors = ballot(7)
    late = accept(2, ZERO, row(1), GroupState({}, ZERO))
    assert acceptor.accept(late)[0].verdict == Verdict.REFUSED


@pytest.mark.parametrize(
    "wrong",
    [
        FindQuery("db", 0, 1),
        FindQuery("db", 1, 1, limit=-1),
        FindQuery("db", 1, 1, (Constraint(1, Comparison.EQ),)),
        FindQuery("db", 1, 1, (Constraint(1, Comparison.LT, (1, 2)),)),
        FindQuery("db", 1, 1, (Constraint(1, Comparison.IS_NULL, (1,)),)),
        FindQuery("db", 1, 1, (Constraint(1, Comparison.IN, (1, [])),)),
    ],
)
def test_malformed_query_is_invalid(wrong):
    with pytest.raises(Invalid):
        check_query(wrong)
