"""What every demo shares: its daemons, a deadline, and that whoever ends it ends all its processes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from dht.errors import DhtError, NotFound
from dht.rows import group_key
from lucd import messages
from lucd.demo.daemons import Daemons, LocalNode
from lucd.demo.terminal import Terminal

NODES = 3


def one_pop(path: Path) -> Daemons:
    """The daemons of most demos."""
    return Daemons(path, NODES)


class Tale(Protocol):
    """One demo on the daemons that it is given."""

    def tell(self) -> bool:
        """Play it. True if everything went well; it has said what did not."""

    def stop(self) -> None:
        """End its processes; also when `tell` raised, and by the watchdog while it is in the middle: once or twice."""

    def last_words(self) -> str:
        """The end of its processes' logs, shown when `tell` raised."""


D = TypeVar("D", bound=Daemons)


def perform(
    make: Callable[[Terminal, D], Tale],
    needs: dict[str, str],
    deadline_s: float,
    keep: bool,
    daemons_at: Callable[[Path], D],
) -> int:
    """Play one tale; returns the exit code: 0 only if it went well.

    `daemons_at` makes the daemons, not started, in an empty directory. `needs`: modules, and the pip argument that
    brings each. After `deadline_s` the demo ends itself as failed. With `keep`, and after a failure, directories and
    logs stay.
    """
    for module, requirement in needs.items():
        if importlib.util.find_spec(module) is None:
            raise NotFound(f"the demo needs {module}, which is not installed; run pip install '{requirement}'")
    path = Path(tempfile.mkdtemp(prefix="lucd-demo-"))
    # The clean-up below runs for Ctrl-C and for SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    terminal = Terminal()
    daemons = daemons_at(path)
    tale = make(terminal, daemons)
    watchdog = threading.Timer(deadline_s, _give_up, (terminal, daemons, tale, deadline_s))
    watchdog.daemon = True
    watchdog.start()
    good = False
    try:
        good = tale.tell()
    except DhtError as error:
        terminal.say(f"FAILED: {error.message}")
    except Exception as error:
        terminal.say(f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        terminal.detail(tale.last_words())
    finally:
        watchdog.cancel()
        tale.stop()
        daemons.stop()
        if keep or not good:
            terminal.detail(f"directories and logs are kept in {path}")
        else:
            shutil.rmtree(path, ignore_errors=True)
    return 0 if good else 1


def start_daemons(terminal: Terminal, daemons: Daemons) -> None:
    """Start them one after the other until each serves all its tablets, and say who they are."""
    terminal.say("Three daemons on three hosts (all on loopback); the 2nd and 3rd join through the 1st.")
    for node in daemons.nodes:
        terminal.progress(f"starting daemon {node.number}")
        node.start()
    daemons.wait_whole()
    terminal.progress_end()
    for node in daemons.nodes:
        terminal.detail(f"node {node.status()['node_id'][:16]}  host{node.number}  {node.address}")


def coordinator_of_most(daemons: Daemons, cell: str, instances: Sequence[str]) -> tuple[LocalNode, int]:
    """The daemon to kill, and how many of the instances have a group yet.

    Never the second daemon: in every demo it is the door or the bus of the programs that have to go on.
    """
    client = daemons.nodes[1].client()
    counts: Counter[str] = Counter()
    for instance in instances:
        reply = client.call(messages.AskWhere(group_key(cell, "instance", (instance,))))
        if isinstance(reply, messages.WhereReply) and reply.exists:
            counts[reply.coordinator] += 1
    others = [daemons.nodes[0], daemons.nodes[2]]
    return max(others, key=lambda node: counts[str(node.status().get("node_id"))]), counts.total()


def _give_up(terminal: Terminal, daemons: Daemons, tale: Tale, deadline_s: float) -> None:
    terminal.say(f"FAILED: not finished after {deadline_s:.0f} s; logs are in {daemons.path}")
    tale.stop()
    daemons.stop()
    os._exit(1)
