"""The rules of families.yaml: which group a table's rows belong to, where it lives, how it is read (DESIGN section 8).

Homes and ways of reading count only in a database whose home is `global` or `local`; in one of a PoP all groups live
there. The name of a family whose groups live in the PoP that made them begins with `dht.rows.LOCAL_MARK`: so where a
group is to be looked for can be told from its key alone. A family that is one group for all its rows is never local.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Collection
from typing import Literal

import msgspec
import yaml

from dht.model import LOCAL, SPANNING, GroupKey, Reading
from dht.rows import LOCAL_MARK, split_group_key

TEMPORARY = "_alembic_tmp_"
"""Alembic's batch mode copies table x to `_alembic_tmp_x` and renames it: the copy follows the rules of x."""

ROW_FAMILY = "row"
LOCAL_ROW_FAMILY = LOCAL_MARK + ROW_FAMILY


class Rule(msgspec.Struct, frozen=True):
    """What a table is created with. `family` "row": a group per row; `whole`: one group for the family's tables.

    `home`: "local" or empty. `root`: a row of this table makes its group. `read`: `dht.model.Reading` flags. `trusted`:
    unique keys of random values.
    """

    family: str = ROW_FAMILY
    key: tuple[str, ...] = ()
    whole: bool = False
    merge_last: tuple[str, ...] = ()
    trusted: tuple[tuple[str, ...], ...] = ()
    home: str = ""
    root: bool = False
    read: int = 0


class _Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tables: dict[str, tuple[str, ...]]
    whole: bool = False
    home: Literal["", "local", "global"] = ""
    made_once: bool = False
    read: tuple[Literal["follow", "serve_stale", "partial_ok"], ...] = ()


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    families: dict[str, _Family]
    merge_last: tuple[str, ...]
    trusted: dict[str, tuple[tuple[str, ...], ...]]
    local: dict[str, tuple[tuple[str, ...], ...]]


@functools.cache
def _document() -> _Document:
    text = importlib.resources.files(__package__).joinpath("families.yaml").read_text("utf-8")
    return msgspec.convert(yaml.safe_load(text), _Document)


def rule_of(table: str, columns: Collection[str], home: str = "") -> Rule:
    """The rule for a new table of this name with these columns (lower case). `home`: the database's."""
    document = _document()
    name = table.lower().removeprefix(TEMPORARY)
    merge = tuple(c for c in document.merge_last if c in columns)
    found = Rule(merge_last=merge, root=True)
    said, read = "", 0
    for family, content in document.families.items():
        key = content.tables.get(name)
        if key is not None and all(c in columns for c in key):
            found = Rule(family, key, content.whole, merge, root=next(iter(content.tables)) == name)
            said, read = content.home, sum(Reading[way.upper()] for way in content.read)
            break
    local = home in SPANNING and not found.whole and (said or home) == LOCAL
    keys = (*document.trusted.get(name, ()), *(document.local.get(name, ()) if local else ()))
    return msgspec.structs.replace(
        found,
        family=LOCAL_MARK + found.family if local else found.family,
        trusted=tuple(key for key in keys if all(c in columns for c in key)),
        home=LOCAL if local else "",
        root=local and found.root,
        read=read if home in SPANNING else 0,
    )


@functools.cache
def _made_once() -> frozenset[str]:
    families = _document().families
    return frozenset(LOCAL_MARK + name for name, content in families.items() if content.made_once)


def made_once(key: GroupKey) -> bool:
    """Whether nobody makes a group of this key again when it was deleted (families.yaml, `made_once`)."""
    return split_group_key(key)[1] in _made_once()
