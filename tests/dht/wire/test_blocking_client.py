"""The blocking client: losses, deadlines, threads, fork, eventlet, restarts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest
from wire_doors import door_in_thread

from dht import requests
from dht.errors import Conflict, DhtError, Indeterminate, Invalid, NotFound, StorageError, Unavailable
from dht.model import ZERO, Applied, Ballot, FindQuery, FindResult, GroupRead, Part, Transaction
from dht.wire import blocking
from dht.wire.blocking import BlockingClient, SocketStore

BALLOT = Ballot(1, 2, 3, b"n", 4, 5)
TRANSACTION = Transaction(b"t" * 16, "db", 1, (Part(b"k"), Part(b"l")))


class Daemon:
    """Answers like a store, and b"never" not at all. `lose`: how many replies to lose by closing the connection.

    `outcomes`: see AskOutcome. `fails_after`: what a commit raises when it is applied. `go_on`: until then nothing is
    answered. `together`: how many requests are to wait at once before the first is answered.
    """

    def __init__(self):
        self.asked = []
        self.lose = 0
        self.outcomes = []
        self.committed = 0
        self.fails_after = None
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.together = 0
        self.are_together = asyncio.Event()

    async def __call__(self, connection, message):
        self.asked.append(message)
        if isinstance(message, requests.ReadGroups) and message.keys == (b"never",):
            await asyncio.Event().wait()
        await self.go_on.wait()
        if len(self.asked) >= self.together:
            self.are_together.set()
        await self.are_together.wait()
        if self.lose and not isinstance(message, requests.AskOutcome):
            self.lose -= 1
            connection.close()
        match message:
            case requests.ReadGroups(keys, _):
                return requests.ReadGroupsReply(tuple(GroupRead(k, BALLOT, {k: b"r"}) for k in keys))
            case requests.Find():
                return requests.FindReply(FindResult(()))
            case requests.Commit(transaction, _):
                if transaction.database == "conflict":
                    raise Conflict("guard", part=1, what="guard", index=2)
                self.committed += 1
                if self.fails_after:
                    raise self.fails_after
                return requests.CommitReply(Applied((BALLOT, BALLOT)))
            case requests.AskOutcome():
                outcome = self.outcomes.pop(0)
                if isinstance(outcome, DhtError):
                    raise outcome
                return requests.AskOutcomeReply(outcome)
            case requests.ReserveIds():
                return requests.ReserveIdsReply(7)
            case requests.ListDatabases():
                return requests.ListDatabasesReply(("a", str(len(self.asked))))
            case requests.CreateDatabase(name):
                return requests.Done(name == "new")
        return requests.Done()


@pytest.fixture
def daemon(socket_path):
    daemon = Daemon()
    with door_in_thread(socket_path, daemon) as (door, thread):
        daemon.door, daemon.thread = door, thread
        yield daemon


@pytest.fixture
def store(daemon, socket_path):
    client = BlockingClient(socket_path, 5.0)
    yield SocketStore(client)
    client.close()


def test_store_speaks_every_request(store):
    (group,) = store.read([b"k"], [None])
    assert (group.key, group.ballot, group.rows) == (b"k", BALLOT, {b"k": b"r"})
    assert store.find(FindQuery("db", 1, 1)) == FindResult(())
    assert store.commit(TRANSACTION) == Applied((BALLOT, BALLOT))
    assert store.reserve_ids("db", "n", 3) == 7
    assert store.raise_sequence("db", "n", 3) is None
    assert store.list_databases()[0] == "a"
    assert store.create_database("new") is True
    assert store.create_database("old") is False
    assert store.drop_database("old") is True


def test_daemons_error_comes_back_with_its_detail(store):
    with pytest.raises(Conflict) as caught:
        store.commit(Transaction(b"t" * 16, "conflict", 1, (Part(b"k"),)))
    assert caught.value.detail == {"part": 1, "what": "guard", "index": 2}


def test_lost_read_is_asked_again_once(store, daemon):
    daemon.lose = 1
    assert store.read([b"k"])
    assert len(daemon.asked) == 2


def test_read_lost_on_several_connections_of_a_dying_daemon_is_asked_again(store, daemon, monkeypatch):
    monkeypatch.setattr(blocking, "DYING_S", 60.0)
    daemon.lose = 4
    assert store.read([b"k"])
    assert len(daemon.asked) == 5


def test_read_lost_again_after_the_death_is_unavailable(store, daemon, monkeypatch):
    monkeypatch.setattr(blocking, "DYING_S", 0.0)
    daemon.lose = 2
    with pytest.raises(Unavailable):
        store.read([b"k"])
    assert len(daemon.asked) == 2


def test_lost_commit_that_was_applied_is_found_out(store, daemon):
    daemon.lose = 1
    daemon.outcomes = ["applied"]
    assert store.commit(TRANSACTION) == Applied((BALLOT, BALLOT))
    assert [type(m).__name__ for m in daemon.asked] == ["Commit", "AskOutcome", "Commit"]
    assert [m.attempt for m in daemon.asked if isinstance(m, requests.Commit)] == [0, 1]


def test_applied_commit_whose_ballots_cannot_be_had_is_applied(store, daemon):
    daemon.lose = 2
    daemon.outcomes = ["applied"]
    assert store.commit(TRANSACTION) == Applied((ZERO, ZERO))


def test_lost_commit_that_was_not_applied_is_sent_again(store, daemon):
    daemon.lose = 1
    daemon.outcomes = ["not_applied"]
    assert store.commit(TRANSACTION) == Applied((BALLOT, BALLOT))


def test_lost_commit_whose_retry_nobody_can_tell_of_is_not_sent_a_third_time(store, daemon):
    """One of its groups says that it was not applied, another one that it has forgotten so old a transaction."""
    daemon.fails_after = Indeterminate("forgotten", forgotten=True)
    daemon.outcomes = ["not_applied"] * 100
    with pytest.raises(Conflict) as caught:
        store.commit(TRANSACTION)
    assert caught.value.detail["what"] == "intent"
    assert [type(m).__name__ for m in daemon.asked] == ["Commit", "AskOutcome"] * 2


def test_lost_commit_asks_the_group_whose_ballot_it_names(store, daemon):
    daemon.lose = 1
    daemon.outcomes = ["applied"]
    store.commit(Transaction(b"t" * 16, "db", 1, (Part(b"k"), Part(b"l", seen=BALLOT))))
    asked = next(m for m in daemon.asked if isinstance(m, requests.AskOutcome))
    assert (asked.key, asked.seen) == (b"l", BALLOT)


def test_lost_commit_that_nobody_remembers_is_indeterminate(store, daemon):
    daemon.lose = 1
    daemon.outcomes = ["unknown"]
    with pytest.raises(Indeterminate) as caught:
        store.commit(TRANSACTION)
    assert caught.value.detail["id"] == TRANSACTION.id
    assert daemon.committed == 1


def test_lost_commit_is_asked_for_again_but_not_of_a_daemon_that_is_cut_off(store, daemon):
    daemon.lose = 1
    daemon.outcomes = [Unavailable("busy"), "not_applied"]
    assert store.commit(TRANSACTION) == Applied((BALLOT, BALLOT))
    daemon.asked.clear()
    daemon.lose = 1
    daemon.outcomes = [Unavailable("hears nobody", cut_off=True), "not_applied"]
    with pytest.raises(Indeterminate):
        store.commit(TRANSACTION)
    assert [type(m).__name__ for m in daemon.asked] == ["Commit", "AskOutcome"]


@pytest.mark.parametrize("refusal", [NotFound("dropped meanwhile", database="db"), StorageError("the disk failed")])
def test_lost_commit_whose_outcome_is_refused_is_indeterminate(store, daemon, refusal):
    daemon.lose = 1
    daemon.outcomes = [refusal]
    with pytest.raises(Indeterminate) as caught:
        store.commit(TRANSACTION)
    assert caught.value.detail["id"] == TRANSACTION.id


@pytest.mark.parametrize("failure", [StorageError("the disk failed"), RuntimeError("a bug")])
@pytest.mark.parametrize(
    ("outcome", "told"), [("applied", None), ("unknown", Indeterminate), ("not_applied", DhtError)]
)
def test_commit_that_fails_otherwise_than_by_a_refusal_is_asked_for(store, daemon, failure, outcome, told):
    daemon.fails_after = failure
    daemon.outcomes = [outcome]
    if told is None:
        assert store.commit(TRANSACTION) == Applied((ZERO, ZERO))
    else:
        with pytest.raises(told) as caught:
            store.commit(TRANSACTION)
        assert (told is Indeterminate) == isinstance(caught.value, Indeterminate)
    assert [type(m).__name__ for m in daemon.asked][:2] == ["Commit", "AskOutcome"]


def test_slow_reply_ends_at_the_deadline(store, daemon):
    daemon.go_on.clear()
    for call, error in (
        (lambda: store.read([b"k"], None, 0.2), Unavailable),
        (store_commit(store, 0.2), Indeterminate),
    ):
        begin = time.monotonic()
        with pytest.raises(error):
            call()
        assert 0.1 < time.monotonic() - begin < 4.0, "of the client's 5"
    daemon.thread.soon(daemon.go_on.set)
    assert store.read([b"k"]), "the late reply of an earlier call is never taken for this one's"


def store_commit(store, timeout_s):
    return lambda: store.commit(TRANSACTION, 0, timeout_s)


def test_no_daemon_is_unavailable_after_a_bounded_wait(socket_path):
    begin = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        BlockingClient(socket_path).call(requests.ListDatabases(), 0.3)
    assert caught.value.detail["sent"] is False
    assert 0.2 < time.monotonic() - begin < 0.5 * blocking.CONNECT_WAIT_S


def test_restarted_daemon_is_found_again(store, daemon):
    store.read([b"k"])
    daemon.thread.run(daemon.door.stop())
    starter = threading.Timer(0.3, lambda: daemon.thread.run(daemon.door.start()))
    starter.start()
    assert store.commit(TRANSACTION) == Applied((BALLOT, BALLOT))
    starter.join()
    assert daemon.committed == 1


def test_value_too_large_is_invalid_and_costs_nothing(store):
    with pytest.raises(Invalid):
        store.read([b"k" * (25 * 1024 * 1024)])
    assert store.read([b"k"])


def test_large_reply_comes_whole(store, daemon):
    keys = [bytes([n]) * 200_000 for n in range(20)]
    assert [group.key for group in store.read(keys)] == keys


def test_threads_share_a_client(store, daemon):
    wrong = []

    def work(n):
        for m in range(50):
            key = f"{n}-{m}".encode()
            if store.read([key])[0].key != key:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert len(daemon.asked) == 1000
    assert daemon.door.counters["connections"] <= 20


def test_forked_child_opens_its_own_connection(store, daemon, socket_path):
    code = f"""
import os, sys
from dht.wire import blocking
from dht.wire.blocking import BlockingClient, SocketStore
store = SocketStore(BlockingClient({socket_path!r}, 5.0))
store.list_databases()
children = []
for n in range(4):
    pid = os.fork()
    if not pid:
        for m in range(50):
            key = b"%d-%d" % (n, m)
            assert store.read([key])[0].key == key
        os._exit(7)
    children.append(pid)
for m in range(50):
    assert store.read([b"parent%d" % m])[0].key == b"parent%d" % m
for pid in children:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
print("all well")
"""
    assert run_python(code) == "all well\n"
    assert len(daemon.asked) == 251


def test_greenlets_wait_side_by_side_under_eventlet(daemon, socket_path):
    daemon.together = 20
    code = f"""
import eventlet
eventlet.monkey_patch()
from dht.wire import blocking
from dht.wire.blocking import BlockingClient, SocketStore
from dht.errors import Unavailable
store = SocketStore(BlockingClient({socket_path!r}, 20.0))
pool = eventlet.GreenPool(20)
keys = [b"%d" % n for n in range(20)]
assert [groups[0].key for groups in pool.imap(lambda key: store.read([key]), keys)] == keys
try:
    store.read([b"never"], None, 0.1)
except Unavailable:
    pass
else:
    raise SystemExit("no deadline")
with eventlet.Timeout(0.1, False):
    store.read([b"never"])
assert store.read([b"after"])[0].key == b"after"
print("all well")
"""
    assert run_python(code) == "all well\n"


def test_client_does_not_import_eventlet():
    code = "import dht.wire.blocking, sys; print('eventlet' in sys.modules, 'asyncio' in sys.modules)"
    assert run_python(code) == "False False\n"


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
