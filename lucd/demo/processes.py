"""Programs of OpenStack as processes of the demo: started, watched, measured and ended by process id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dht.errors import Unavailable

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STOP_WAIT_S = 10.0
KILL_WAIT_S = 5.0


class Program:
    """`python -c "import MODULE as entry; entry.main()"` with its own argv, log and process group.

    Not a console script: those of an environment are found only when its bin is on the path.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        """`launcher`: what its command line begins with, if it is not started as it is."""
        self.module = module
        self.arguments = list(arguments)
        self.log = log
        self.environment = dict(environment or {})
        self.launcher = list(launcher)
        self.python = sys.executable
        """The interpreter, and so the environment with the release that runs."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; what it prints goes to the end of its log."""
        entry = f"import sys; sys.argv = {[self.module, *self.arguments]!r}; "
        entry += f"import {self.module} as entry; sys.exit(entry.main())"
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*self.launcher, self.python, "-W", "ignore", "-c", entry],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true", **self.environment},
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def finish(self, timeout_s: float) -> None:
        """Wait until it ends by itself with exit code 0. Raises Unavailable with its log's end otherwise."""
        if self._process is None:
            raise Unavailable(f"{self} was not started")
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.stop()
            code = -signal.SIGKILL
        except BaseException:
            # Whoever is cut off leaves no command behind that goes on changing the databases.
            self.stop()
            raise
        if code:
            raise Unavailable(f"{self} failed ({code}): {self.log_tail()}")

    def stop(self) -> None:
        """End it and its children by their process group: SIGTERM, and SIGKILL for who stays."""
        if self._process is None:
            return
        for number, wait_s in ((signal.SIGTERM, STOP_WAIT_S), (signal.SIGKILL, KILL_WAIT_S)):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(wait_s)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def terminate(self) -> None:
        """SIGTERM to the group without waiting: many end at once, then `stop` waits for each."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def cpu_s(self) -> float:
        """CPU time so far of the processes of its group, and of their children that ended."""
        return group_cpu_s(self._process.pid) if self._process is not None else 0.0

    def log_tail(self) -> str:
        """The last lines of what it wrote, in one."""
        return tail(self.log)

    def __str__(self) -> str:
        return " ".join([self.module, *self.arguments])


def group_cpu_s(group: int) -> float:
    """CPU time of all processes of one group, and of their children that ended; 0 if there is none."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and int(fields[2]) == group:
                ticks += sum(int(ticks) for ticks in fields[11:15])
    return ticks / CLOCK_TICKS_PER_S


def cpu_of(pid: int) -> float:
    """CPU time of one process and of its children that ended; 0 if it is gone."""
    return sum(int(ticks) for ticks in _stat(pid)[11:15]) / CLOCK_TICKS_PER_S


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat behind the name, which may hold spaces and brackets (proc(5)); empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def tail(file: Path) -> str:
    """The last lines of a log in one; empty if there is none."""
    if not file.exists():
        return ""
    return " | ".join(file.read_text(errors="replace").splitlines()[-3:])
