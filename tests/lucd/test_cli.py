"""The command line against a door that answers: outputs, one-line errors, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dht import requests
from dht.codec import Message
from dht.errors import Invalid, Unavailable
from dht.model import Struct
from dht.rows import group_key
from dht.wire.local import Connection, LocalDoor
from lucd import directory, messages, version
from lucd.cli import connection, show
from lucd.cli.main import main
from lucd.cli.show import parse_key
from lucd.messages import NodeLine, TabletLine
from nova_bridge.sql import database as sql_database
from nova_bridge.sql import repair

A, B = "aa" * 20, "bb" * 20
NODES = (
    NodeLine(A, "paris", "rack1", "192.0.2.1:7650", "voter", True, True),
    NodeLine(B, "paris", "rack2", "192.0.2.2:7650", "member", False, False),
)
STATUS = messages.StatusReply(
    version="0",
    node_id=A,
    pop="paris",
    cluster_id="c",
    incarnation="i",
    boot=3,
    address="192.0.2.1:7650",
    uptime_s=12.0,
    ready=True,
    state="ready",
    members=2,
    reachable=1,
    roster_epoch=4,
    generation=1,
    tablets={"whole": 60, "degraded": 4, "unavailable": 0},
    to_copy=0,
    survivable=("node",),
    warnings=("node bb does not answer",),
    counters={"disk": {"commits": 7}},
)


class Answers:
    """A daemon's door with fixed answers."""

    def __init__(self) -> None:
        self.databases: dict[str, str] = {}

    async def answer(self, connection: Connection, message: Message) -> Struct:
        match message:
            case messages.AskStatus():
                return STATUS
            case messages.AskNodes():
                return messages.NodesReply(NODES)
            case messages.AskDomain(name=name):
                return messages.DomainReply(name or "paris", 1, 4, NODES, (TabletLine(0, 2, (B, A), True),), ())
            case messages.AskWhere():
                return messages.WhereReply("paris", 5, 2, A, NODES, True, 9, "1.2.3")
            case messages.DrainNode(node_id=node) if bytes.fromhex(node) == bytes.fromhex(A):
                return requests.Done()
            case messages.DrainNode():
                raise Unavailable("only one voter answers; start the others first")
            case requests.ListHomes():
                return requests.ListHomesReply(self.databases)
            case requests.CreateDatabase(name=name, home=home):
                created = name not in self.databases
                self.databases[name] = home or "paris"
                self._lose_reply(connection, name)
                return requests.Done(created)
            case requests.DropDatabase(name=name):
                dropped = self.databases.pop(name, None) is not None
                self._lose_reply(connection, name)
                return requests.Done(dropped)
        raise AssertionError(message)

    @staticmethod
    def _lose_reply(connection: Connection, name: str) -> None:
        if name == "lost":
            connection.close()


@pytest.fixture
def socket() -> Iterator[str]:
    """The path of a served door."""
    place = Path(tempfile.mkdtemp(prefix="lucd-"))
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        door = LocalDoor(place / "s", Answers().answer)
        await door.start()
        ready.set()
        await stop.wait()
        await door.stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    yield str(place / "s")
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()
    shutil.rmtree(place)


class Run:
    """Runs `lucd ARGUMENTS`; keeps the exit code and what was printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = self._capsys.readouterr()
        return code, printed.out, printed.err


@pytest.fixture
def lucd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("LUCD_CONFIG", raising=False)
    monkeypatch.delenv("LUCD_SOCKET", raising=False)
    return Run(capsys)


def test_version_prints_it(lucd: Run) -> None:
    assert lucd("version") == (0, f"lucd {version()}\n", "")


def test_help_lists_every_command(lucd: Run) -> None:
    code, out, _ = lucd("--help")
    assert code == 0
    for name in ("init", "join", "run", "key", "status", "node", "domain", "data", "database", "config", "demo"):
        assert f"\n  {name} " in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("status", "--loud"),
        ("data", "where"),
        ("status", "-f", "xml"),
        *(("pop", "recover", "x", "--timeout", text) for text in ("nan", "inf", "-5", "soon")),
    ],
)
def test_usage_error_is_one_line_with_64(lucd: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = lucd(*arguments)
    assert (code, out) == (64, "")
    assert err.startswith("lucd: ")
    assert err.count("\n") == 1
    assert "--help" in err


def test_config_sample_is_the_committed_one(lucd: Run) -> None:
    code, out, _ = lucd("config", "sample")
    assert code == 0
    assert out == (Path(__file__).parents[2] / "config" / "lucd.conf.sample").read_text()


def test_init_join_and_key_make_two_nodes_of_one_cluster(lucd: Run, tmp_path: Path) -> None:
    code, out, _ = lucd("init", "--data-dir", str(tmp_path / "a"))
    assert code == 0
    assert "lucd run" in out
    assert "lucd join" in out
    code, key, _ = lucd("key", "show", "--data-dir", str(tmp_path / "a"))
    file = tmp_path / "key"
    file.write_text(key)
    file.chmod(0o644)
    code, _, err = lucd("join", "--data-dir", str(tmp_path / "b"), "--key-file", str(file))
    assert code == 64
    assert "chmod 600" in err
    file.chmod(0o600)
    assert lucd("join", "--data-dir", str(tmp_path / "b"), "--key-file", str(file))[0] == 0
    assert directory.cluster_key(tmp_path / "b") == directory.cluster_key(tmp_path / "a")


def test_key_new_and_import_change_the_secret_of_the_same_cluster_only(lucd: Run, tmp_path: Path) -> None:
    lucd("init", "--data-dir", str(tmp_path / "a"))
    lucd("init", "--data-dir", str(tmp_path / "other"))
    before = directory.cluster_key(tmp_path / "a")
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text(lucd("key", "new", "--data-dir", str(tmp_path / "a"))[1])
    assert directory.cluster_key(tmp_path / "a") == before
    assert lucd("key", "import", str(file), "--data-dir", str(tmp_path / "a"))[0] == 0
    after = directory.cluster_key(tmp_path / "a")
    assert after.cluster_id == before.cluster_id
    assert after.secret != before.secret
    code, _, err = lucd("key", "import", str(file), "--data-dir", str(tmp_path / "other"))
    assert code == 70
    assert "belongs to cluster" in err
    running = directory.start(tmp_path / "a", "p")
    assert lucd("key", "import", str(file), "--data-dir", str(tmp_path / "a"))[0] == 69
    running.close()


def test_init_twice_fails_with_70_and_one_line(lucd: Run, tmp_path: Path) -> None:
    lucd("init", "--data-dir", str(tmp_path / "a"))
    code, _, err = lucd("init", "--data-dir", str(tmp_path / "a"))
    assert code == 70
    assert err.startswith("lucd: ")
    assert err.count("\n") == 1


def test_init_reads_data_dir_from_the_configuration(lucd: Run, tmp_path: Path) -> None:
    (tmp_path / "lucd.conf").write_text(f"[DEFAULT]\ndata_dir = {tmp_path}/d\n")
    assert lucd("init", "--config", str(tmp_path / "lucd.conf"))[0] == 0
    assert (tmp_path / "d" / "node.json").exists()


def test_join_with_no_key_file_fails_with_74(lucd: Run, tmp_path: Path) -> None:
    code, _, err = lucd("join", "--data-dir", str(tmp_path / "b"), "--key-file", str(tmp_path / "none"))
    assert code == 74
    assert "cannot be read" in err


def test_run_without_directory_fails_with_66(lucd: Run, tmp_path: Path) -> None:
    (tmp_path / "lucd.conf").write_text(f"[DEFAULT]\ndata_dir = {tmp_path}/d\n")
    code, _, err = lucd("run", "--config", str(tmp_path / "lucd.conf"))
    assert code == 66
    assert "lucd init" in err


def test_run_with_unknown_option_fails_with_64(lucd: Run, tmp_path: Path) -> None:
    (tmp_path / "lucd.conf").write_text("[DEFAULT]\ndatadir = x\n")
    code, _, err = lucd("run", "--config", str(tmp_path / "lucd.conf"))
    assert code == 64
    assert "unknown option datadir" in err


def test_status_table_and_json(lucd: Run, socket: str) -> None:
    code, out, _ = lucd("status", "--socket", socket)
    assert code == 0
    assert "2, 1 reachable" in out
    assert "60 whole, 4 degraded" in out
    assert "any one node" in out
    assert "node bb does not answer" in out
    code, out, _ = lucd("status", "--socket", socket, "-f", "json")
    assert json.loads(out) == messages.plain(STATUS)


def test_status_finds_the_socket_in_the_configuration(lucd: Run, socket: str, tmp_path: Path) -> None:
    (tmp_path / "lucd.conf").write_text(f"[DEFAULT]\nsocket = {socket}\n")
    assert lucd("status", "--config", str(tmp_path / "lucd.conf"))[0] == 0


def test_node_list_marks_itself(lucd: Run, socket: str) -> None:
    code, out, _ = lucd("node", "list", "--socket", socket)
    assert code == 0
    assert out.splitlines()[1].split() == [A + "*", "paris", "rack1", "192.0.2.1:7650", "voter", "yes"]
    assert json.loads(lucd("node", "list", "--socket", socket, "-f", "json")[1])[1]["reachable"] is False


def test_node_drain_error_of_the_daemon_has_its_exit_code(lucd: Run, socket: str) -> None:
    code, _, err = lucd("node", "drain", B, "--socket", socket)
    assert (code, err) == (69, "lucd: only one voter answers; start the others first\n")


@pytest.mark.parametrize("written", [A, A.upper(), f" {A}*"])
def test_node_that_is_still_listed_has_not_left_however_its_id_is_written(lucd: Run, socket: str, written: str) -> None:
    code, out, err = lucd("node", "drain", written, "--timeout", "1", "--socket", socket)
    assert (code, out) == (69, "")
    assert f"node {A} is being drained, but is not out after 1 s" in err
    assert "`lucd domain show` tells" in err


def test_node_id_that_is_none_is_refused_before_anybody_is_asked(lucd: Run) -> None:
    for command in (("node", "drain", "x"), ("node", "remove", "x"), ("domain", "recover", "--survivor", "x")):
        assert lucd(*command, "--socket", "/nowhere")[::2] == (
            64,
            "lucd: 'x' is no node id; `lucd node list` shows them\n",
        )


def test_configuration_that_may_not_be_read_is_one_line_with_64(lucd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def exists(self) -> bool:
            raise PermissionError(13, "Permission denied", "/etc/lucd/lucd.conf")

    monkeypatch.setattr(connection, "CONFIG_FILE", Closed())
    code, out, err = lucd("status")
    assert (code, out) == (64, "")
    assert err == "lucd: /etc/lucd/lucd.conf cannot be read by this user; change its owner or mode\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied", "/var/lib/lucd/store.sqlite-wal"),
            "/var/lib/lucd/store.sqlite-wal cannot be used: this user may not (Permission denied); run the command as "
            "the user that lucd runs as, or as root",
        ),
        (
            PermissionError(1, "Operation not permitted"),
            "this host refused what the command needs: this user may not (Operation not permitted); run the command as "
            "the user that lucd runs as, or as root",
        ),
    ],
)
def test_file_that_this_user_may_not_use_is_one_line_with_74(
    lucd: Run, monkeypatch: pytest.MonkeyPatch, error: PermissionError, message: str
) -> None:
    def refused(path: Path) -> None:
        raise error

    monkeypatch.setattr(directory, "cluster_key", refused)
    assert lucd("key", "show", "--data-dir", "/var/lib/lucd") == (74, "", f"lucd: {message}\n")


def test_database_order_whose_reply_is_lost_is_indeterminate_and_not_told_as_if_it_changed_nothing(
    lucd: Run, socket: str
) -> None:
    code, out, err = lucd("database", "create", "lost", "--socket", socket)
    assert (code, out) == (75, "")
    assert "the daemon went away before it replied" in err
    assert "`lucd database list` tells whether there is a database lost now" in err
    assert "lost" in lucd("database", "list", "--socket", socket)[1]
    code, out, err = lucd("database", "drop", "lost", "--yes", "--socket", socket)
    assert (code, out) == (75, "")
    assert "nobody knows whether it was done" in err
    assert "lost" not in lucd("database", "list", "--socket", socket)[1]


def test_domain_show_lists_tablets(lucd: Run, socket: str) -> None:
    code, out, _ = lucd("domain", "show", "--socket", socket)
    assert code == 0
    assert out.splitlines()[-1].split() == ["0", "2", B[8:16], A[8:16], "yes"]
    assert json.loads(lucd("domain", "show", "-f", "json", "--socket", socket)[1])["tablets"][0]["epoch"] == 2


def test_data_where_shows_replicas(lucd: Run, socket: str) -> None:
    code, out, _ = lucd("data", "where", "nova_cell1/instance/abc", "--socket", socket)
    assert code == 0
    assert "9 rows at 1.2.3" in out
    code, _, err = lucd("data", "where", "nova_cell1", "--socket", socket)
    assert code == 64
    assert "DATABASE/FAMILY/VALUE" in err


def test_parse_key_numbers_and_quoted_text() -> None:
    assert parse_key("d/f/7") == group_key("d", "f", (7,))
    assert parse_key("d/f/'7'") == group_key("d", "f", ("7",))
    assert parse_key("d/f/a/b") == group_key("d", "f", ("a", "b"))
    assert parse_key("d/catalog") == group_key("d", "catalog", ())
    assert parse_key("d/f/-7") == group_key("d", "f", (-7,))
    for text in ("--7", "-", "7-", "\u00b2"):
        assert parse_key(f"d/f/{text}") == group_key("d", "f", (text,))
    with pytest.raises(Invalid, match="does not fit 64 bits"):
        parse_key(f"d/f/{'9' * 5000}")


@pytest.mark.parametrize(("domain", "own"), [("lyon", "in lyon"), ("global", "shared")])
def test_after_a_recovery_databases_over_several_pops_are_made_to_fit_as_well(
    domain: str, own: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PoP has a sequence of its own for each of their local tables, which may be lost where rows are not."""
    homes = {"in nice": "nice", "in lyon": "lyon", "shared": "global", "spread": "local"}
    monkeypatch.setattr(show, "store", lambda *of: contextlib.nullcontext(SimpleNamespace(homes=lambda: homes)))
    monkeypatch.setattr(sql_database, "Database", lambda store, name, timeout_s: name)
    monkeypatch.setattr(repair, "check", lambda name, repair: [f"{name} fits"])
    show.fit_unique_entries(domain, None, None)
    told = capsys.readouterr().out.splitlines()
    assert told == [f"  database {name}: {name} fits" for name in dict.fromkeys([own, "shared", "spread"])]


def test_database_create_list_drop(lucd: Run, socket: str) -> None:
    assert lucd("database", "create", "nova", "--socket", socket)[:2] == (0, "Created database nova.\n")
    assert lucd("database", "create", "nova", "--socket", socket)[0] == 70
    assert lucd("database", "create", "cell", "--home", "pop:lyon", "--socket", socket)[:2] == (
        0,
        "Created database cell in PoP lyon.\n",
    )
    listed = lucd("database", "list", "--socket", socket)[1].splitlines()
    assert [line.split() for line in listed] == [["DATABASE", "HOME"], ["nova", "pop:paris"], ["cell", "pop:lyon"]]
    assert json.loads(lucd("database", "list", "-f", "json", "--socket", socket)[1]) == [
        {"name": "nova", "home": "pop:paris"},
        {"name": "cell", "home": "pop:lyon"},
    ]
    for wrong in ("lyon", "pop:", "globally", "pop:global", "pop:local"):
        code, _, err = lucd("database", "create", "x", "--home", wrong, "--socket", socket)
        assert code == 64
        assert "write --home pop:NAME" in err
    code, _, err = lucd("database", "drop", "nova", "--socket", socket)
    assert code == 64
    assert "--yes" in err
    assert lucd("database", "drop", "nova", "--yes", "--socket", socket)[0] == 0
    assert lucd("database", "drop", "nova", "--yes", "--socket", socket)[0] == 66


def test_each_command_is_told_in_one_line_of_its_groups_help(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ((), ("config",), ("data",), ("database",), ("domain",), ("key",), ("node",), ("pop",)):
        main([*group, "--help"])
        listed = capsys.readouterr().out.partition("\nCommands:\n")[2]
        assert listed, group
        assert "..." not in listed, group
