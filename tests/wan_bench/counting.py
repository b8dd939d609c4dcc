"""Counters that controllers raise while a site is cut off: what was acknowledged must be there afterwards.

Each row has one writer. `attempted` counts before a transaction is sent and `acknowledged` after its commit returned,
so at the end the row's value lies between them; less is a lost write, more an invented one.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import sqlalchemy as sa

GAP_S = 0.03
"""Pauses between two acknowledged writes that are kept."""
ERROR_PAUSE_S = 0.02

counters = sa.Table(
    "wan_counters",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("value", sa.Integer, nullable=False),
)


def make(engine: Any, rows: int) -> None:
    """The table, anew, with rows that stand at 0."""
    counters.drop(engine, checkfirst=True)
    counters.create(engine)
    with engine.begin() as connection:
        connection.execute(counters.insert(), [{"id": row, "value": 0} for row in range(rows)])


def count(engine: Any, row: int, seconds: float) -> dict[str, Any]:
    """Raise the row for so long. Times are monotonic seconds; a gap is (began, ended, error that came first in it)."""
    raised = counters.update().where(counters.c.id == row).values(value=counters.c.value + 1)
    attempted = acknowledged = 0
    gaps: list[tuple[float, float, str]] = []
    errors: Counter[str] = Counter()
    last_s = time.monotonic()
    until_s, why = last_s + seconds, ""
    while time.monotonic() < until_s:
        attempted += 1
        try:
            with engine.begin() as connection:
                connection.execute(raised)
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            errors[text] += 1
            why = why or text
            time.sleep(ERROR_PAUSE_S)
            continue
        acknowledged += 1
        now_s = time.monotonic()
        if now_s - last_s > GAP_S:
            gaps.append((last_s, now_s, why))
        last_s, why = now_s, ""
    if (now_s := time.monotonic()) - last_s > GAP_S:
        gaps.append((last_s, now_s, why or "not answered"))
    return {"attempted": attempted, "acknowledged": acknowledged, "gaps": gaps, "errors": errors.most_common(5)}


def look(engine: Any) -> dict[str, Any]:
    """Row -> value."""
    try:
        with engine.connect() as connection:
            return {"values": {str(row.id): row.value for row in connection.execute(sa.select(counters))}}
    except Exception as error:
        return {"values": {}, "why": str(error).splitlines()[0]}
