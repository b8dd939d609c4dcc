"""Scripts that fill an empty in-process database are run once per process; afterwards their result is cloned.

Nova's database fixture restores the same schema dump for each of its tests.
"""

from __future__ import annotations

from typing import NamedTuple

from dht.register.memory import MemoryStore
from nova_bridge.sql.catalog import Catalog
from nova_bridge.sql.database import Database

KEPT_MAX = 16


class _Kept(NamedTuple):
    store: MemoryStore
    catalog: Catalog


_kept: dict[bytes, _Kept] = {}


def restore(database: Database, digest: bytes) -> bool:
    """Give an empty database the content that the script made before. Returns whether that was possible."""
    kept = _kept.get(digest)
    if kept is None or not isinstance(database.store, MemoryStore) or database.schema.version:
        return False
    database.replace_store(kept.store.clone(), kept.catalog)
    return True


def keep(database: Database, digest: bytes) -> None:
    """Remember the content that the script made of an empty database."""
    if isinstance(database.store, MemoryStore):
        if len(_kept) >= KEPT_MAX:
            _kept.clear()
        store = database.store.clone()
        _kept[digest] = _Kept(store, database.catalog_for(store))
