"""The production classes under faults: a fixed small set of runs, and fresh seeds; `make soak` runs any number."""

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dht.sim.scenario import run
from dht.sim.scenarios import SCENARIOS
from dht.sim.swarm import swarm

ROOT = Path(__file__).parents[2]
FRESH_SEEDS = int(os.environ.get("LUCD_FRESH_SEEDS", "500"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_run_under_faults_has_no_violation(name: str) -> None:
    verdict = run(SCENARIOS[name], 1)
    assert verdict.violations == [], f"python -m dht.sim run --scenario {name} --seed 1"
    assert verdict.counts["commits_applied"] > 10


def test_floor_of_a_group_begun_anew_outlives_an_accept_that_changes_nothing() -> None:
    """A retry of what a collected group had applied: the accept that only finished the group lost the floor."""
    assert run(swarm(11888), 11888).violations == []


def test_soak_of_fresh_seeds_has_no_violation() -> None:
    """Other seeds each time: what the run prints when one fails says how to get the same run again."""
    first = random.SystemRandom().randrange(10**9)
    command = [sys.executable, "-m", "dht.sim", "soak", "--seeds", str(FRESH_SEEDS), "--first", str(first)]
    done = subprocess.run(
        [*command, "--jobs", str(os.cpu_count() or 1)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{FRESH_SEEDS} runs" in done.stdout


def test_failure_in_one_of_two_processes_is_replayed_by_the_command_that_is_printed() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    soak = [sys.executable, "-m", "dht.sim", "soak", "--seeds", "60", "--jobs", "2", "--off", "one_accept_in_flight"]
    told = subprocess.run([*soak, "--stop"], env=env, capture_output=True, text=True, check=False, timeout=300)
    assert told.returncode == 1, told.stdout + told.stderr
    lines = told.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAILED: python -m "))
    replay = [sys.executable, *shlex.split(lines[at].removeprefix("FAILED: python "))]
    again = subprocess.run(replay, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 1
    first = lines[at + 1].strip()
    assert f"VIOLATION: {first}"[:250] in again.stdout
    assert " commit " in again.stdout  # the story of the run, not only its end


def test_same_seed_gives_the_same_trace_in_other_processes_with_other_hashes() -> None:
    code = (
        "from dht.sim.scenario import run; from dht.sim.scenarios import scenario\n"
        "print([run(scenario(name, 7), 7).fingerprint for name in ('crash', 'transactions')],"
        " [run(scenario('swarm', seed), seed).fingerprint for seed in range(20)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for hashes in ("0", "1", "77")
    }
    assert len(outputs) == 1
