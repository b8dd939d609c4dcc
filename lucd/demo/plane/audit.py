"""A look at Nova's and Placement's tables that owes nothing to either: SQL through one daemon's door."""

from __future__ import annotations

from collections.abc import Callable, Collection

import sqlalchemy

from lucd.demo.plane.site import API, CELL1, PLACEMENT

INSTANCES = "SELECT uuid FROM instances WHERE deleted = 0 AND vm_state = 'active' AND task_state IS NULL"
ALLOCATED = "SELECT DISTINCT consumer_id FROM allocations"
MAPPED = "SELECT instance_uuid FROM instance_mappings WHERE queued_for_delete = 0"
BUILDING = "SELECT instance_uuid FROM build_requests"


def audit(url: Callable[[str], str], servers: Collection[str]) -> list[str]:
    """What is not as it has to be when exactly `servers` are ACTIVE and nothing is under way."""
    expected = set(servers)
    problems = []
    for database, query, wanted, what in (
        (CELL1, INSTANCES, expected, "active instances"),
        (API, MAPPED, expected, "instance mappings"),
        (API, BUILDING, set(), "build requests"),
        (PLACEMENT, ALLOCATED, expected, "consumers with allocations"),
    ):
        found = _column(url(database), query)
        if found != wanted:
            problems.append(f"{what}: {len(found)}, not {len(wanted)}; these differ: {sorted(found ^ wanted)[:5]}")
    return problems


def _column(url: str, query: str) -> set[str]:
    engine = sqlalchemy.create_engine(url)
    try:
        with engine.connect() as connection:
            return {str(row[0]) for row in connection.execute(sqlalchemy.text(query))}
    finally:
        engine.dispose()
