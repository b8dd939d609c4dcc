"""Threads of a process that need the catalog or an id while the store is out of reach."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dht.errors import Unavailable
from dht.register.memory import MemoryStore
from nova_bridge.sql import turns
from nova_bridge.sql.database import Database, IdBlocks

WAITING = 5


class Silent(MemoryStore):
    """Answers nothing: each question lasts until the test lets go."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.reached, self.let_go = threading.Event(), threading.Event()

    def read(self, *arguments: Any, **more: Any) -> Any:
        self.wait()

    def wait(self) -> int:
        self.asked += 1
        self.reached.set()
        assert self.let_go.wait(60)
        raise Unavailable("nobody answers")


@pytest.fixture
def came(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Counts who waits for a turn."""
    count = threading.Semaphore(0)

    class Lock:
        def __init__(self) -> None:
            self._lock = threading.RLock()

        def __enter__(self) -> None:
            count.release()
            self._lock.acquire()

        def __exit__(self, *error: object) -> None:
            self._lock.release()

    monkeypatch.setattr(turns, "threading", types.SimpleNamespace(RLock=Lock))
    return count


def all_fail(count: threading.Semaphore, store: Silent, ask: Callable[[], object]) -> Sequence[str]:
    """What each of those that ask while the first still waits was told."""
    told: list[str] = []

    def run() -> None:
        with pytest.raises(Unavailable) as caught:
            ask()
        told.append(caught.value.message)

    threads = [threading.Thread(target=run) for _ in range(1 + WAITING)]
    threads[0].start()
    assert store.reached.wait(60)
    for thread in threads[1:]:
        thread.start()
    for _ in threads:
        assert count.acquire(timeout=60)
    store.let_go.set()
    for thread in threads:
        thread.join()
    return told


def test_catalog_out_of_reach_is_asked_for_once_more_for_all_who_wait(came: threading.Semaphore) -> None:
    store = Silent()
    told = all_fail(came, store, Database(store, "cell").reload)
    assert told == ["nobody answers"] * (1 + WAITING)
    assert store.asked == 2


def test_ids_out_of_reach_are_asked_for_once_more_for_all_who_wait_and_hold_up_no_other_table(
    came: threading.Semaphore,
) -> None:
    class Named:
        id_step = 1

        def __init__(self, sequence: str) -> None:
            self.sequence = sequence

    store, ids = Silent(), IdBlocks()
    other: list[int] = []

    def ask() -> int:
        if not other:
            # Who comes second finds the first waiting.
            other.append(0)
        else:
            other.append(ids.take(Named("20"), 0, lambda count, above: 7))  # type: ignore[arg-type]
            came.acquire()
        return ids.take(Named("16"), 0, lambda count, above: store.wait())  # type: ignore[arg-type]

    assert all_fail(came, store, ask) == ["nobody answers"] * (1 + WAITING)
    assert store.asked == 2
    assert len(other) == 1 + WAITING
