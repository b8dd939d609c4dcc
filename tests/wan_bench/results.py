"""The file of results: cells by their key, each part with the run that measured it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

FILE = Path("docs/benchmarks/wan.json")
KEYS = ("store", "sites", "rtt_ms", "slowed", "controllers", "daemons", "last_daemons", "cut_site", "cut_s")


def name_of(key: dict[str, Any]) -> str:
    """For example `store=lucd sites=8 rtt_ms=50 controllers=1`."""
    return " ".join(f"{name}={key[name]}" for name in KEYS if name in key)


def load(file: Path) -> dict[str, Any]:
    """Name of the cell -> part -> what was measured; empty if there is no file yet."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def merge(file: Path, key: dict[str, Any], found: dict[str, Any], run: str) -> None:
    """Put the parts into the cell, in place of older ones of the same name."""
    cells = load(file)
    about = {"run": run, "machine": machine(), "commit": _commit()}
    cell = cells.setdefault(name_of(key), {"key": key, "parts": {}})
    cell["parts"] |= {part: {"about": about, **what} for part, what in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(dict(sorted(cells.items())), indent=1, sort_keys=True) + "\n")
    fresh.replace(file)


def machine() -> str:
    """What the figures are of."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, Python {platform.python_version()}"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


class Cells:
    """The file, read."""

    def __init__(self, file: Path) -> None:
        self._cells = load(file)

    def all(self) -> list[dict[str, Any]]:
        return list(self._cells.values())

    def places(self) -> list[tuple[int, int]]:
        """(sites, round trip in ms) of all that was measured without a cut and in its own time, in order."""
        keys = [cell["key"] for cell in self.all() if not {"cut_s", "slowed"} & cell["key"].keys()]
        return sorted({(key["sites"], key["rtt_ms"]) for key in keys})

    def part(
        self,
        part: str,
        store: str,
        sites: int,
        rtt_ms: int,
        controllers: int = 1,
        daemons: int = 1,
        slowed: int = 1,
        last_daemons: int = 0,
    ) -> dict[str, Any] | None:
        """What was measured, None if it was not. Of a slowed one the times are the laboratory's, `slowed` times as long
        as what they stand for. `last_daemons`: of lucd in the last site, if they are more.
        """
        key: dict[str, Any] = {"store": store, "sites": sites, "rtt_ms": rtt_ms, "controllers": controllers}
        if store == "lucd":
            key["daemons"] = daemons
            if last_daemons:
                key["last_daemons"] = last_daemons
        if slowed > 1:
            key["slowed"] = slowed
        found: dict[str, Any] | None = self._cells.get(name_of(key), {}).get("parts", {}).get(part)
        return found

    def has_daemons(self, sites: int, rtt_ms: int, controllers: int, daemons: int) -> bool:
        """Whether lucd was measured there with so many daemons in each site."""
        key = {"store": "lucd", "sites": sites, "rtt_ms": rtt_ms, "controllers": controllers, "daemons": daemons}
        return name_of(key) in self._cells

    def slowed(self, part: str) -> list[tuple[int, int, int, int]]:
        """(sites, round trip in ms, how often slowed, controllers of a site) of all whose part was measured so, in
        order.
        """
        keys = [cell["key"] for cell in self.all() if "slowed" in cell["key"] and part in cell["parts"]]
        return sorted({(key["sites"], key["rtt_ms"], key["slowed"], key["controllers"]) for key in keys})

    def last_daemons(self) -> list[int]:
        """How many daemons the last site had where the others had fewer, in order."""
        return sorted({cell["key"]["last_daemons"] for cell in self.all() if "last_daemons" in cell["key"]})

    def cuts(self) -> list[dict[str, Any]]:
        """The cells of cuts."""
        return [cell for cell in self.all() if "cut_s" in cell["key"]]
