"""The demo as a user runs it, with fewer instances."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lucd.cli.main import main
from lucd.demo.pops import story as pops_story
from lucd.demo.wan.sites import why_not

pytestmark = [pytest.mark.cluster, pytest.mark.nova]


def test_demo_runs_through_and_loses_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lucd.cli.main", "demo", "--instances", "6"],
        capture_output=True,
        text=True,
        timeout=600,
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
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9 daemon" in done.stdout
    assert "All are ACTIVE" in done.stdout
    assert "4 servers ACTIVE, no ERROR" in done.stdout
    assert "FAILED" not in done.stdout


def test_each_pop_lives_on_at_both_sides_of_a_cut_and_loses_nothing() -> None:
    if reason := why_not():
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-m", "lucd.cli.main", "demo", "--pops", "3", "--latency-ms", "20", "--instances", "4"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "requests that had to go to another PoP: 0" in done.stdout
    assert "both sides went on" in done.stdout
    assert "every daemon reads every PoP again" in done.stdout
    assert "0 failed, nothing lost" in done.stdout
    assert "FAILED" not in done.stdout


def test_without_the_right_to_make_networks_the_demo_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pops_story, "why_not", lambda: "a WAN needs root: /dev/net/tun is for nobody else")
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--pops", "3"])
    assert ended.value.code == 69
    told = capsys.readouterr().err
    assert "needs root, TUN devices" in told
    assert "`lucd demo` shows one PoP" in told


def test_control_plane_in_each_pop_boots_and_deletes_its_own_while_one_is_cut_off() -> None:
    if reason := why_not():
        pytest.skip(reason)
    command = ["demo", "--control-plane", "--pops", "2", "--latency-ms", "20", "--instances", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "lucd.cli.main", *command], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The cables of pop1 are pulled out" in done.stdout
    assert "every PoP's API lists the servers of all again" in done.stdout
    assert "5 servers ACTIVE, no ERROR" in done.stdout
    assert "FAILED" not in done.stdout
