"""Every rule has a switch, and a test that fails when the rule is taken away.

`CAUGHT`: with the rule off the simulator finds a violation within a few seeds; with it on it does not. `DIRECTED`: what
breaks shows too seldom for that, so a hand-made schedule shows it, told with the rule and without.
"""

import importlib

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

_REGISTER = "tests.sim.test_rare_rules_register"
_DOMAIN = "tests.sim.test_rare_rules_domain"
_FLOORS = "tests.sim.test_rare_rules_collection"
_FENCE = "tests.sim.test_rare_rules_fence"
_COLLECTION = "tests.dht.domain.test_collection"
_TRANSFER = "tests.dht.domain.test_transfer"

DIRECTED = {
    # rule: (module, test that tells the story with the rule, test that tells it without; often the same one)
    "promise_durable": (_REGISTER, "test_promise_durable_forgotten_promise_loses_an_acknowledged_write"),
    "boot_in_ballot": (_REGISTER, "test_boot_in_ballot_two_values_at_one_ballot_read_differently"),
    "drop_after_failed_accept": (
        _REGISTER,
        "test_drop_after_failed_accept_state_that_nobody_promised_on_loses_an_acknowledged_write",
    ),
    "window_floor": (_REGISTER, "test_window_floor_transaction_that_was_forgotten_is_applied_again"),
    "find_majority": (_REGISTER, "test_find_majority_replica_that_missed_the_write_answers_alone"),
    "find_lists_unsettled": (
        _REGISTER,
        "test_find_lists_unsettled_write_that_is_not_durable_yet_is_told_and_lost",
    ),
    "abort_before_touching_intent": (
        _REGISTER,
        "test_abort_before_touching_intent_transaction_is_applied_by_half",
    ),
    "decision_kept": (_REGISTER, "test_decision_kept_committed_transaction_loses_a_group"),
    "seal_on_accept": (_DOMAIN, "test_seal_on_accept_late_accept_of_the_old_epoch_is_acknowledged_and_lost"),
    "seal_before_init": (_DOMAIN, "test_seal_before_init_write_between_survey_and_seal_is_lost"),
    "only_initialised_contribute": (
        _TRANSFER,
        "test_initialise_no_initialised_replica_in_the_epoch_before_recurses",
        "test_initialise_planted_bug_uninitialised_contribute_loses_the_value",
    ),
    "init_durable": (_DOMAIN, "test_init_durable_restart_initialises_again_and_loses_what_was_written_since"),
    "refuse_stale_init": (_DOMAIN, "test_refuse_stale_init_epoch_below_a_seal_is_not_initialised"),
    "replace_content": (_DOMAIN, "test_replace_content_row_deleted_while_a_replica_was_away_comes_back_with_it"),
    "gate_on_majority": (_DOMAIN, "test_gate_on_majority_node_that_leaves_is_let_go_with_the_only_copy"),
    "decided_by_previous_voters": (
        _DOMAIN,
        "test_decided_by_previous_voters_member_that_is_gone_is_asked_for_the_next_link",
    ),
    "floor_carried": (
        _FLOORS,
        "test_floor_carried_transaction_from_before_the_collection_is_applied_again",
    ),
    "collect_needs_all": (
        _COLLECTION,
        "test_replica_without_the_tombstone_keeps_the_others_from_erasing_it",
        "test_replica_without_the_tombstone_brings_the_dead_back_when_a_majority_is_enough",
    ),
    "floor_keeps_promise": (
        _FLOORS,
        "test_floor_keeps_promise_accept_on_its_way_overwrites_a_later_write",
    ),
    "version_with_promise": (
        _FENCE,
        "test_version_with_promise_replica_that_missed_the_catalog_commits_under_the_old_one",
    ),
    "fence_settles_groups": (_FENCE, "test_fence_settles_groups_value_of_a_minority_comes_to_light_after_it"),
    "fence_ends_intents": (_FENCE, "test_fence_ends_intents_transaction_prepared_before_it_commits_after_it"),
    "versions_carried": (_FENCE, "test_versions_carried_new_replica_tells_what_the_old_ones_told"),
    "promises_carried": (_FENCE, "test_promises_carried_group_that_was_only_promised_is_listed_by_a_new_replica"),
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


def test_every_rule_is_caught_by_chance_or_by_a_schedule_of_its_own() -> None:
    rules = {*Rules.__struct_fields__, *DomainRules.__struct_fields__}
    assert rules == CAUGHT.keys() | DIRECTED.keys()
    assert not CAUGHT.keys() & DIRECTED.keys()


@pytest.mark.parametrize("rule", DIRECTED)
def test_directed_test_of_a_rule_exists(rule: str) -> None:
    module, *names = DIRECTED[rule]
    for name in names:
        assert callable(getattr(importlib.import_module(module), name, None)), f"{module} has no {name}"
