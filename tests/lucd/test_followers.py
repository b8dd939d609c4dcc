"""Which copies a node keeps: one that may be the only one is not deleted, and is there after a restart."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dht.domain.backups import backups_of
from dht.domain.restore import BEFORE
from dht.errors import StorageError, Unavailable
from dht.model import GLOBAL
from dht.storage.write_ahead_log import log_path
from lucd import followers as followers_module
from lucd.followers import ASKED_AGAIN_S, OPEN_AGAIN_S_MAX, SILENT_AFTER_S, UNWANTED_AFTER_S, Followers
from lucd.messages import CopiesReply, CopyLine

OWN, LOST = "pop0", "lyon"
NEWER = next(name for name in map("pop{}".format, range(1, 100)) if backups_of(LOST, [OWN, name], 1) == (name,))
"""A PoP that backs LOST up instead of OWN, once it is there."""


class Kept:
    """Copies begun by a node; `alive`: domains that are covered as time goes on."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.alive: set[str] = set()
        self.noted = SimpleNamespace(wall_s=(), open={}, generation=1)
        self.others_age_s: float | None = 1.0
        """How old the copies are that PoPs keep which are to; None: their nodes do not answer."""
        self._covered_s: dict[str, float] = {}
        self._directory = directory
        self.pops = [OWN, LOST]
        monkeypatch.setattr(followers_module, "open_file", lambda path, *more: self._opened(path))
        monkeypatch.setattr(followers_module, "Follower", self._follower)
        monkeypatch.setattr(followers_module, "FollowedReads", lambda copy, disk: None)
        self.start()

    def start(self) -> None:
        """As after a restart: the files are there, what they cover is not known yet."""
        self._covered_s.clear()
        clock: Any = SimpleNamespace(monotonic=lambda: self.now_s, sleep=self._sleep)
        settings: Any = SimpleNamespace(pop=OWN, backup_pops=1, follow_interval_s=1.0, copy_bytes_per_s=1)
        wide: Any = SimpleNamespace(joined=True, chain=SimpleNamespace(newest=self))
        network = SimpleNamespace(call=self._copies_of, alive=lambda node: True)
        parts: Any = [SimpleNamespace(node_id=b"n" * 20), settings, clock, random.Random(1), network, None, wide]
        self.followers = Followers(self._directory, *parts, None, lambda node: False)  # type: ignore[arg-type]

    @property
    def members(self) -> list[Any]:
        """Of domain `global`."""
        return [SimpleNamespace(pop=pop, node_id=pop.encode(), address="h:1") for pop in self.pops]

    async def _copies_of(self, node: bytes, message: object, timeout_s: float) -> CopiesReply:
        if self.others_age_s is None:
            raise Unavailable("not heard")
        return CopiesReply((CopyLine(LOST, self.others_age_s, 0, 1), CopyLine(GLOBAL, 1.0, 0, 1)))

    @staticmethod
    def _opened(path: Path) -> Any:
        async def durable(number: int) -> None:
            return None

        path.touch()
        return SimpleNamespace(close=lambda: None, submit=lambda batch: 1, durable=durable)

    def _follower(self, name: str, *more: object, **named: object) -> Any:
        async def nothing() -> None:
            return None

        def covered_s(prefix: bytes = b"") -> float:
            return self._covered_s.get(name, float("-inf"))

        copy = SimpleNamespace(
            prefix_covered_s=covered_s,
            tablets_covered_s=covered_s,
            noted=self.noted,
            complete=False,
            open_count=lambda: 0,
        )
        return SimpleNamespace(copy=copy, start=nothing, stop=nothing, outlived=False, **named)

    async def _sleep(self, delay_s: float) -> None:
        self._covered_s |= dict.fromkeys(self.alive, self.now_s)
        self.now_s += delay_s
        if self.now_s >= self._until_s:
            raise asyncio.CancelledError

    async def run(self, for_s: float) -> None:
        self._until_s = self.now_s + for_s
        with pytest.raises(asyncio.CancelledError):
            await self.followers._run()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(tmp_path, monkeypatch)


async def test_copy_that_others_keep_now_is_deleted_when_they_had_time_to_make_it(kept: Kept) -> None:
    kept.alive = {GLOBAL, LOST}
    await kept.run(10.0)
    assert kept.followers.names() == (GLOBAL, LOST)
    kept.pops.append(NEWER)
    await kept.run(UNWANTED_AFTER_S - 10.0)
    assert LOST in kept.followers.names()
    await kept.run(20.0)
    assert LOST not in kept.followers.names()
    assert LOST not in kept.followers._on_disk()


@pytest.mark.parametrize("age_s", [None, -1.0, SILENT_AFTER_S + 1.0], ids=["silent", "never complete", "behind"])
async def test_copy_that_others_are_to_keep_now_stays_until_they_have_it(kept: Kept, age_s: float | None) -> None:
    """A large one takes long, and a disk there may be full: until then this one may be the only one."""
    kept.alive = {GLOBAL, LOST}
    await kept.run(10.0)
    kept.pops.append(NEWER)
    kept.others_age_s = age_s
    await kept.run(3 * UNWANTED_AFTER_S)
    assert LOST in kept.followers.names()
    kept.others_age_s = 1.0
    await kept.run(ASKED_AGAIN_S + 5.0)
    assert LOST not in kept.followers.names()


async def test_copy_of_a_domain_that_nobody_can_copy_any_more_stays_whoever_comes(kept: Kept) -> None:
    """Its members are in `global` still: a whole PoP is never removed."""
    kept.alive = {GLOBAL, LOST}
    await kept.run(10.0)
    kept.pops.append(NEWER)
    await kept.run(UNWANTED_AFTER_S - SILENT_AFTER_S / 2)
    kept.alive = {GLOBAL}
    await kept.run(3 * UNWANTED_AFTER_S)
    assert LOST in kept.followers.names()
    kept.alive = {GLOBAL, LOST}
    await kept.run(UNWANTED_AFTER_S - 10.0)
    assert LOST in kept.followers.names(), "it is there again, and others begin only now"
    await kept.run(30.0)
    assert LOST not in kept.followers.names()


async def test_copy_that_a_generation_has_outlived_is_kept_until_the_next_one_is_complete(kept: Kept) -> None:
    """A PoP that was begun anew lives on one disk at first: until it is copied, the copy before may be the only one."""
    kept.alive = {GLOBAL, LOST}
    await kept.run(10.0)
    old = kept.followers.kept(LOST)
    assert old is not None
    kept.followers._path(LOST).write_bytes(b"generation 1")
    old.follower.outlived = True
    await kept.run(10.0)
    assert kept.followers.names() == (GLOBAL, LOST, LOST + BEFORE)
    assert kept.followers._path(LOST + BEFORE).read_bytes() == b"generation 1"
    assert kept.followers._path(LOST).read_bytes() == b""
    assert [line.domain for line in kept.followers.lines()] == [GLOBAL, LOST]
    kept.start()
    await kept.run(10.0)
    assert kept.followers.names() == (GLOBAL, LOST, LOST + BEFORE)
    new = kept.followers.kept(LOST)
    assert new is not None
    kept.noted.open = {b"never covered": 0.0}
    new.follower.copy.complete = True  # type: ignore[misc]
    await kept.run(10.0)
    assert LOST + BEFORE in kept.followers.names()
    kept.noted.open = {b"being written": 1.0}
    await kept.run(10.0)
    assert kept.followers.names() == (GLOBAL, LOST)
    assert kept.followers._on_disk() == [GLOBAL, LOST]


async def test_copy_is_set_aside_where_there_is_room_for_another_and_that_of_global_never(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.alive = {GLOBAL, LOST}
    await kept.run(10.0)

    def asks(name: str) -> bool:
        found: Any = kept.followers.kept(name)
        return bool(found.follower.sets_aside())

    kept.followers._path(LOST).write_bytes(b"x" * 100)
    free = SimpleNamespace(free=201)
    monkeypatch.setattr(followers_module.shutil, "disk_usage", lambda path: free)
    assert [asks(LOST), asks(GLOBAL)] == [True, False]
    free.free = 200
    assert not asks(LOST)


async def test_copy_whose_log_is_not_in_it_is_not_set_aside_but_followed_on(kept: Kept) -> None:
    kept.alive = {GLOBAL, LOST}
    await kept.run(10.0)
    old: Any = kept.followers.kept(LOST)
    old.follower.outlived = True
    log_path(kept.followers._path(LOST)).write_bytes(b"commits")
    await kept.run(10.0)
    assert kept.followers.names() == (GLOBAL, LOST)
    again: Any = kept.followers.kept(LOST)
    assert again is not old
    assert not again.follower.sets_aside()


async def test_copy_that_others_are_to_keep_now_is_there_after_a_restart(kept: Kept) -> None:
    kept.alive = {GLOBAL, LOST}
    await kept.run(10.0)
    kept.alive = {GLOBAL}
    kept.pops.append(NEWER)
    kept.start()
    await kept.run(10.0)
    assert LOST in kept.followers.names()


async def test_copy_of_the_only_other_pop_is_there_after_a_restart_though_global_knows_the_own_pop_alone(
    kept: Kept,
) -> None:
    """Of two PoPs one is destroyed. `global` has no majority then, and a recovery leaves the other one alone in it."""
    kept.alive = {GLOBAL, LOST}
    await kept.run(10.0)
    kept.alive = {GLOBAL}
    kept.pops.remove(LOST)
    kept.start()
    await kept.run(3 * UNWANTED_AFTER_S)
    assert LOST in kept.followers.names()


async def test_copy_whose_file_cannot_be_read_is_told_and_keeps_no_other_one_from_being_followed(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(name: str, *more: object, **named: object) -> Any:
        if name == GLOBAL:
            raise StorageError("what a copy covers cannot be read: wipe the file, it is made anew")
        return kept._follower(name)

    monkeypatch.setattr(followers_module, "Follower", unreadable)
    kept.alive = {LOST}
    await kept.run(10.0)
    assert kept.followers.names() == (LOST,)
    (warning,) = kept.followers.warnings()
    assert "copy of domain global is not kept: what a copy covers cannot be read: wipe the file" in warning
    monkeypatch.setattr(followers_module, "Follower", kept._follower)
    await kept.run(10.0)
    assert kept.followers.names() == (GLOBAL, LOST)
    assert kept.followers.warnings() == []


async def test_copy_that_cannot_be_opened_is_tried_less_and_less_often_and_at_once_when_it_was_wiped(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt looks a whole file through, which may be large."""
    tried: list[float] = []

    def damaged(path: Path) -> Any:
        path.touch()
        if followers_module.unquote(path.stem) == GLOBAL:
            tried.append(kept.now_s)
            raise StorageError("the file is damaged")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(kept, "_opened", damaged)
    await kept.run(10.0)
    assert 3 <= len(tried) <= 6
    await kept.run(3600.0)
    assert len(tried) <= 25
    assert max(after - before for before, after in itertools.pairwise(tried)) < OPEN_AGAIN_S_MAX + 2.0
    before = len(tried)
    await kept.run(5.0)
    assert len(tried) == before
    kept.followers._path(GLOBAL).unlink()
    await kept.run(2.0)
    assert len(tried) == before + 1


async def test_copy_that_is_not_covered_for_long_is_told_with_what_it_covers(kept: Kept) -> None:
    kept.alive = {GLOBAL, LOST}
    await kept.run(3 * SILENT_AFTER_S)
    assert kept.followers.warnings() == []
    kept.alive = {GLOBAL}
    await kept.run(SILENT_AFTER_S - 5.0)
    assert kept.followers.warnings() == []
    await kept.run(10.0)
    (warning,) = kept.followers.warnings()
    assert warning.startswith(f"the copy of domain {LOST} does not cover what was acknowledged in the last 6")
    kept.start()
    await kept.run(SILENT_AFTER_S - 5.0)
    assert kept.followers.warnings() == [], "it may take some time after a start"
    await kept.run(10.0)
    assert "was never complete" in "".join(kept.followers.warnings())
    kept.noted.wall_s = (1e9, 2e9)
    assert "acknowledged after 2001-09-09 01:46:40 UTC: see" in "".join(kept.followers.warnings())
    kept.alive = {GLOBAL, LOST}
    await kept.run(3.0)
    assert kept.followers.warnings() == []


async def test_looking_for_copies_that_breaks_off_is_logged(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(kept.followers, "wanted", broken)
    await kept.followers.start()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await kept.followers.stop()
    assert "copies of other domains are begun and ended no more" in caplog.text
    assert "a bug" in caplog.text


async def test_copy_that_cannot_be_deleted_ends_no_other_one(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.alive = {GLOBAL, LOST}
    await kept.run(10.0)
    kept.pops.append(NEWER)

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    await kept.run(UNWANTED_AFTER_S + 20.0)
    kept.pops.remove(NEWER)
    await kept.run(10.0)
    assert kept.followers.names() == (GLOBAL, LOST)
