"""A control plane on lucd beside the same on MariaDB: the same answers, and how long many VMs take to boot.

    python -m tests.control_plane.run --operations                        # ~100 REST operations, answers compared
    python -m tests.control_plane.run --boots 200 --computes 8            # wall and CPU time per VM
    python -m tests.control_plane.run --boots 200 --computes 8 --only lucd --kill   # and a daemon dies on the way

Exit code 0 when all servers became ACTIVE and all answers were the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lucd.demo.plane.audit import audit
from lucd.demo.plane.neighbours import IMAGE
from lucd.demo.processes import cpu_of
from tests.control_plane.operations import Answer, Life, Recorder, differences
from tests.control_plane.stacks import STACKS, LucdStack, Stack

CLIENTS = 4
BOOT_WAIT_S = 900.0
POLL_S = 0.5
KILL_AFTER_S = 5.0
DEAD_S = 1.0


def boot_many(stack: Stack, count: int, kill: bool) -> list[str]:
    """Boot and delete `count` servers, say what it took. Returns what went wrong."""
    api = stack.plane.api()
    flavor = api.make_flavor("tiny", 1, 64, 0)
    cpu_s = stack.plane.cpu_s() + stack.database_cpu_s()
    began_s = time.monotonic()
    with ThreadPoolExecutor(CLIENTS + 1) as clients:
        death = clients.submit(_die_and_return, stack) if kill else None
        servers = list(clients.map(lambda number: api.boot(f"vm-{number}", flavor, IMAGE), range(count)))
        asked_s = time.monotonic() - began_s
        problems = _wait_active(stack, set(servers))
        killed_cpu_s = death.result() if death is not None else 0.0
    wall_s = time.monotonic() - began_s
    cpu_s = stack.plane.cpu_s() + stack.database_cpu_s() + killed_cpu_s - cpu_s
    print(
        f"{stack.name:8} {count} servers: asked for in {asked_s:.1f} s, ACTIVE in {wall_s:.1f} s "
        f"({wall_s / count * 1000:.0f} ms a VM), {cpu_s / count:.3f} CPU-s a VM"
        + (", one daemon killed and restarted on the way" if kill else ""),
        flush=True,
    )
    if isinstance(stack, LucdStack):
        for number in range(len(stack.daemons.nodes)):
            found = audit(lambda name, node=number: stack.daemons.url(name, node), servers)  # type: ignore[misc]
            problems += [f"daemon {number + 1}: {problem}" for problem in found]
    return problems + stack.plane.problems()


def _die_and_return(stack: Stack) -> float:
    """Returns the CPU time that the daemon had used when it was killed."""
    victim = stack.victim()
    assert victim is not None, "only lucd has a daemon to spare"
    time.sleep(KILL_AFTER_S)
    used_s = cpu_of(victim.pid)
    victim.kill()
    time.sleep(DEAD_S)
    victim.start()
    return used_s


def _wait_active(stack: Stack, servers: set[str]) -> list[str]:
    api = stack.plane.api()
    deadline = time.monotonic() + BOOT_WAIT_S
    while True:
        found = api.servers()
        failed = [found[s] for s in servers if s in found and found[s]["status"] == "ERROR"]
        active = {s for s, shown in found.items() if shown["status"] == "ACTIVE" and not shown["OS-EXT-STS:task_state"]}
        if failed or servers <= active or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    problems = [f"server {shown['name']} is in ERROR: {shown.get('fault')}" for shown in failed]
    missing = servers - active - {shown["id"] for shown in failed}
    return problems + ([f"{len(missing)} servers are not ACTIVE"] if missing else [])


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(STACKS))
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--boots", type=int, default=0)
    parser.add_argument("--computes", type=int, default=2)
    parser.add_argument("--kill", action="store_true", help="kill a daemon of lucd's while servers boot")
    options = parser.parse_args()
    records: dict[str, list[Answer]] = {}
    problems: list[str] = []
    for name in [options.only] if options.only else ["mariadb", "lucd"]:
        path = Path(tempfile.mkdtemp(prefix=f"cp-{name}-"))
        stack: Stack = STACKS[name](path, options.computes)
        found: list[str] = []
        try:
            stack.start()
            stack.plane.install()
            stack.plane.start()
            if options.operations:
                recorder = Recorder(stack.plane.api())
                Life(recorder).all()
                records[name] = recorder.answers
                print(f"{name:8} {len(recorder.answers)} operations", flush=True)
                found += [f"{a.operation}: {a.status} {a.body}" for a in recorder.answers if a.status >= 500]
                found += stack.plane.problems()
            if options.boots:
                found += boot_many(stack, options.boots, options.kill and name == "lucd")
        except BaseException:
            print(f"logs are in {path}", flush=True)
            raise
        finally:
            stack.stop()
        problems += found
        if found:
            print(f"logs are in {path}", flush=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
    if len(records) > 1:
        problems += differences(records["lucd"], records["mariadb"])
        print("every answer is the same on lucd and on MariaDB" if not problems else "", flush=True)
    for problem in problems:
        print(f"FAILED: {problem}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
