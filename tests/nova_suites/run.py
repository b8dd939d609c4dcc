"""Runs a suite of Nova's, unedited, on stock SQLite and on the SQL door, and compares the outcome of every test.

    python tests/nova_suites/run.py               # nova.tests.unit.db.main.test_api on memory and cluster
    python tests/nova_suites/run.py --store memory --suite nova.tests.functional.db
    python tests/nova_suites/run.py --store socket --socket /run/lucd/lucd.sock
    python tests/nova_suites/run.py --store cluster --suite all --kill-every 10
    python tests/nova_suites/run.py --store cluster --suite servers --minutes 10

Stores: "memory" in the suite's own process, "cluster" three daemons on loopback made for the run, "rpc" memory with
every call of Nova's database API through the RPC door over such daemons' bus, "socket" a daemon that runs already.

Exit code 0 when every test had the same outcome on both. unittest in processes of its own: pytest and testtools do not
get along.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.cluster import LocalNode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEFAULT_SUITE = "nova.tests.unit.db.main.test_api"
SUITES = (
    "nova.tests.unit.db",
    "nova.tests.functional.db",
    "nova.tests.functional.test_nova_manage",
    "placement.tests.functional.db",
)
"""What --suite all stands for."""
SERVERS = (
    "nova.tests.functional.test_servers",
    "nova.tests.functional.compute",
    "nova.tests.functional.notification_sample_tests",
)
"""What --suite servers stands for: whole services in one process, with cells."""
TIMEOUT_S = 7200
ERROR_LINES = 3
"""Of the end of a test's errors, shown where it differs."""
PATCHES_INTERNALS = {
    "nova.tests.unit.db.main.test_api.InstanceTestCase.test_instance_get_all_by_host_and_node_fills_manually": (
        "gives a mock in the place of a list of columns, which no message can carry"
    ),
    "nova.tests.unit.db.main.test_api.InstanceTestCase.test_instance_update_and_get_original_conflict_race": (
        "replaces a private function and looks at the very objects that it was called with"
    ),
    "nova.tests.unit.db.main.test_api.ComputeNodeTestCase.test_compute_node_get_model": (
        "replaces the query by one whose only row is a mock's sentinel, which no message can carry"
    ),
    "nova.tests.unit.db.main.test_api.SqlAlchemyDbApiNoDbTestCase."
    "test_instance_get_all_by_filters_paginated_allows_deleted_marker": (
        "asks with a mock in the place of the request's context"
    ),
    "nova.tests.unit.db.main.test_api.SqlAlchemyDbApiTestCase.test_instance_get_all_by_filters_calls_sort": (
        "replaces the function that does the work, and its answer is a mock"
    ),
}
"""Tests that cannot pass through the RPC door, and why: they reach into the process that runs the SQL."""

Results = dict[str, dict[str, Any]]


class SuiteRun:
    """One suite on one store, in a process of its own."""

    def __init__(self, store: str, suites: list[str], socket: str, until: float) -> None:
        self.store = store
        self.results: Results = {}
        self.seconds = 0.0
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "LUCD_SUITE_SOCKET": socket if store in {"cluster", "socket"} else "",
            "LUCD_SUITE_BUS": socket if store == "rpc" else "",
            "LUCD_SUITE_UNTIL": str(until),
            # A server thread and its caller in one process: threads, as Nova itself has run since 34.
            **({"OS_NOVA_DISABLE_EVENTLET_PATCHING": "true"} if store == "rpc" else {}),
            "OS_NOVA_CONFIG_FILES": "",
        }
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), store, *suites],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                result = json.loads(line)
                self.results[result["id"]] = result

    def wait(self) -> None:
        """Until the process ends. Raises RuntimeError when it broke off."""
        try:
            code = self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = -1
        self._reader.join(10)
        self.seconds = time.monotonic() - self._started
        if code or not self.results:
            self._errors.seek(0)
            raise RuntimeError(
                f"the run on {self.store} broke off with exit code {code}:\n{self._errors.read()[-2000:]}"
            )

    def summary(self) -> str:
        """One line."""
        counts = Counter(r["outcome"] for r in self.results.values())
        outcomes = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
        return f"{self.store:8} {outcomes} of {len(self.results)} in {self.seconds:.0f} s"


def _tells(line: str) -> bool:
    """Whether a line of a traceback says what went wrong, not where."""
    return bool(line.strip()) and not line.startswith((" ", "(Background on this error"))


def _gist(result: dict[str, Any]) -> str:
    lines = [line for line in result.get("text", "").splitlines() if _tells(line)]
    return "; ".join(lines[-ERROR_LINES:])


def differences(stock: Results, door: Results, cut_off: bool = False) -> list[str]:
    """Tests whose outcome is not the same, with the door's error; of runs that were cut off, among those of both."""
    lines = []
    for name in sorted(stock.keys() & door.keys() if cut_off else stock.keys() | door.keys()):
        before = stock.get(name, {}).get("outcome", "not run")
        after = door.get(name, {}).get("outcome", "not run")
        if before != after:
            lines.append(f"{name}: {before} on stock SQLite, {after} on the door: {_gist(door.get(name, {}))}")
    return lines


def compare(stores: list[str], suites: list[str], socket: str, minutes: float) -> bool:
    """Run all stores at once; print the summaries and what differs. Returns whether nothing does."""
    until = time.time() + minutes * 60
    runs = [SuiteRun(store, suites, socket, until) for store in ("sqlite", *stores)]
    for run in runs:
        run.wait()
        print(run.summary(), flush=True)
    for name, result in sorted(runs[0].results.items()):
        if result["outcome"] == "failed":
            print(f"{name}: failed on stock SQLite, so it says nothing of the door: {_gist(result)}")
    same = True
    for run in runs[1:]:
        cut_off = time.time() > until
        different = differences(runs[0].results, run.results, cut_off)
        if run.store == "rpc":
            different = [line for line in different if line.split(": ", 1)[0] not in PATCHES_INTERNALS]
            for name in PATCHES_INTERNALS.keys() & run.results.keys():
                print(f"{name}: {run.results[name]['outcome']} on the door; it {PATCHES_INTERNALS[name]}")
        for line in different:
            print(line)
        what = f"{len(different)} tests differ" if different else "same outcome for every test"
        both = len(runs[0].results.keys() & run.results.keys())
        print(f"{run.store}: {what}" + (f" of the {both} that both ran until the time was over" if cut_off else ""))
        same = same and not different
    return same


class Deaths:
    """While the block runs: one daemon after the other killed and started again, at steady intervals."""

    def __init__(self, nodes: Sequence[LocalNode], every_s: float) -> None:
        self.count = 0
        self.longest_s = 0.0
        """From a kill until the daemon serves again."""
        self._nodes = nodes
        self._every_s = every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Deaths:
        if self._every_s:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._every_s:
            self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            # The one that the suite talks to, and those that it does not.
            node = self._nodes[self.count % len(self._nodes)]
            node.kill()
            killed_s = time.monotonic()
            node.start()
            self.longest_s = max(self.longest_s, time.monotonic() - killed_s)
            self.count += 1


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="append", choices=["memory", "cluster", "rpc", "socket"])
    parser.add_argument("--socket", default="/run/lucd/lucd.sock", help="the daemon's socket, for --store socket")
    parser.add_argument("--suite", action="append", help=f"package, module, class, all or servers ({DEFAULT_SUITE})")
    parser.add_argument("--kill-every", type=float, default=0.0, metavar="SECONDS", help="kill and restart a daemon")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further test after so long")
    options = parser.parse_args()
    stores = options.store or ["memory", "cluster"]
    suites = options.suite or [DEFAULT_SUITE]
    suites = [name for suite in suites for name in {"all": SUITES, "servers": SERVERS}.get(suite, (suite,))]
    if not {"cluster", "rpc"}.intersection(stores):
        return 0 if compare(stores, suites, options.socket, options.minutes) else 1
    sys.path.insert(0, str(ROOT))
    from tests.cluster import Cluster

    with Cluster(Path(tempfile.gettempdir()), nodes=3) as cluster, Deaths(cluster.nodes, options.kill_every) as deaths:
        same = compare(stores, suites, str(cluster.nodes[0].socket), options.minutes)
    if options.kill_every:
        print(f"{deaths.count} times a daemon was killed and started again, after {deaths.longest_s:.1f} s at most")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
