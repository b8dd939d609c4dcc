"""Every rule has a switch. With a rule off the simulator finds a violation within a few seeds; with it on it does not.

`RARE` names the switches whose breaking shows too seldom for this suite, with the reason; `make soak` with `--off RULE`
hunts for them.
"""

import pytest

from dht.domain.rules import DomainRules
from dht.register.rules import Rules
from dht.sim.scenario import Scenario, run
from dht.sim.scenarios import SCENARIOS

CAUGHT = {
    # rule: (scenario, seeds within which it shows; the first few, as a rule; which ones moves with the code)
    "accept_durable": ("single", range(1, 61)),
    "refuse_lower_ballot": ("network", range(1, 61)),
    "delta_base_checked": ("steady", range(1, 61)),
    "one_accept_in_flight": ("network", range(1, 61)),
    "chosen_before_answer": ("network", range(1, 61)),
    "promise_not_across_epochs": ("replace", range(1, 61)),
    "confirm_refusal": ("network", range(1, 61)),
    "window": ("window", range(1, 61)),
    "refusal_recorded_at_retry": ("late", range(1, 101)),
    "read_same_ballot": ("crash", range(1, 61)),
    "read_writes_back": ("crash", range(1, 61)),
    "find_intents": ("finds", range(1, 61)),
    "reads_resolve_intents": ("transactions", range(1, 61)),
    "prepare_before_commit": ("transactions", range(1, 61)),
    "seal": ("grow", range(1, 61)),
    "serve_only_initialised": ("grow", range(1, 61)),
    "highest_ballot_wins": ("drain", range(1, 61)),
    "incarnation_checked": ("replace", range(1, 61)),
}

_TWO_PROPOSERS = "needs two proposers of one group, and a crash or a lost frame between a prepare and its accept"
_ONE_CHANGE = "needs a second change of the roster, or a crash, within the milliseconds of a tablet's flip"
_LOST_COORDINATOR = (
    "needs the transaction's own node to die between two of its steps while another one meets the intent"
)
RARE = {
    "promise_durable": _TWO_PROPOSERS,
    "boot_in_ballot": "needs a restart within the round trip of the first prepare, before its flush",
    "drop_after_failed_accept": _TWO_PROPOSERS,
    "window_floor": "needs more than 80 writes of a group between two attempts of one transaction",
    "find_majority": "needs the one replica that missed an accept to answer a find first",
    "find_lists_unsettled": "needs an accept that reached one replica, and a find that hears it and a stale one",
    "abort_before_touching_intent": _LOST_COORDINATOR,
    "decision_kept": _LOST_COORDINATOR,
    "seal_on_accept": _ONE_CHANGE,
    "seal_before_init": _ONE_CHANGE,
    "only_initialised_contribute": _ONE_CHANGE,
    "init_durable": _ONE_CHANGE,
    "refuse_stale_init": _ONE_CHANGE,
    "replace_content": _ONE_CHANGE,
    "gate_on_majority": _ONE_CHANGE,
    "decided_by_previous_voters": "needs two members that propose different links while the voters change",
    "floor_carried": "needs an accept that was on its way during a whole collection and a transfer",
    "collect_needs_all": "needs a replica that slept through a deletion and its collection",
    "floor_keeps_promise": "needs an accept that was on its way during a whole collection",
}


def switched_off(rule: str, scenario: str) -> Scenario:
    if rule in Rules.__struct_fields__:
        return SCENARIOS[scenario].without(rules=(rule,))
    return SCENARIOS[scenario].without(domain_rules=(rule,))


@pytest.mark.parametrize(("rule", "scenario", "seeds"), [(rule, *how) for rule, how in CAUGHT.items()])
def test_rule_switched_off_is_noticed_and_the_same_seed_passes_with_it(rule: str, scenario: str, seeds: range) -> None:
    broken = switched_off(rule, scenario)
    seed = next((seed for seed in seeds if run(broken, seed).violations), None)
    assert seed is not None, f"no violation in {len(seeds)} seeds of {scenario} without {rule}"
    assert run(SCENARIOS[scenario], seed).violations == []


def test_every_rule_is_caught_or_explained() -> None:
    rules = {*Rules.__struct_fields__, *DomainRules.__struct_fields__}
    assert rules == CAUGHT.keys() | RARE.keys()
    assert not CAUGHT.keys() & RARE.keys()
