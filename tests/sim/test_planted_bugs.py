"""Every rule has a switch, and a test that fails when the rule is taken away.

`CAUGHT`: with the rule off the simulator finds a violation within the stated number of seeds; with it on the same seed
passes. `DIRECTED`: what breaks shows too seldom for that, so a hand-made schedule shows it, told with the rule and
without. `CAUGHT_TOO`: of those, some that a scenario of their own shows as well.
"""

import importlib

import pytest

from dht.sim.planted import CAUGHT, CAUGHT_TOO, DIRECTED, RULES, hunt, switched_off
from dht.sim.scenario import run
from dht.sim.scenarios import SCENARIOS, scenario

FIRST_SEED = 1


@pytest.mark.parametrize("rule", CAUGHT | CAUGHT_TOO)
def test_rule_switched_off_is_noticed_and_the_same_seed_passes_with_it(rule: str) -> None:
    name, within = (CAUGHT | CAUGHT_TOO)[rule]
    found = hunt(rule, name, range(FIRST_SEED, FIRST_SEED + within), 1)
    assert found.caught, f"no violation in {within} seeds of {name} without {rule}"
    seed = FIRST_SEED + found.caught[0]
    assert run(scenario(name, seed), seed).violations == []


def test_every_rule_is_caught_by_chance_or_by_a_schedule_of_its_own() -> None:
    assert set(RULES) == CAUGHT.keys() | DIRECTED.keys()
    assert not CAUGHT.keys() & DIRECTED.keys()
    assert CAUGHT_TOO.keys() <= DIRECTED.keys()


@pytest.mark.parametrize("rule", DIRECTED)
def test_directed_test_of_a_rule_exists(rule: str) -> None:
    module, *names = DIRECTED[rule]
    for name in names:
        assert callable(getattr(importlib.import_module(module), name, None)), f"{module} has no {name}"


def test_switch_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"no rule 'sael'; rules: .*seal"):
        switched_off(SCENARIOS["steady"], ("sael",))
