"""The production classes on a simulated machine: exactly what the daemon composes, with the simulator's world."""

from __future__ import annotations
