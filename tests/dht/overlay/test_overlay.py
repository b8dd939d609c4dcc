"""The overlay on loopback: joining, looking up, forgetting the dead, and dropping all that is not a member's."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dht.errors import Invalid, LocalProtocolError
from dht.overlay.hints import HintStore, genuine, hint_key, signed_hint
from dht.overlay.messages import Contact, FindNode, Frame, Ping, Pong, StoreHint, distance, encode, pop_prefix
from dht.overlay.overlay import Overlay, OverlaySettings
from dht.overlay.sealing import OverlayCounters, Sealing

CLUSTER_KEY = b"k" * 32
QUICK = OverlaySettings(
    rpc_timeout_s=0.5,
    ping_interval_s=1.0,
    refresh_interval_s=30.0,
    bootstrap_backoff_min_s=0.1,
    bootstrap_backoff_max_s=1.0,
    contacts_per_host_max=200,
)
PATIENT = replace(QUICK, rpc_timeout_s=10.0)
"""For look-ups that nobody is missing from: a pause of the machine is no answer."""


class Member:
    """What makes a node; `open` starts it, again and again with a growing boot counter."""

    def __init__(self, pop: str, state_path: Path | None = None) -> None:
        self.pop = pop
        self.private_key = Ed25519PrivateKey.generate()
        public = self.private_key.public_key().public_bytes_raw()
        self.node_id = pop_prefix(pop) + hashlib.sha1(public).digest()[:16]
        self.boot = 0
        self.state_path = state_path

    async def open(self, *bootstrap: Overlay, settings: OverlaySettings = QUICK, key: bytes = CLUSTER_KEY) -> Overlay:
        self.boot += 1
        overlay = Overlay(
            self.node_id,
            self.private_key,
            self.pop,
            key,
            ("127.0.0.1", 0),
            boot=self.boot,
            state_path=self.state_path,
            settings=settings,
        )
        await overlay.start("127.0.0.1", 0, [("127.0.0.1", peer.port) for peer in bootstrap])
        return overlay


@asynccontextmanager
async def cluster(*pops: str, settings: OverlaySettings = QUICK) -> AsyncIterator[list[Overlay]]:
    """One node per named PoP, all joined through the first."""
    overlays = [await Member(pops[0]).open(settings=settings)]
    try:
        for pop in pops[1:]:
            overlays.append(await Member(pop).open(overlays[0], settings=settings))
        await until(lambda: all(len(o.contacts()) >= min(len(pops) - 1, settings.ksize, 12) for o in overlays))
        yield overlays
    finally:
        for overlay in overlays:
            await overlay.stop()


async def until(condition, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        await asyncio.sleep(0.02)


async def test_nodes_of_three_pops_look_each_other_up_and_list_each_pop_whole() -> None:
    pops = [f"pop-{n % 3}" for n in range(21)]
    async with cluster(*pops, settings=PATIENT) as overlays:
        chance = random.Random(4)
        for _ in range(15):
            asker, wanted = chance.sample(overlays, 2)
            found = await asker.lookup(wanted.node_id)
            assert found == Contact(wanted.node_id, "127.0.0.1", wanted.port, wanted.pop)
        for asker in overlays[::7]:
            for pop in set(pops):
                expected = {o.node_id for o in overlays if o.pop == pop} - {asker.node_id}
                assert {c.id for c in await asker.nodes_of_pop(pop)} == expected
        assert await overlays[0].nodes_of_pop("nowhere") == []
        assert await overlays[0].lookup(os.urandom(20)) is None


async def test_pop_with_more_nodes_than_a_lookup_gives_is_listed_whole() -> None:
    async with cluster(*["big"] * 14, *["small"] * 3, settings=replace(PATIENT, ksize=6)) as overlays:
        for asker in (overlays[0], overlays[-1]):
            expected = {o.node_id for o in overlays if o.pop == "big"} - {asker.node_id}
            assert {c.id for c in await asker.nodes_of_pop("big")} == expected


async def test_dead_node_is_forgotten_by_all_and_does_not_hold_up_lookups() -> None:
    async with cluster(*["a", "b"] * 4) as overlays:
        dead = overlays.pop(3)
        await dead.stop()
        started = time.monotonic()
        assert await overlays[0].lookup(dead.node_id) is None
        assert time.monotonic() - started < 5.0
        await until(lambda: all(dead.node_id not in [c.id for c in o.contacts()] for o in overlays))
        assert {c.id for c in await overlays[0].nodes_of_pop("b")} == {o.node_id for o in overlays if o.pop == "b"}


async def test_node_that_restarts_on_another_port_is_found_there() -> None:
    async with cluster("a", "a", "b", "b") as overlays:
        member = Member("b")
        first = await member.open(overlays[0])
        await until(lambda: any(c.id == member.node_id for c in overlays[3].contacts()))
        await first.stop()
        again = await member.open(overlays[1])
        await until(
            lambda: all((member.node_id, again.port) in [(c.id, c.port) for c in o.contacts()] for o in overlays)
        )
        found = await overlays[2].lookup(member.node_id)
        assert found is not None
        assert found.port == again.port
        await again.stop()


async def test_node_with_a_wildcard_address_is_known_by_where_its_datagrams_come_from() -> None:
    async with cluster("a", "a") as overlays:
        member = Member("a")
        open_to_all = Overlay(
            member.node_id, member.private_key, "a", CLUSTER_KEY, ("0.0.0.0", 0), boot=1, settings=QUICK
        )
        await open_to_all.start("0.0.0.0", 0, [("localhost", overlays[0].port)])
        expected = Contact(member.node_id, "127.0.0.1", open_to_all.port, "a")
        await until(lambda: all(expected in overlay.contacts() for overlay in overlays))
        await open_to_all.stop()


async def test_node_finds_the_others_again_from_its_saved_contacts(tmp_path: Path) -> None:
    async with cluster("a", "a", "a") as overlays:
        member = Member("a", tmp_path / "contacts")
        first = await member.open(overlays[0])
        await until(lambda: len(first.contacts()) == 3)
        await first.stop()
        again = await member.open()
        await until(lambda: len(again.contacts()) == 3)
        await again.stop()


async def test_damaged_saved_contacts_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "contacts").write_bytes(b"\xc1garbage")
    overlay = await Member("a", tmp_path / "contacts").open()
    assert overlay.contacts() == []
    assert "starting without them" in caplog.text
    await overlay.stop()


async def test_unreachable_bootstrap_peer_is_logged_once_and_joined_when_it_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    free = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    free.bind(("127.0.0.1", 0))
    address = free.getsockname()
    member, late = Member("a"), Member("a")
    overlay = Overlay(member.node_id, member.private_key, "a", CLUSTER_KEY, ("127.0.0.1", 0), boot=1, settings=QUICK)
    await overlay.start("127.0.0.1", 0, [address])
    await until(lambda: "does not answer" in caplog.text)
    await asyncio.sleep(1.2)
    assert caplog.text.count("does not answer") == 1
    free.close()
    peer = Overlay(late.node_id, late.private_key, "a", CLUSTER_KEY, address, boot=1, settings=QUICK)
    await peer.start(*address)
    await until(lambda: len(overlay.contacts()) == 1 and len(peer.contacts()) == 1)
    assert caplog.text.count(" answers") == 1
    await overlay.stop()
    await peer.stop()


class Stranger(asyncio.DatagramProtocol):
    """A bare socket that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, tuple[str, int]]] = []

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.got.append((data, addr))


@asynccontextmanager
async def stranger() -> AsyncIterator[tuple[asyncio.DatagramTransport, Stranger]]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(Stranger, local_addr=("127.0.0.1", 0))
    yield transport, protocol
    transport.close()
    await asyncio.sleep(0)


def dropped(counters: OverlayCounters) -> int:
    return sum(getattr(counters, name) for name in counters.__slots__ if name.startswith("dropped"))


async def test_ten_thousand_garbage_datagrams_are_counted_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dht")
    unhandled: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    chance = random.Random(7)
    async with cluster("a", "a", settings=OverlaySettings(contacts_per_host_max=200)) as (overlay, peer):
        caplog.clear()
        tasks = len(asyncio.all_tasks())
        true = Sealing(os.urandom(20), CLUSTER_KEY, 1, OverlayCounters()).seal(b"\xc1 not a frame")
        for n in range(10_000):
            kind = n % 5
            data = chance.randbytes(chance.randrange(0, 200))
            if kind == 1:
                data = b"\x01" + chance.randbytes(150)
            elif kind == 2:
                data = b"\x01" + peer.node_id + chance.randbytes(120)
            elif kind == 3:
                at = chance.randrange(len(true))
                data = true[:at] + bytes([true[at] ^ 1]) + true[at + 1 :]
            elif kind == 4:
                data = b"\x01" + chance.randbytes(1500)
            overlay._protocol.datagram_received(data, ("127.0.0.1", 9))
        counters = overlay.counters
        assert dropped(counters) == 10_000
        assert counters.dropped_garbage > 2000
        assert counters.dropped_oversized == 2000
        assert counters.dropped_unopened > 4000
        assert len(asyncio.all_tasks()) == tasks
        assert await overlay.lookup(peer.node_id) is not None
        assert await peer.lookup(overlay.node_id) is not None
    assert caplog.text == ""
    assert unhandled == []


async def test_sealed_messages_that_do_not_fit_are_counted_and_nothing_else() -> None:
    async with cluster("a", "a") as (overlay, _):
        member = Member("a")
        sealing = Sealing(member.node_id, CLUSTER_KEY, 1, OverlayCounters())
        before = overlay.contacts()
        good = Frame(b"12345678", "127.0.0.1", 9, "a", Ping())
        bad = [
            b"",
            b"\xc1",
            b"\x93\x01\x02\x03",
            encode([1, 2, 3]),
            encode(good)[:-1],
            encode([b"1234567", "127.0.0.1", 9, "a", [1]]),
            encode([b"12345678", "127.0.0.1", 0, "a", [1]]),
            encode([b"12345678", "127.0.0.1", 70000, "a", [1]]),
            encode([b"12345678", "not an address", 9, "a", [1]]),
            encode([b"12345678", "::1", 9, "a", [1]]),
            encode([b"12345678", "127.0.0.1", 9, "another pop", [1]]),
            encode([b"12345678", "127.0.0.1", 9, "a", [99]]),
            encode([b"12345678", "127.0.0.1", 9, "a", [3, b"short"]]),
            encode([b"12345678", "127.0.0.1", 9, "a", [1], "more"]),
            b"\x91" * 500,
        ]
        for message in bad:
            overlay._protocol.datagram_received(sealing.seal(message), ("127.0.0.1", 9))
        assert overlay.counters.dropped_malformed == len(bad)
        assert overlay.contacts() == before


async def test_replayed_reflected_forged_and_foreign_datagrams_are_refused_and_counted() -> None:
    async with cluster("a", "a") as (overlay, _), stranger() as (transport, seen):
        counters = overlay.counters
        member = Member("a")
        sealing = Sealing(member.node_id, CLUSTER_KEY, 1, OverlayCounters())
        frame = encode(
            Frame(b"12345678", "127.0.0.1", transport.get_extra_info("sockname")[1], "a", FindNode(bytes(20)))
        )
        datagram = sealing.seal(frame)
        target = ("127.0.0.1", overlay.port)

        async def send(data: bytes) -> None:
            transport.sendto(data, target)
            await asyncio.sleep(0.05)

        await send(datagram)
        # The answer, and the question whether this sender really is there.
        await until(lambda: len(seen.got) == 2)
        await send(datagram)
        assert counters.dropped_replayed == 1
        for data, _ in list(seen.got):
            await send(data)
        assert counters.dropped_reflected == 2
        await send(Sealing(member.node_id, b"x" * 32, 2, OverlayCounters()).seal(frame))
        assert counters.dropped_unopened == 1
        await send(datagram[:20] + bytes([datagram[20] ^ 1]) + datagram[21:])
        assert counters.dropped_unopened == 2
        await send(Sealing(member.node_id, CLUSTER_KEY, 1, OverlayCounters()).seal(frame))
        assert counters.dropped_stale == 1
        await send(sealing.seal(encode(Frame(b"12345678", "127.0.0.1", 9, "a", Pong()))))
        assert counters.dropped_unexpected == 1
        assert len(seen.got) == 2
        # It never answered the question, so it is no contact.
        assert member.node_id not in [c.id for c in overlay.contacts()]


async def test_reply_by_another_node_than_the_one_asked_is_not_taken() -> None:
    async with cluster("a", "a") as (overlay, peer):
        answer = await overlay._protocol.ask(("127.0.0.1", peer.port), Ping(), Member("a").node_id, timeout_s=0.2)
        assert answer is None
        assert overlay.counters.dropped_unexpected == 1


async def test_nodes_of_another_cluster_key_never_meet() -> None:
    async with cluster("a", "a") as overlays:
        other = await Member("a").open(*overlays, key=b"other key".ljust(32))
        await until(lambda: overlays[0].counters.dropped_unopened > 0)
        await asyncio.sleep(0.5)
        assert other.contacts() == []
        assert len(overlays[0].contacts()) == 1
        await other.stop()


async def test_ids_of_one_host_beyond_the_limit_are_no_contacts() -> None:
    async with cluster("a", "a", "a", settings=OverlaySettings(contacts_per_host_max=2)) as overlays:
        late = await Member("a").open(overlays[0])
        await asyncio.sleep(0.5)
        assert all(len(overlay.contacts()) <= 2 for overlay in overlays)
        await late.stop()


async def test_hint_is_found_by_all_and_gone_publishers_do_not_matter() -> None:
    async with cluster(*["a", "b", "c"] * 3) as overlays:
        group = b"some group"
        assert await overlays[4].publish_hint(group) >= 3
        assert [await overlay.find_hint(group) for overlay in overlays] == ["b"] * 9
        await asyncio.sleep(0.002)
        assert await overlays[5].publish_hint(group) >= 3
        await overlays[5].stop()
        assert await overlays[0].find_hint(group) == "c"
        assert await overlays[0].find_hint(b"unknown") is None


async def test_many_hints_are_published_again_in_turns_with_pauses_between_them() -> None:
    """Each costs a look-up over all PoPs, and a daemon that has been up for long has many."""
    settings = replace(QUICK, republish_interval_s=0.1, republish_pause_s=0.05)
    async with cluster("a", "a", settings=settings) as (overlay, _):
        published: list[bytes] = []

        async def publish(key: bytes) -> int:
            published.append(key)
            return 1

        overlay._publish = publish  # type: ignore[method-assign]
        keys = [hint_key(b"%d" % number) for number in range(20)]
        for number in range(20):
            await overlay.publish_hint(b"%d" % number)
        del published[:]
        began_s = time.monotonic()
        await until(lambda: set(published) == set(keys))
        assert time.monotonic() - began_s > 0.8


async def test_forged_hint_is_refused_and_counted() -> None:
    async with cluster("a", "a") as (overlay, peer):
        hint = signed_hint(hint_key(b"g"), "a", 1, Member("a").node_id, Member("a").private_key)
        await peer._protocol.ask(("127.0.0.1", overlay.port), StoreHint(hint))
        assert overlay.counters.refused_hints == 1
        assert await overlay.find_hint(b"g") is None


def test_hint_store_keeps_the_newest_of_each_publisher_within_its_limits() -> None:
    store = HintStore(keys_max=10)
    member = Member("a")

    def made(key: bytes, made_ms: int, who: Member = member):
        return signed_hint(hint_key(key), who.pop, made_ms, who.node_id, who.private_key)

    assert genuine(made(b"g", 1))
    assert store.put(made(b"g", 2), 0.0)
    assert not store.put(made(b"g", 1), 0.0)
    for n in range(6):
        assert store.put(made(b"g", 10 + n, Member(f"p{n}")), 0.0)
    assert [hint.made_ms for hint in store.get(hint_key(b"g"), 1.0)] == [15, 14, 13, 12]
    for n in range(20):
        store.put(made(b"%d" % n, 1), 0.0)
    assert len(store) == 10
    assert store.get(hint_key(b"19"), 10_000.0) == []


def test_sealing_window_takes_late_datagrams_once_and_old_ones_never() -> None:
    counters = OverlayCounters()
    sender = Sealing(b"s" * 20, CLUSTER_KEY, 1, OverlayCounters())
    receiver = Sealing(b"r" * 20, CLUSTER_KEY, 1, counters)
    datagrams = [sender.seal(b"%d" % n) for n in range(3000)]
    assert receiver.open(datagrams[1500]) == (b"s" * 20, b"1500")
    order = list(range(477, 1500)) + list(range(1501, 2000))
    random.Random(3).shuffle(order)
    taken = [n for n in order if receiver.open(datagrams[n]) is not None]
    assert len(taken) > 500
    assert all(receiver.open(datagrams[n]) is None for n in order)
    assert receiver.open(datagrams[2999]) is not None
    assert receiver.open(datagrams[1975]) is None
    newer = Sealing(b"s" * 20, CLUSTER_KEY, 2, OverlayCounters())
    assert receiver.open(newer.seal(b"again")) is not None
    assert receiver.open(sender.seal(b"of the boot before")) is None
    assert counters.dropped_stale == 1


def test_distance_is_symmetric_exclusive_or() -> None:
    a, b = os.urandom(20), os.urandom(20)
    assert distance(a, b) == distance(b, a)
    assert distance(a, a) == 0


async def test_overlay_that_is_not_running_or_not_of_its_pop_says_so() -> None:
    member = Member("a")
    with pytest.raises(Invalid, match="does not belong to PoP"):
        Overlay(member.node_id, member.private_key, "b", CLUSTER_KEY, ("127.0.0.1", 0), boot=1)
    overlay = Overlay(member.node_id, member.private_key, "a", CLUSTER_KEY, ("127.0.0.1", 0), boot=1)
    with pytest.raises(LocalProtocolError, match="start it first"):
        await overlay.lookup(bytes(20))
    await overlay.stop()
    running = await member.open()
    await running.stop()
    with pytest.raises(LocalProtocolError, match="start it first"):
        await running.lookup(bytes(20))


async def test_start_with_an_own_address_that_does_not_resolve_says_so() -> None:
    member = Member("a")
    overlay = Overlay(member.node_id, member.private_key, "a", CLUSTER_KEY, ("no such host.invalid", 1), boot=1)
    with pytest.raises(Invalid, match="resolves"):
        await overlay.start("127.0.0.1", 0)
    await overlay.stop()


async def test_start_on_a_taken_port_raises_and_leaves_nothing_open() -> None:
    first = await Member("a").open()
    member = Member("a")
    second = Overlay(member.node_id, member.private_key, "a", CLUSTER_KEY, ("127.0.0.1", 0), boot=1)
    with pytest.raises(OSError, match="in use"):
        await second.start("127.0.0.1", first.port)
    await second.stop()
    await first.stop()
