"""Who listens where, whose turn it is, what came before: the bookkeeping by itself."""

from __future__ import annotations

import pytest

from dht.errors import Unavailable
from nova_bridge.rpc import listeners
from nova_bridge.rpc.bus_messages import Address
from nova_bridge.rpc.listeners import Once, PopTable, Seen, Turns
from nova_bridge.rpc.peer_messages import Heard

ONE, TWO = b"1" * 20, b"2" * 20
TOPIC = Address("ex", "t")
POOL = Address("ex", "t", pool="p")


def test_table_holds_what_each_node_told_last():
    table = PopTable()
    assert table.told(ONE, 1, 1, (Heard(TOPIC, True), Heard(POOL, False)))
    assert table.told(TWO, 1, 1, (Heard(TOPIC, False),))
    assert table.nodes(TOPIC) == [ONE, TWO]
    assert table.pools(TOPIC) == [POOL]
    assert (table.takes_fanouts(TOPIC, ONE), table.takes_fanouts(TOPIC, TWO)) == (True, False)
    assert table.told(ONE, 1, 2, ())
    assert (table.nodes(TOPIC), table.pools(TOPIC), table.takes_fanouts(TOPIC, ONE)) == ([TWO], [], False)
    assert (ONE in table, table.addresses) == (True, 1)


def test_older_news_do_not_replace_newer_ones():
    table = PopTable()
    table.told(ONE, 2, 5, (Heard(TOPIC, True),))
    for boot, version in ((2, 5), (2, 4), (1, 9)):
        assert not table.told(ONE, boot, version, ())
    assert table.nodes(TOPIC) == [ONE]
    assert table.told(ONE, 3, 1, ())
    assert (table.nodes(TOPIC), table.boot(ONE)) == ([], 3)


def test_forgotten_node_leaves_nothing_behind():
    table = PopTable()
    table.told(ONE, 1, 1, (Heard(TOPIC, True), Heard(POOL, True)))
    table.forget(ONE)
    assert (table._nodes, table._fanouts, table._pools, table.known(), table.addresses) == ({}, {}, {}, [], 0)


def test_table_is_bounded(monkeypatch):
    monkeypatch.setattr(listeners, "TABLE_ADDRESSES_MAX", 2)
    table = PopTable()
    table.told(ONE, 1, 1, (Heard(TOPIC, True), Heard(POOL, True)))
    with pytest.raises(Unavailable):
        table.told(TWO, 1, 1, (Heard(TOPIC, True),))
    assert table.told(ONE, 1, 2, (Heard(POOL, True), Heard(TOPIC, True)))


def test_turns_are_of_each_address_and_bounded(monkeypatch):
    monkeypatch.setattr(listeners, "TURNS_MAX", 2)
    turns = Turns()
    assert [turns.choose(address, [ONE, TWO]) for address in (TOPIC, POOL) * 2] == [ONE, ONE, TWO, TWO]
    turns.choose(Address("ex", "other"), [ONE])
    assert len(turns._next) == 2


def test_message_that_came_is_known_whatever_was_made_of_it():
    once = Once()
    once.note(ONE, 1, 1, True)
    once.note(ONE, 1, 2, False)
    seen = [once.seen(ONE, 1, number, again) for number in (1, 2, 3) for again in (False, True)]
    assert seen == [Seen.TAKEN] * 2 + [Seen.REFUSED] * 2 + [Seen.NEW] * 2
    assert once.seen(TWO, 1, 1, True) is Seen.NEW


def test_what_may_have_come_and_was_forgotten_is_not_new(monkeypatch):
    monkeypatch.setattr(listeners, "WINDOW_MESSAGES", 2)
    monkeypatch.setattr(listeners, "WINDOWS_MAX", 1)
    once = Once()
    for number in (1, 3, 5):
        once.note(ONE, 1, number, True)
    assert [once.seen(ONE, 1, number, False) for number in (1, 3, 4)] == [Seen.FORGOTTEN, Seen.TAKEN, Seen.NEW]
    once.note(TWO, 1, 1, True)
    assert once.seen(ONE, 1, 3, True) is Seen.FORGOTTEN
    assert once.seen(ONE, 1, 6, False) is Seen.NEW


def test_start_of_an_origin_begins_a_window_and_ends_the_former():
    once = Once()
    once.note(ONE, 1, 1, True)
    assert once.seen(ONE, 2, 1, False) is Seen.NEW
    once.note(ONE, 2, 1, True)
    assert once.seen(ONE, 2, 1, True) is Seen.TAKEN
    assert once.seen(ONE, 1, 9, False) is Seen.FORGOTTEN
