from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def chance() -> random.Random:
    return random.Random(20)


@pytest.fixture
def socket_path():
    """Short: a Unix socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="lucd") as directory:
        yield str(Path(directory) / "s")
