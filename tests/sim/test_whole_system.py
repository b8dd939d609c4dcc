"""The production classes under faults: a fixed small set of seeds. `make soak` runs as many as one likes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dht.sim.scenario import run
from dht.sim.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
SEEDS = [(name, seed) for name in SCENARIOS for seed in (1, 2)] + [("everything", 3), ("crash", 3), ("replace", 3)]


@pytest.mark.parametrize(("name", "seed"), SEEDS)
def test_run_under_faults_has_no_violation(name: str, seed: int) -> None:
    verdict = run(SCENARIOS[name], seed)
    assert verdict.violations == [], f"python -m dht.sim run --scenario {name} --seed {seed}"
    assert verdict.counts["commits_applied"] > 10


def test_same_seed_gives_the_same_trace_in_other_processes_with_other_hashes() -> None:
    code = (
        "from dht.sim.scenario import run; from dht.sim.scenarios import SCENARIOS\n"
        "print([run(SCENARIOS[name], 7).fingerprint for name in ('crash', 'grow', 'transactions')])"
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
