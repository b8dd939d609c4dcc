"""REGEXP for SQLite's engine, and Nova told that this database has it.

Nova chooses the operator of its API's pattern filters (a server's name, for example) by the scheme of its database's
URL. A scheme that it does not know gets LIKE, under which a pattern such as `^web-[0-9]+$` finds nothing.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from typing import Any

LOG = logging.getLogger(__name__)
SCHEME, ALIKE = "lucd", "sqlite"


def regexp(pattern: Any, value: Any) -> bool | None:
    """What `value REGEXP pattern` gives, as with oslo.db and SQLAlchemy on SQLite."""
    if pattern is None or value is None:
        return None
    return re.search(str(pattern), str(value)) is not None


def install() -> None:
    """Have Nova treat URLs of this database as SQLite's when it chooses the operator; once, if Nova is loaded."""
    utils = sys.modules.get("nova.db.utils")
    if utils is None:
        return
    known = getattr(utils, "_db_connection_type", None)
    if known is None:
        LOG.warning("nova.db.utils is not as expected: patterns in filters of its API are compared by LIKE")
    elif not hasattr(known, "__wrapped__"):
        utils._db_connection_type = _kinds(known)


def _kinds(known: Any) -> Any:
    @functools.wraps(known)
    def kind_of(connection: str) -> str:
        kind: str = known(connection)
        return ALIKE if kind == SCHEME else kind

    return kind_of
