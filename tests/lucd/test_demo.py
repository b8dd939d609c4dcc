"""The demo as a user runs it, with fewer instances."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.nova]


def test_demo_runs_through_and_loses_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lucd.cli.main", "demo", "--instances", "6"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9 daemon" in done.stdout
    assert "refused: UnexpectedTaskStateError" in done.stdout
    assert "0 failed, nothing lost" in done.stdout
    assert "FAILED" not in done.stdout
