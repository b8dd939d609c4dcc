"""Bad input to a real daemon: each a clear error or a count, nothing lost, and the daemon serves on.

What tests elsewhere show and is not repeated: options, their types and ranges (tests/lucd/test_conf.py), foreign,
damaged and used data directories (test_directory.py, test_one_daemon.py), taken ports (test_one_daemon.py), other
clusters and their keys, bootstrap peers that do not answer (test_three_daemons.py), garbage after the handshake
(tests/dht/wire).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from dht.errors import Invalid, NotFound
from dht.limits import GROUP_BYTES_MAX, INTENT_TIMEOUT_S, TRANSACTION_BYTES_MAX
from dht.model import Change, Op, Part, Transaction
from dht.requests import BlockingStore
from dht.rows import decode_row, group_key
from dht.wire.tls import LinkTls
from lucd.demo.daemons import LocalNode
from nova_bridge.sql import dbapi
from tests.cluster import Cluster
from tests.faults.load import Clients, Load
from tests.laboratory import wait_until

pytestmark = pytest.mark.cluster
MIB = 1024 * 1024
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("bad"), nodes=1) as started:
        started.nodes[0].store().create_database("d")
        started.nodes[0].store().create_database("cell")
        yield started


@pytest.fixture
def node(cluster: Cluster) -> LocalNode:
    """Its log has all that it says of its start."""
    node = cluster.nodes[0]
    wait_until(lambda: "serves on" in node.log_text(), 60.0, "it does not say that it serves")
    return node


@pytest.fixture
def store(node: LocalNode) -> BlockingStore:
    return node.store()


def open_door(node: LocalNode, database: str = "cell") -> dbapi.Connection:
    return dbapi.connect(database, socket=str(node.socket))


# ---- garbage

GARBAGE_DATAGRAMS = 10_000
GARBAGE_FRAMES = 10_000
WEB_SOCKETS = 500
RAW_CONNECTIONS = 500


def counted(node: LocalNode, pattern: str) -> int:
    """The sum of the metrics whose names match."""
    code, text = node.get("/metrics")
    assert code == 200
    return round(sum(float(v) for v in re.findall(rf"^lucd_(?:{pattern})_total (\S+)$", text, re.MULTILINE)))


def wait_counted(node: LocalNode, pattern: str, expected: int) -> None:
    deadline = time.monotonic() + 60.0
    while (now := counted(node, pattern)) != expected:
        assert time.monotonic() < deadline, f"{pattern}: {now} counted, {expected} sent"
        time.sleep(0.01)


def test_ten_thousand_garbage_datagrams_are_counted_and_nothing_else(cluster: Cluster, node: LocalNode) -> None:
    load = Load(node.store(), rows=4)
    chance, pattern = random.Random(1), "overlay_dropped_[a-z]+"
    before, log = counted(node, pattern), node.log_text()
    with Clients(load, [node]) as clients, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for sent in range(0, GARBAGE_DATAGRAMS, 100):
            for _ in range(100):
                sender.sendto(chance.randbytes(chance.randrange(0, 300)), ("127.0.0.1", node.port))
            wait_counted(node, pattern, before + sent + 100)
        clients.wait_for(5)
    assert [(report.errors, report.wrong) for report in clients.reports] == [([], [])]
    assert node.log_text() == log
    assert node.get("/readyz")[0] == 200


async def test_ten_thousand_garbage_frames_are_counted_and_nothing_else(cluster: Cluster, node: LocalNode) -> None:
    chance = random.Random(2)
    before, local_before, log = counted(node, "links_garbage"), counted(node, "local_garbage"), node.log_text()
    # What asks for no link: HTTP that is none.
    for _ in range(RAW_CONNECTIONS):
        with socket.create_connection(("127.0.0.1", node.port)) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(chance.randbytes(chance.randrange(1, 300)).replace(b"\n", b"x") + b"\r\n\r\n")
            raw.settimeout(10)
            while raw.recv(4096):
                pass
    # What asks for a link and then sends no handshake.
    tls = LinkTls().dialing
    async with aiohttp.ClientSession() as session:
        for _ in range(WEB_SOCKETS):
            ws = await session.ws_connect(f"https://127.0.0.1:{node.port}/link", ssl=tls)
            await ws.send_bytes(chance.randbytes(chance.randrange(1, 300)))
            await ws.receive(timeout=10)
            await ws.close()
    wait_counted(node, "links_garbage", before + RAW_CONNECTIONS + WEB_SOCKETS)
    # Whole frames of no meaning at the local door; each costs its connection.
    sent = GARBAGE_FRAMES - RAW_CONNECTIONS - WEB_SOCKETS
    for _ in range(sent):
        body = b"\xc1" + chance.randbytes(chance.randrange(60))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(node.socket))
            client.sendall(len(body).to_bytes(4, "big") + body)
            client.settimeout(10)
            assert client.recv(100) == b""
    wait_counted(node, "local_garbage", local_before + sent)
    said = node.log_text().removeprefix(log).splitlines()
    # Of each kind a line for the host, in each minute that it lasts.
    assert all("no link with 127.0.0.1: " in line and " INFO " in line for line in said), said
    assert len(said) <= 3 * 10, said
    assert node.get("/readyz")[0] == 200
    assert "d" in node.store().list_databases()


# ---- values over the limits, through the store's own door


def inserts(sizes: list[int], first: int, groups: bool = True) -> Transaction:
    """Rows of those sizes, each in a group of its own or all in one."""
    parts: dict[bytes, list[Change]] = {}
    for number, size_bytes in enumerate(sizes, first):
        key = group_key("d", "big", (number if groups else first,))
        parts.setdefault(key, []).append(Change(Op.INSERT, 2, (number,), {1: "x" * size_bytes}))
    return Transaction(os.urandom(16), "d", 0, tuple(Part(key, None, tuple(changes)) for key, changes in parts.items()))


def rows_of(store: BlockingStore, number: int) -> int:
    (found,) = store.read([group_key("d", "big", (number,))])
    return len(found.rows or {})


def test_group_over_its_limit_is_refused_and_keeps_what_it_had(store: BlockingStore) -> None:
    store.commit(inserts([3 * MIB], 100, groups=False))
    change = Change(Op.INSERT, 2, (101,), {1: "x" * 2 * MIB})
    more = Transaction(os.urandom(16), "d", 0, (Part(group_key("d", "big", (100,)), None, (change,)),))
    with pytest.raises(Invalid, match=rf"would grow to 52\d+ bytes.* at most {GROUP_BYTES_MAX}; delete rows"):
        store.commit(more)
    assert rows_of(store, 100) == 1


def test_transaction_over_its_limit_is_refused_whole(store: BlockingStore) -> None:
    with pytest.raises(Invalid, match=rf"has 18\d+ bytes, at most {TRANSACTION_BYTES_MAX} are allowed; commit it in"):
        store.commit(inserts([3 * MIB] * 6, 200))
    assert [rows_of(store, number) for number in range(200, 206)] == [0] * 6
    with pytest.raises(Invalid, match=r"Commit of \d+ bytes is larger than a frame may be \(\d+ bytes\)"):
        store.commit(inserts([3 * MIB] * 9, 200))
    store.commit(inserts([3 * MIB] * 5, 200))
    assert [rows_of(store, number) for number in range(200, 206)] == [1] * 5 + [0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "NaN is not a value"),
        (2**63, "integer 9223372036854775808 does not fit 64 bits"),
        (2**70, r"Commit cannot be sent: .*ints < -2\*\*63"),
        (True, "a value of type bool cannot be stored"),
        ([1], "a value of type list cannot be stored"),
    ],
)
@pytest.mark.parametrize("place", ["column", "key", "guard"])
def test_value_that_sql_has_no_word_for_is_refused(store: BlockingStore, value: object, words: str, place: str) -> None:
    pk = (value,) if place == "key" else (1,)
    guards = {1: value} if place == "guard" else {}
    op = Op.UPDATE if place == "guard" else Op.INSERT
    change = Change(op, 2, pk, {1: value if place == "column" else 1}, guards)  # type: ignore[arg-type, dict-item]
    part = Part(group_key("d", "odd", (1,)), None, (change,))
    with pytest.raises(Invalid, match=words):
        store.commit(Transaction(os.urandom(16), "d", 0, (part,)))
    (found,) = store.read([group_key("d", "odd", (1,))])
    assert not found.rows


# ---- SQL


@pytest.fixture
def door(node: LocalNode) -> Iterator[dbapi.Connection]:
    connection = open_door(node)
    connection.execute("CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, text TEXT, number INTEGER)")
    connection.execute("DELETE FROM notes")
    connection.execute("INSERT INTO notes (id, text, number) VALUES (1, 'kept', 1)")
    connection.commit()
    yield connection
    connection.close()


def kept(door: dbapi.Connection) -> list[tuple[object, ...]]:
    return [tuple(row) for row in door.execute("SELECT id, text, number FROM notes ORDER BY id").fetchall()]


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        (
            "CREATE VIEW v AS SELECT * FROM notes",
            "not supported by this database: CREATE VIEW.*only tables and indexes",
        ),
        (
            "CREATE TRIGGER x AFTER INSERT ON notes BEGIN SELECT 1; END",
            "not supported by this database: CREATE TRIGGER",
        ),
        ("CREATE TABLE other AS SELECT * FROM notes", "not supported by this database"),
        ("ATTACH DATABASE '/tmp/x' AS x", "near .ATTACH DATABASE.*not a statement that this database runs"),
        ("VACUUM INTO '/tmp/x'", "near .VACUUM INTO.*not a statement that this database runs"),
        ("SELECT * FROM notes FOR UPDATE", 'near "UPDATE": syntax error'),
        ("SELECT * FROM absent", "no such table: absent"),
        ("INSERT INTO notes (id, absent) VALUES (2, 3)", "no column named absent"),
        ("LOCK TABLES notes WRITE", 'near "LOCK TABLES notes WRITE": not a statement'),
    ],
)
def test_sql_that_the_door_does_not_do_says_so_and_changes_nothing(
    door: dbapi.Connection, sql: str, words: str
) -> None:
    with pytest.raises(sqlite3.Error, match=words):
        door.execute(sql)
    door.rollback()
    assert kept(door) == [(1, "kept", 1)]


@pytest.mark.parametrize("value", [2**63, -(2**70)])
def test_integer_of_more_than_64_bits_is_refused_like_on_sqlite(door: dbapi.Connection, value: int) -> None:
    with pytest.raises(OverflowError):
        door.execute("INSERT INTO notes (id, number) VALUES (2, ?)", (value,))
    door.rollback()
    assert kept(door) == [(1, "kept", 1)]


def test_nan_is_null_like_on_sqlite(door: dbapi.Connection) -> None:
    door.execute("INSERT INTO notes (id, number) VALUES (2, ?)", (float("nan"),))
    door.commit()
    assert kept(door) == [(1, "kept", 1), (2, None, None)]


def test_row_and_transaction_over_the_limits_are_refused_at_commit(door: dbapi.Connection) -> None:
    door.execute("INSERT INTO notes (id, text) VALUES (2, ?)", ("x" * 5 * MIB,))
    with pytest.raises(sqlite3.DataError, match=rf"a group holds at most {GROUP_BYTES_MAX}"):
        door.commit()
    door.rollback()
    for number in range(2, 8):
        door.execute("INSERT INTO notes (id, text) VALUES (?, ?)", (number, "x" * 3 * MIB))
    with pytest.raises(sqlite3.DataError, match=rf"at most {TRANSACTION_BYTES_MAX} are allowed; commit it in pieces"):
        door.commit()
    door.rollback()
    assert kept(door) == [(1, "kept", 1)]


def test_database_that_does_not_exist_is_named_with_what_to_do(store: BlockingStore, node: LocalNode) -> None:
    with pytest.raises(NotFound, match="there is no database 'mars'; `lucd database create mars` makes it"):
        store.commit(
            Transaction(
                os.urandom(16), "mars", 0, (Part(group_key("mars", "f", (1,)), None, inserts([1], 1).parts[0].changes),)
            )
        )
    with (
        contextlib.closing(open_door(node, "mars")) as door,
        pytest.raises(
            sqlite3.OperationalError, match=r"there is no database 'mars' in this cluster.*lucd database create"
        ),
    ):
        door.execute("SELECT * FROM notes")
    dropped = subprocess.run(
        [sys.executable, "-m", "lucd.cli.main", "database", "drop", "mars", "--yes", "--socket", str(node.socket)],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert (dropped.returncode, dropped.stderr.count("\n")) == (66, 1)
    assert "there is no database mars; `lucd database list` names them" in dropped.stderr
    assert "mars" not in store.list_databases()


# ---- clients that disappear

OPEN_TRANSACTION = """
import sys, time
from nova_bridge.sql import dbapi
door = dbapi.connect("cell", socket=sys.argv[1])
door.execute("UPDATE notes SET text = 'half' WHERE id = 1")
door.execute("INSERT INTO notes (id, text) VALUES (2, 'half')")
print("open", flush=True)
time.sleep(60)
"""

TWO_GROUPS = """
import os, sys
from dht.errors import Conflict
from dht.model import Change, Op, Part, Transaction
from dht.rows import decode_row, group_key
from dht.wire.blocking import BlockingClient, SocketStore
store = SocketStore(BlockingClient(sys.argv[1]))
keys = [group_key("d", "pair", (n,)) for n in (1, 2)]
print("open", flush=True)
while True:
    (row,) = store.read(keys[:1])[0].rows.values()
    number = decode_row(row)[1]
    changes = [Change(Op.UPDATE, 3, (n,), {1: number + 1}, {1: number}) for n in (1, 2)]
    parts = tuple(Part(key, None, (change,)) for key, change in zip(keys, changes))
    try:
        store.commit(Transaction(os.urandom(16), "d", 0, parts))
    except Conflict:
        pass  # what the one before left undecided was applied after all
"""


@contextlib.contextmanager
def client_process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has said "open"; killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def test_client_killed_in_mid_transaction_leaves_nothing_and_blocks_nobody(
    door: dbapi.Connection, node: LocalNode
) -> None:
    with client_process(OPEN_TRANSACTION, node.socket):
        pass
    assert kept(door) == [(1, "kept", 1)]
    began = time.monotonic()
    door.execute("UPDATE notes SET text = 'next' WHERE id = 1")
    door.commit()
    assert time.monotonic() - began < 5.0
    assert kept(door) == [(1, "next", 1)]


def numbers_in(store: BlockingStore, key: bytes) -> list[object]:
    return [decode_row(row)[1] for row in (store.read([key])[0].rows or {}).values()]


def test_client_killed_while_it_commits_to_two_groups_leaves_all_or_nothing(
    store: BlockingStore, node: LocalNode
) -> None:
    keys = [group_key("d", "pair", (n,)) for n in (1, 2)]
    rows = [Part(key, None, (Change(Op.INSERT, 3, (n,), {1: 0}),)) for n, key in enumerate(keys, 1)]
    store.commit(Transaction(os.urandom(16), "d", 0, tuple(rows)))
    chance, number = random.Random(3), 0
    for _ in range(4):
        with client_process(TWO_GROUPS, node.socket):
            # Until it has committed a few times, however slow the machine is; then at any moment.
            committed = time.monotonic() + 60.0
            while next(iter(numbers_in(store, keys[0]))) < number + 3:
                assert time.monotonic() < committed, "the client commits nothing"
            time.sleep(0.1 * chance.random())
        deadline = time.monotonic() + 60.0
        while True:
            first, second = (numbers_in(store, key) for key in keys)
            # Groups are read each at its own ballot; what is still being finished is waited for.
            if first == second:
                break
            assert time.monotonic() < deadline, (first, second)
            time.sleep(0.1)
        (after,) = first
        assert isinstance(after, int)
        assert after >= number
        number = after
    assert number >= 12
    # What a dead client left undecided holds the groups for about the intent timeout.
    began = time.monotonic()
    store.commit(Transaction(os.urandom(16), "d", 0, (Part(keys[0], None, (Change(Op.DELETE, 3, (1,)),)),)))
    assert time.monotonic() - began < 5 * INTENT_TIMEOUT_S


# ---- the data directory

AS_NOBODY = """
import os, sys
from lucd.cli import main as cli
import lucd.process, lucd.daemon, encodings.idna
os.setgid(65534)
os.setuid(65534)
sys.exit(cli.main())
"""


def test_unreadable_data_directory_fails_with_74_and_names_it(cluster: Cluster) -> None:
    locked = cluster.add()
    cluster.nodes.remove(locked)
    script = AS_NOBODY
    if os.geteuid() != 0:
        script = "import sys\nfrom lucd.cli import main as cli\nsys.exit(cli.main())"
        locked.data_dir.chmod(0)
    cluster.path.chmod(0o755)
    locked.path.chmod(0o755)
    locked.config.chmod(0o644)
    result = subprocess.run(
        [sys.executable, "-c", script, "run", "--config", str(locked.config)],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    locked.data_dir.chmod(0o700)
    assert result.returncode == 74, result.stderr
    assert str(locked.data_dir) in result.stderr
    assert "Permission denied" in result.stderr
    assert "check data_dir, its owner" in result.stderr
    assert "Traceback" not in result.stderr
