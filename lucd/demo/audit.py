"""A look at Nova's tables that owes nothing to Nova: SQL through one daemon's door."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy


def audit(url: str, expected: Mapping[str, str], daemon: int) -> list[str]:
    """What is not as expected: uuid -> vm_state of each live instance, with its metadata and info cache."""
    engine = sqlalchemy.create_engine(url)
    try:
        with engine.connect() as connection:
            rows = connection.execute(sqlalchemy.text("SELECT uuid, vm_state FROM instances WHERE deleted = 0"))
            found = {str(row[0]): str(row[1]) for row in rows}
            counts = [
                int(connection.execute(sqlalchemy.text(f"SELECT count(*) FROM {table} WHERE deleted = 0")).scalar_one())
                for table in ("instance_metadata", "instance_info_caches")
            ]
    finally:
        engine.dispose()
    problems = []
    if found != dict(expected):
        different = sorted(u for u in set(found) | set(expected) if found.get(u) != expected.get(u))
        problems.append(f"daemon {daemon} shows other instances than were written: {', '.join(different)}")
    if counts != [len(expected)] * 2:
        problems.append(
            f"daemon {daemon} shows {counts} rows of metadata and info caches for {len(expected)} instances"
        )
    return problems
