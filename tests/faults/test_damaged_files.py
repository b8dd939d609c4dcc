"""The data file of one daemon of three is damaged, cut off, put back from a copy or read-only: it says so and does not
serve, the others go on with right answers, and what docs/operations.md says to do mends it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from dht.errors import StorageError
from dht.storage.disk import SqliteDisk
from dht.world import Space
from lucd import directory
from tests.cluster import Cluster
from tests.faults.load import Clients, Load, Standstills, assert_whole

pytestmark = pytest.mark.cluster
SPACES_IN_USE = {Space.META, Space.ROSTER, Space.TABLET, Space.REGISTER, Space.ROW, Space.INDEX, Space.PEER}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("damaged"), nodes=3) as started:
        yield started


@pytest.fixture(scope="module")
def load(cluster: Cluster) -> Load:
    return Load(cluster.nodes[0].store(), rows=8)


def flip_in_space(path: Path, space: int) -> None:
    """One bit of one value of the key space, as a disk flips it: behind SQLite's back."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    ((key, value),) = connection.execute("SELECT key, value FROM kv WHERE space = ? LIMIT 1", (space,)).fetchall()
    connection.close()
    data = path.read_bytes()
    whole = key + value[:40]
    assert whole in data
    at = len(key) + 2
    # All copies: one may lie in a part of a page that is not used any more.
    path.write_bytes(data.replace(whole, whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]))


def test_read_only_disk_of_one_is_named_and_the_others_serve(cluster: Cluster, load: Load) -> None:
    first, second, third = cluster.nodes
    third.close_clients()
    third.stop()
    kept = third.path / "kept"
    third.data_dir.rename(kept)
    third.data_dir.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(third.data_dir)]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    shutil.copytree(kept, third.data_dir, dirs_exist_ok=True)
    try:
        third.start()
        cluster.wait_whole()
        if mounted:
            # Open files cannot be made read-only by a remount: the daemon is killed first, as by the machine's crash.
            third.kill()
            subprocess.run(["mount", "-o", "remount,ro", str(third.data_dir)], check=True)
            third.start(wait_ready=False)
            assert third.wait(120) == 74
            assert "Read-only file system; check data_dir, its owner and the disk" in third.log_tail()
            standstills = Standstills([first, second])
            with Clients(load, [first, second]) as others:
                others.wait_for(10)
            assert standstills.unexplained(others.errors) == []
            assert [report.wrong for report in others.reports] == [[]] * 2
            subprocess.run(["mount", "-o", "remount,rw", str(third.data_dir)], check=True)
            third.start()
            cluster.wait_whole()
        assert_whole(load, cluster)
    finally:
        third.close_clients()
        third.stop()
        # As it is now: what it was before would be a rolled-back directory.
        shutil.rmtree(kept)
        shutil.copytree(third.data_dir, kept)
        if mounted:
            subprocess.run(["umount", str(third.data_dir)], check=True)
        shutil.rmtree(third.data_dir)
        kept.rename(third.data_dir)


def test_damaged_file_of_one_is_refused_the_others_serve_and_a_wiped_node_rejoins(cluster: Cluster, load: Load) -> None:
    first, second, third = cluster.nodes
    if not third.pid:
        third.start()
        cluster.wait_whole()
    third.close_clients()
    third.stop()
    file = third.data_dir / "store.sqlite"
    older = file.read_bytes()
    third.start()
    cluster.wait_whole()
    with Clients(load, cluster.nodes) as clients:
        clients.wait_for(10)
    third.close_clients()
    third.stop()
    good = file.read_bytes()

    def refused(words: str) -> None:
        third.start(wait_ready=False)
        assert third.wait(120) == 74
        assert words in third.log_text().splitlines()[-1], third.log_tail()
        assert "wipe" in third.log_text().splitlines()[-1]

    standstills = Standstills([first, second])
    with Clients(load, [first, second]) as others:
        # Each key space of the file.
        connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
        spaces = [row[0] for row in connection.execute("SELECT DISTINCT space FROM kv").fetchall()]
        connection.close()
        assert set(spaces) >= SPACES_IN_USE - {Space.INDEX}, spaces
        for space in spaces:
            flip_in_space(file, space)
            with pytest.raises(StorageError, match=r"damaged.*wipe"):
                SqliteDisk(file, reserve_bytes=0)
            file.write_bytes(good)
        flip_in_space(file, Space.REGISTER)
        refused("the file is damaged (checksum of key")
        file.write_bytes(good[: len(good) // 2])
        refused("the file is damaged")
        file.write_bytes(older)
        refused("is an older copy")
        others.wait_for(10)
    assert standstills.unexplained(others.errors) == []
    assert [report.wrong for report in others.reports] == [[]] * 2
    for node in (first, second):
        assert load.verify(node.store()) == []
    # What the document says: away with the directory, and join again.
    shutil.rmtree(third.data_dir)
    assert cluster.cluster is not None
    directory.join(third.data_dir, cluster.cluster)
    third.start()
    assert load.verify(third.store()) == []
