"""A look at Nova's and Placement's tables that owes nothing to either: SQL through one daemon's door."""

from __future__ import annotations

from collections.abc import Callable, Collection

import sqlalchemy

from lucd.demo.plane.site import ALONE, API, Place

INSTANCES = "SELECT uuid FROM instances WHERE deleted = 0 AND vm_state = 'active' AND task_state IS NULL"
ALLOCATED = "SELECT DISTINCT consumer_id FROM allocations"
MAPPED = "SELECT instance_uuid FROM instance_mappings WHERE queued_for_delete = 0"
BUILDING = "SELECT instance_uuid FROM build_requests"


def audit(
    url: Callable[[str], str],
    servers: Collection[str],
    place: Place = ALONE,
    elsewhere: Collection[str] = (),
) -> list[str]:
    """What is not as it has to be when exactly `servers` are ACTIVE at the place and nothing is under way.

    `elsewhere`: servers of the other places, which the API database knows as well.
    """
    expected = set(servers)
    problems = []
    for database, query, wanted, what in (
        (place.cell, INSTANCES, expected, "active instances"),
        (API, MAPPED, expected | set(elsewhere), "instance mappings"),
        (API, BUILDING, set(), "build requests"),
        (place.placement, ALLOCATED, expected, "consumers with allocations"),
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
