"""A file system that fills up under one daemon of three: nothing lost, health says so, the others go on, room mends it.

The daemon's directory is a small tmpfs where this process may mount one. Elsewhere the size that its files may have is
limited, which fails the same writes with another reason.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dht.errors import DhtError, Indeterminate, StorageError, Unavailable
from dht.model import Op
from lucd.demo.daemons import LocalNode
from tests.cluster import Cluster
from tests.faults.load import FIRST_COLUMN, Clients, Load, Standstills, assert_whole, changed

pytestmark = pytest.mark.cluster
DISK_BYTES = 40 * 1024 * 1024
"""The reserve (16 MiB), an SQLite file with its log, and some room."""


class SmallDisk:
    """Below the daemon's data directory. `fill` leaves no room, `free` takes away what `fill` put there."""

    def __init__(self, node: LocalNode) -> None:
        self.node = node
        self.mounted = False
        self._ballast = node.data_dir / "ballast"

    def __enter__(self) -> SmallDisk:
        """Move the directory, whose daemon does not run, to the small disk."""
        kept = self.node.path / "kept"
        self.node.data_dir.rename(kept)
        self.node.data_dir.mkdir(mode=0o700)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(self.node.data_dir)]
        if os.geteuid() == 0 and shutil.which("mount"):
            self.mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
        shutil.copytree(kept, self.node.data_dir, dirs_exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.node.kill()
        if self.mounted:
            subprocess.run(["umount", str(self.node.data_dir)], check=True)

    def fill(self) -> None:
        """From now on the running daemon gets no more bytes."""
        if not self.mounted:
            resource.prlimit(self.node.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            return
        with self._ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))

    def free(self) -> None:
        """A limited process is as good as ended: its successor is not limited."""
        self._ballast.unlink(missing_ok=True)


def eventually(what: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it never was the case"
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, nodes=3) as started:
        yield started


def test_full_disk_of_one_stops_its_votes_says_so_and_is_mended_by_room(cluster: Cluster) -> None:
    first, second, full = cluster.nodes
    load = Load(first.store())
    full.stop()
    with SmallDisk(full) as disk:
        full.start()
        cluster.wait_whole()
        standstills = Standstills([first, second])
        with Clients(load, [first, second]) as safe, Clients(load, [full], first=4, timeout_s=2.0) as hit:
            hit.wait_for(5)
            disk.fill()
            eventually(lambda: full.get("/readyz")[0] == 503)
            safe.wait_for(50)
            hit.stop()
        print(f"\ndisk of daemon 3 full ({'tmpfs' if disk.mounted else 'file size limit'}): {safe.said()}")
        assert standstills.unexplained(safe.errors) == []
        assert [report.wrong for report in safe.reports] == [[]] * 2
        assert [report.wrong for report in hit.reports] == [[]]
        # The daemon lives to tell: what it could not do, why, and what to do.
        assert full.get("/livez")[0] == 200
        status = full.status()
        assert not status["ready"]
        assert f"cannot write {full.data_dir}/store.sqlite" in status["state"]
        words = "the file system is full" if disk.mounted else "Check the disk"
        assert words in status["state"]
        assert "start the node again" in status["state"]
        assert status["warnings"][0] == status["state"]
        with pytest.raises(DhtError) as refused:
            full.store(2.0).commit(changed(0, Op.UPDATE, {FIRST_COLUMN + 4: -1}, {FIRST_COLUMN + 4: -2}))
        assert isinstance(refused.value, StorageError | Unavailable | Indeterminate), refused.value
        for node in (first, second):
            assert load.verify(node.store()) == []
        full.close_clients()
        if disk.mounted:
            # Without room for its boot counter it does not start; the counter that is there stays whole.
            full.stop()
            disk.fill()
            full.start(wait_ready=False)
            assert full.wait(120) == 74
            assert "No space left on device; check data_dir, its owner and the disk" in full.log_tail()
        disk.free()
        full.stop()
        full.start()
        cluster.wait_whole()
        assert_whole(load, cluster)
        with Clients(load, cluster.nodes) as again:
            again.wait_for(5)
        assert [(report.errors, report.wrong) for report in again.reports] == [([], [])] * 3
