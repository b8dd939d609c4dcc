"""Which PoPs keep a copy of a PoP's domain, for the day on which it loses all its disks (DESIGN section 8). Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from dht.model import GLOBAL

BACKUP_POPS: Final = 1


def backups_of(pop: str, pops: Iterable[str], count: int) -> tuple[str, ...]:
    """The PoPs that follow it, best first, by rendezvous hashing: a PoP more or less moves few copies."""
    others = {other for other in pops if other != pop}
    return tuple(sorted(others, key=lambda other: (_score(pop, other), other), reverse=True)[:count])


def followed_by(pop: str, pops: Iterable[str], count: int) -> tuple[str, ...]:
    """The domains that this PoP follows: `global` first, then PoPs, sorted.

    A PoP that is alone follows nothing: the voters of `global` are its own nodes.
    """
    known = {*pops, pop}
    if len(known) == 1:
        return ()
    return GLOBAL, *sorted(other for other in known if pop in backups_of(other, known, count))


def _score(pop: str, other: str) -> bytes:
    return hashlib.sha256(f"{pop}\0{other}".encode()).digest()
