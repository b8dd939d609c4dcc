"""The lucd daemon: composition, configuration, lifecycle, local socket, admin HTTP and command line."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """The installed version."""
    return metadata.version("lucd")
