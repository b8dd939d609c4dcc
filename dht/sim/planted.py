"""The planted bugs: every rule of the protocol has a switch, and a way in which its absence is noticed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from dht.domain.rules import DomainRules, FollowRules
from dht.register.rules import Rules
from dht.sim.scenario import Scenario, run
from dht.sim.scenarios import scenario

WORLD: Final[dict[str, dict[str, bool]]] = {
    "boots_checked": {"boots_checked": False},
    "flush_awaited": {"lying_disks": True},
}
"""Rules of what the protocol stands on, as fields of a scenario: peers refuse a directory that was copied or rolled
back (`dht.wire.boots`); what a disk calls durable is flushed."""
RULES: Final = (
    *Rules.__struct_fields__,
    *DomainRules.__struct_fields__,
    *FollowRules.__struct_fields__,
    *WORLD,
)


def switched_off(of: Scenario, off: Sequence[str]) -> Scenario:
    """The same with these rules, of the registers or of the domain, switched off. Raises ValueError for others."""
    for rule in off:
        if rule not in RULES:
            raise ValueError(f"there is no rule {rule!r}; rules: {', '.join(RULES)}")
    plain: dict[str, Any] = {name: value for rule in off for name, value in WORLD.get(rule, {}).items()}
    return replace(
        of,
        **plain,
        rules=of.rules + tuple(rule for rule in off if rule in Rules.__struct_fields__),
        domain_rules=of.domain_rules + tuple(rule for rule in off if rule in DomainRules.__struct_fields__),
        follow_rules=of.follow_rules + tuple(rule for rule in off if rule in FollowRules.__struct_fields__),
    )


@dataclass(frozen=True, slots=True)
class Hunt:
    """What a search for one planted bug found: the seeds that it tried, those that showed it, and how."""

    rule: str
    scenario: str
    tried: int
    caught: tuple[int, ...]
    violation: str

    @property
    def gaps(self) -> tuple[int, ...]:
        """How many seeds each catch took, one after the other."""
        return tuple(b - a for a, b in zip((-1, *self.caught), self.caught, strict=False))


def hunt(rule: str, name: str, seeds: Iterable[int], catches: int) -> Hunt:
    """Run seeds without the rule until so many have shown a violation, or there are no more."""
    caught: list[int] = []
    tried, violation = 0, ""
    for at, seed in enumerate(seeds):
        tried += 1
        if violations := run(switched_off(scenario(name, seed), (rule,)), seed).violations:
            caught.append(at)
            violation = violation or violations[0].splitlines()[0]
            if len(caught) >= catches:
                break
    return Hunt(rule, name, tried, tuple(caught), violation)


CAUGHT: Final[dict[str, tuple[str, int]]] = {
    "accept_durable": ("single", 60),
    "refuse_lower_ballot": ("swarm", 150),
    "delta_base_checked": ("swarm", 60),
    "one_accept_in_flight": ("swarm", 40),
    "chosen_before_answer": ("swarm", 60),
    "confirm_refusal": ("swarm", 300),
    "window": ("swarm", 80),
    "refusal_recorded_at_retry": ("late", 100),
    "read_majority": ("swarm", 40),
    "read_same_ballot": ("swarm", 40),
    "read_exact_data": ("swarm", 300),
    "read_writes_back": ("swarm", 120),
    "find_intents": ("finds", 60),
    "reads_resolve_intents": ("swarm", 100),
    "prepare_before_commit": ("swarm", 40),
    "serve_only_initialised": ("swarm", 120),
    "highest_ballot_wins": ("drain", 60),
    "boots_checked": ("rolled-back", 20),
    "flush_awaited": ("single", 60),
    "sequence_jumps": ("recovered", 20),
}
"""rule: (scenario, seeds within which a random run shows that it is off)."""

CAUGHT_TOO: Final[dict[str, tuple[str, int]]] = {
    "drop_looks_again": ("drops", 10),
    "drop_accepts_anew": ("drops", 40),
}
"""As `CAUGHT`, of rules that are `DIRECTED` as well."""

_REGISTER = "tests.sim.test_rare_rules_register"
_DOMAIN = "tests.sim.test_rare_rules_domain"
_FLOORS = "tests.sim.test_rare_rules_collection"
_FENCE = "tests.sim.test_rare_rules_fence"
_EPOCHS = "tests.sim.test_rare_rules_epochs"
_RETRY = "tests.sim.test_rare_rules_retry"
_DROP = "tests.sim.test_rare_rules_drop"
_COLLECTION = "tests.dht.domain.test_collection"
_TRANSFER = "tests.dht.domain.test_transfer"
_FOLLOWER = "tests.dht.domain.test_follower"
DIRECTED: Final[dict[str, tuple[str, ...]]] = {
    "promise_durable": (_REGISTER, "test_promise_durable_forgotten_promise_loses_an_acknowledged_write"),
    "boot_in_ballot": (_REGISTER, "test_boot_in_ballot_two_values_at_one_ballot_read_differently"),
    "drop_after_failed_accept": (
        _REGISTER,
        "test_drop_after_failed_accept_state_that_nobody_promised_on_loses_an_acknowledged_write",
    ),
    "window_floor": (_REGISTER, "test_window_floor_transaction_that_was_forgotten_is_applied_again"),
    "applied_floor": (_REGISTER, "test_applied_floor_retry_of_an_applied_transaction_is_told_that_it_was_not"),
    "seen_was_chosen": (
        _REGISTER,
        "test_seen_was_chosen_write_below_an_unchosen_ballot_of_its_gateway_is_applied_again",
    ),
    "end_is_not_first": (
        _REGISTER,
        "test_end_is_not_first_write_that_is_forgotten_while_its_end_waits_is_told_as_not_applied",
    ),
    "seen_kept": (_RETRY, "test_seen_kept_write_that_met_an_intent_after_its_accept_failed_is_applied"),
    "find_majority": (_REGISTER, "test_find_majority_replica_that_missed_the_write_answers_alone"),
    "find_indexed": (_REGISTER, "test_find_indexed_row_from_before_the_index_is_missed"),
    "find_lists_unsettled": (
        _REGISTER,
        "test_find_lists_unsettled_write_that_is_not_durable_yet_is_told_and_lost",
    ),
    "abort_before_touching_intent": (
        _REGISTER,
        "test_abort_before_touching_intent_transaction_is_applied_by_half",
    ),
    "prepare_at_both": (_FENCE, "test_prepare_at_both_value_of_one_of_two_comes_to_light_after_a_third_has_come"),
    "serving_only": (_DOMAIN, "test_serving_only_sealed_replica_answers_a_read_and_a_find"),
    "epoch_checked": (_DOMAIN, "test_epoch_checked_proposer_with_a_stale_roster_is_enough_for_itself"),
    "op_in_ballot": (_REGISTER, "test_op_in_ballot_two_operations_of_one_start_share_a_ballot"),
    "rollback_recorded": (
        _REGISTER,
        "test_rollback_recorded_prepare_that_comes_after_the_abort_leaves_an_intent",
    ),
    "collected_primary_asked": (
        _FLOORS,
        "test_collected_primary_asked_read_that_met_the_intent_before_tells_the_state_before",
    ),
    "floor_raised": (_FLOORS, "test_floor_raised_transaction_from_before_the_collection_is_applied_again"),
    "decision_kept": (_REGISTER, "test_decision_kept_committed_transaction_loses_a_group"),
    "seal": (_DOMAIN, "test_seal_late_accept_of_the_old_epoch_is_acknowledged_and_lost"),
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
    "incarnation_checked": (
        _DOMAIN,
        "test_incarnation_checked_wiped_replica_passes_for_the_one_it_was_and_a_write_is_lost",
    ),
    "ballot_promised_once": (
        "tests.dht.domain.test_decree",
        "test_ballot_promised_once_wiped_proposer_comes_to_a_ballot_of_the_one_it_was",
    ),
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
    "empty_bound": (_DROP, "test_empty_bound_order_to_empty_comes_when_the_name_has_a_new_database"),
    "listed_at_one_epoch": (
        _DROP,
        "test_listed_at_one_epoch_group_that_a_tablet_has_at_its_new_epoch_is_left_to_the_next_database",
    ),
    "drop_confirms_version": (
        _DROP,
        "test_drop_confirms_version_write_behind_the_last_listing_is_left_to_the_next_database",
    ),
    "drop_sees_promises": (
        _DROP,
        "test_drop_sees_promises_write_promised_before_the_last_listing_is_accepted_behind_it",
    ),
    "drop_looks_again": (
        _DROP,
        "test_drop_looks_again_groups_of_the_new_database_are_listed_by_the_dropper_of_the_old_one",
    ),
    "drop_accepts_anew": (
        _DROP,
        "test_drop_accepts_anew_write_that_only_a_replica_that_is_away_has_comes_to_light_in_the_next_database",
    ),
    "versions_carried": (_FENCE, "test_versions_carried_new_replica_tells_what_the_old_ones_told"),
    "promises_carried": (_FENCE, "test_promises_carried_group_that_was_only_promised_is_listed_by_a_new_replica"),
    "followed_served_only": (_FOLLOWER, "test_followed_served_only_sealed_replica_covers_nothing"),
    "followed_durable": (_FOLLOWER, "test_followed_durable_value_that_its_replica_forgets_is_not_told"),
    "promise_not_across_epochs": (
        _EPOCHS,
        "test_promise_not_across_epochs_write_acknowledged_in_the_new_one_is_overwritten",
    ),
    "inherited_marked": (_EPOCHS, "test_inherited_marked_read_tells_what_the_next_prepare_does_not_find"),
    "follow_inherited_marked": (
        _FOLLOWER,
        "test_follow_inherited_marked_value_that_most_were_handed_is_not_applied",
    ),
    "follow_chosen_only": (_FOLLOWER, "test_follow_chosen_only_value_of_a_minority_is_not_applied"),
    "cover_by_quorum": (_FOLLOWER, "test_cover_by_quorum_one_replica_that_missed_a_write_covers_nothing"),
    "cover_from_begin": (_FOLLOWER, "test_cover_from_begin_write_during_the_round_is_not_promised"),
    "open_is_older": (_FOLLOWER, "test_open_is_older_register_of_which_more_was_heard_is_not_promised"),
    "intents_stay_open": (_FOLLOWER, "test_intents_stay_open_transaction_that_may_be_decided_is_not_promised"),
    "overflow_surveyed": (_FOLLOWER, "test_overflow_surveyed_changes_that_were_forgotten_are_found_by_comparing"),
    "gone_is_erased": (
        _FOLLOWER,
        "test_gone_is_erased_group_that_was_deleted_and_collected_unseen_leaves_the_copy",
    ),
    "floor_of_all": (_FOLLOWER, "test_floor_of_all_group_made_since_a_replica_answered_is_not_told_above_its_ballot"),
    "generation_begins_again": (
        _FOLLOWER,
        "test_generation_begins_again_write_that_the_recovery_lost_leaves_the_copy",
    ),
}
"""rule: (module, tests of a hand-made schedule: with the rule and without)."""
