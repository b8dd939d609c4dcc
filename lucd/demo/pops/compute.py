"""The compute role of one PoP as a process of its own: Nova keeps its configuration once for each process.

    python -m lucd.demo.pops.compute CONFIG HOST    # orders as JSON lines on standard input, each answered by one line

An order is a list: the name of a method of `ComputeRole`, then its arguments. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dht.errors import Unavailable
from lucd.demo.compute import ComputeRole
from lucd.demo.processes import STOP_WAIT_S, tail
from lucd.demo.terminal import Calls

ORDERS: Final = ("wait_for_conductor", "start", "heartbeat", "create", "claim", "boot", "conflict", "destroy", "listed")
END_WAIT_S = 2.0


class ComputeProcess:
    """The parent's end. One order at a time; `calls` fills with what the process timed."""

    def __init__(self, launcher: Sequence[str], config: Path, host: str, log: Path, calls: Calls) -> None:
        self._log = log
        self._calls = calls
        self._one = threading.Lock()
        command = [*launcher, sys.executable, "-W", "ignore", "-m", "lucd.demo.pops.compute", str(config), host]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
                env={**os.environ, "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true"},
            )

    def order(self, name: str, *arguments: object) -> Any:
        """What the method returned. Raises Unavailable with Nova's error where the method raised one."""
        with self._one:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except (OSError, ValueError):
                line = ""
        if not line:
            raise Unavailable(f"the compute role has ended at {name}: {tail(self._log)}")
        answer = json.loads(line)
        self._calls.add(answer["took_s"], answer["failed"])
        if "error" in answer:
            raise Unavailable(f"{name} in the compute role: {answer['error']}")
        return answer["result"]

    def stop(self) -> None:
        """Let it end with its input; kill it if it does not."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(END_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_WAIT_S)


def main() -> None:
    """Obey until the end of standard input."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    # What Nova prints goes to the log.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    config, host = sys.argv[1:]
    role = ComputeRole(Path(config), Calls(), host)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        calls = role.calls = Calls()
        answer: dict[str, object] = {}
        try:
            assert name in ORDERS, name
            answer["result"] = getattr(role, name)(*arguments)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        answers.write(json.dumps({**answer, "took_s": calls.took_s(), "failed": calls.failed}) + "\n")


if __name__ == "__main__":
    main()
