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


def test_control_plane_on_lucd_boots_and_moves_servers_while_a_daemon_dies() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lucd.cli.main", "demo", "--control-plane", "--instances", "4", "--computes", "2"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9 daemon" in done.stdout
    assert "All are ACTIVE" in done.stdout
    assert "4 servers ACTIVE, no ERROR" in done.stdout
    assert "FAILED" not in done.stdout
