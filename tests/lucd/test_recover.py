"""`lucd domain recover` with real daemons: two of three are lost for good."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from lucd.cli.main import main
from tests.cluster import Cluster
from tests.laboratory import wait_until
from tests.lucd.test_one_daemon import inserted, text_of, updated

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("recover"), nodes=3) as started:
        store = started.nodes[0].store()
        store.create_database("d")
        for number in range(1, 11):
            store.commit(inserted(number, "kept"))
        store.reserve_ids("d", "16", 1)
        yield started


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    code = 0
    try:
        main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_recovery_is_refused_then_done_and_leaves_a_record(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    survivor, *others = cluster.nodes
    socket = ("--socket", str(survivor.socket))
    code, text = run(capsys, "domain", "recover", "--accept-data-loss", *socket)
    assert code == 64
    assert "majority" in text
    for node in others:
        node.kill()
    time.sleep(1.0)
    code, text = run(capsys, "domain", "recover", *socket)
    assert code == 64
    assert "--accept-data-loss" in text
    code, text = run(capsys, "domain", "recover", "--accept-data-loss", *socket)
    assert code == 0, text
    assert "sequence d/sequence/16 jumped" in text
    store = survivor.store()
    assert [text_of(store, number) for number in range(1, 11)] == ["kept"] * 10
    store.commit(updated(3, "kept", "new"))
    store.commit(inserted(11, "new"))
    assert store.reserve_ids("d", "16", 200) > 1_000_000
    assert survivor.status()["generation"] == 2
    code, text = run(capsys, "domain", "show", *socket)
    assert code == 0
    assert "generation 2 began at" in text
    assert "sequences and intents were seen to" in text
    code, text = run(capsys, "domain", "recover", "--accept-data-loss", *socket)
    assert code == 64


def test_lost_member_that_starts_again_says_what_to_do_and_serves_nothing(cluster: Cluster) -> None:
    late = cluster.nodes[1]
    late.start(wait_ready=False)
    end = time.monotonic() + 60.0
    while "recovered without this node" not in (state := str(late.status().get("state"))):
        assert time.monotonic() < end, state
        time.sleep(0.1)
    assert text_of(cluster.nodes[0].store(), 3) == "new"


def test_database_check_runs_on_what_is_left(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    socket = ("--socket", str(cluster.nodes[0].socket))
    assert run(capsys, "database", "check", "d", *socket) == (0, "0 found.\n")
    assert run(capsys, "database", "check", "nothing", "--repair", *socket)[0] == 66


def test_domain_global_is_recovered_by_an_order_of_its_own(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    survivor = cluster.nodes[0]
    socket = ("--socket", str(survivor.socket))
    cluster.nodes[1].kill()
    wait_until(
        lambda: any("domain global" in text for text in survivor.status()["warnings"]), 30.0, "the status says nothing"
    )
    assert run(capsys, "database", "create", "new", *socket)[0] == 69
    code, text = run(capsys, "domain", "recover", "global", "--accept-data-loss", *socket)
    assert code == 0, text
    assert survivor.store().homes() == {"d": "pop1"}
    assert run(capsys, "database", "create", "new", *socket)[0] == 0
    code, text = run(capsys, "domain", "show", "global", *socket)
    assert "generation 2 began at" in text
