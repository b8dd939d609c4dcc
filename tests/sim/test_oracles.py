"""The oracles on histories with planted errors, and the whole machinery over a toy store with planted bugs."""

import pytest

from dht.register.memory import MemoryStore
from dht.sim.cluster import Boot, Node
from dht.sim.scenario import Faults, Scenario, Verdict, run
from tests.sim.toy import ToyNode

FAULTS = Faults(crash=2, pause=1, partition=1, loss=1, slow_disk=1, skew=1)


def toy_run(seed: int, bug: str | None = None, **scenario: object) -> Verdict:
    shared = MemoryStore()

    def build(boot: Boot) -> Node:
        return ToyNode(boot, shared, bug)

    return run(Scenario("toy", duration_s=4.0, faults=FAULTS, **scenario), seed, build)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(6))
def test_correct_store_passes_every_oracle(seed: int) -> None:
    verdict = toy_run(seed, shuffle=seed % 2 == 0)
    assert verdict.violations == []
    assert verdict.undecided == 0
    assert verdict.counts["commits_applied"] > 50
    assert verdict.counts["finds"] > 5


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        ("stale_read", "not linearizable"),
        ("lost_write", "not linearizable"),
        ("no_guards", "fork"),
        ("torn_transaction", "stands in 1 of its"),
        ("find_misses_a_row", "found row"),
        ("repeated_id", "overlap"),
        ("applied_reported_as_refused", "unexpected Invalid"),
    ],
)
def test_planted_bug_of_the_store_is_reported(bug: str, words: str) -> None:
    violations = [v for seed in range(3) for v in toy_run(seed, bug).violations]
    assert any(words in violation for violation in violations), violations


def test_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    assert toy_run(1).fingerprint == toy_run(1).fingerprint
    assert toy_run(1).fingerprint != toy_run(2).fingerprint


def test_store_that_does_not_recover_is_a_violation() -> None:
    verdict = toy_run(1, "falls_silent")
    assert any("cannot be read at n0 after the faults ended" in v for v in verdict.violations)
