"""The rules of families.yaml: which group a table's rows belong to (DESIGN section 8)."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Collection

import msgspec
import yaml

TEMPORARY = "_alembic_tmp_"
"""Alembic's batch mode copies table x to `_alembic_tmp_x` and renames it: the copy follows the rules of x."""

ROW_FAMILY = "row"


class Rule(msgspec.Struct, frozen=True):
    """What a table is created with. `family` "row": a group per row; `whole`: one group for the family's tables."""

    family: str = ROW_FAMILY
    key: tuple[str, ...] = ()
    whole: bool = False
    merge_last: tuple[str, ...] = ()
    trusted: tuple[tuple[str, ...], ...] = ()


class _Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tables: dict[str, tuple[str, ...]]
    whole: bool = False


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    families: dict[str, _Family]
    merge_last: tuple[str, ...]
    trusted: dict[str, tuple[tuple[str, ...], ...]]


@functools.cache
def _document() -> _Document:
    text = importlib.resources.files(__package__).joinpath("families.yaml").read_text("utf-8")
    return msgspec.convert(yaml.safe_load(text), _Document)


def rule_of(table: str, columns: Collection[str]) -> Rule:
    """The rule for a new table of this name with these columns (lower case)."""
    document = _document()
    name = table.lower().removeprefix(TEMPORARY)
    merge = tuple(c for c in document.merge_last if c in columns)
    trusted = tuple(key for key in document.trusted.get(name, ()) if all(c in columns for c in key))
    for family, content in document.families.items():
        key = content.tables.get(name)
        if key is not None and all(c in columns for c in key):
            return Rule(family, key, content.whole, merge, trusted)
    return Rule(merge_last=merge, trusted=trusted)
