"""The counters of a part of the daemon, for status and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Counters = Mapping[str, int | float]


def counters_of(part: Any) -> Counters:
    """The counters of a part, whether it keeps them in a dict or a dataclass."""
    found = part.counters
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return dataclasses.asdict(found)
    result: Counters = dict(found)
    return result
