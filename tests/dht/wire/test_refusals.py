"""What the log says of those that are refused at the links' port."""

from __future__ import annotations

import logging
import types

from dht.errors import RemoteProtocolError
from dht.wire import refusals
from dht.wire.refusals import LINES_MAX, Refusals


def refused(reason, text="no", **more):
    return RemoteProtocolError(text, reason=reason, **more)


async def test_refusal_is_told_once_a_minute_for_each_host_and_reason(caplog, monkeypatch):
    now_s = [100.0]
    loop = types.SimpleNamespace(time=lambda: now_s[0])
    monkeypatch.setattr(refusals, "asyncio", types.SimpleNamespace(get_running_loop=lambda: loop))
    told = Refusals()
    for _ in range(3):
        for host in ("a", "b"):
            told.tell(host, refused("channel"))
            told.tell(host, refused("wrong_key"))
    assert len(caplog.records) == 4
    now_s[0] += 59
    told.tell("a", refused("channel"))
    assert len(caplog.records) == 4
    now_s[0] += 2
    told.tell("a", refused("channel"))
    assert len(caplog.records) == 5


async def test_hosts_without_end_fill_no_log(caplog):
    told = Refusals()
    for number in range(10 * LINES_MAX):
        told.tell(f"host{number}", refused("channel"))
    assert len(caplog.records) == LINES_MAX


async def test_what_an_operator_has_to_mend_is_a_warning_whoever_of_the_two_refused(caplog):
    caplog.set_level(logging.INFO)
    told = Refusals()
    told.tell("a", refused("link_tls"))
    told.tell("b", refused("refused", their_reason="wrong_key"))
    told.tell("c", refused("garbage"))
    told.tell("d", refused("ended"))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]


async def test_words_of_a_stranger_make_no_line_of_their_own(caplog):
    Refusals().tell("a", refused("channel", "x\n2026-01-01 ERROR \x1b[2J y"))
    assert caplog.records[0].getMessage() == "no link with a: x?2026-01-01 ERROR ?[2J y"
