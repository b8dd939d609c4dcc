"""The rules of the registers as switches. All on; the simulator turns single ones off.

A rule whose breaking no test notices is not tested: each switch is a planted bug.
"""

from __future__ import annotations

from dht.model import Struct


class Rules(Struct, frozen=True):
    """True: the rule holds.

    promise_durable: a promise is on the disk before it is told. accept_durable: so is an accepted value.
    refuse_lower_ballot: an acceptor keeps its promise. delta_base_checked: a delta goes on its base only, and gives the
    digest that it names. boot_in_ballot: ballots of two starts of a node differ.
    one_accept_in_flight: the next accept waits for the last. chosen_before_answer: a write is answered at its quorum.
    drop_after_failed_accept: after an accept without quorum the state is fetched anew by a prepare.
    promise_not_across_epochs: a cached promise ends with its tablet epoch. confirm_refusal: a refusal out of cached
    state is confirmed by a quorum.
    prepare_at_both: of two replicas, both promise what is proposed.
    window, window_floor, applied_floor, refusal_recorded_at_retry: once only (dht.register.group). seen_was_chosen: the
    ballot that a write says it saw is one that a majority agreed on.
    inherited_marked: a majority proves a ballot chosen only in the tablet epoch of the ballot; what new replicas were
    handed takes a mark, or all of them (dht.domain.roster.proven).
    read_same_ballot: a read's majority agrees on one ballot. read_writes_back: what no majority has yet is finished
    before it is read. find_lists_unsettled, find_intents: a find reads by itself what may not be decided.
    find_majority: a find waits for a majority of each tablet. reads_resolve_intents: a read asks the primary.
    read_majority: a read waits for a majority at all. read_exact_data: its rows are of the ballot that it agreed on.
    serving_only: a replica that is sealed or not initialised answers no read and counts in no find. find_indexed: a
    replica's indexes hold the rows that were there before it learned of them.
    op_in_ballot: ballots of two operations of one start differ. rollback_recorded: a rollback leaves its mark where no
    intent was, too.
    abort_before_touching_intent: a resolver ends the transaction at its primary first. decision_kept: the decision
    record stays until every group has acknowledged. prepare_before_commit: the primary commits after all prepared.
    collected_primary_asked: a primary that was collected with what it knew is not taken for one that has not decided.
    version_with_promise: nothing is proposed that was made under an older catalog than its promises named.
    fence_settles_groups, fence_ends_intents: what was begun under an older catalog is chosen or dead behind a fence.
    empty_bound: of a database that is dropped nothing goes that was written after its groups were listed.
    listed_at_one_epoch: replicas that list a tablet's groups serve it at one epoch.
    drop_confirms_version: who answers a drop's last listing refuses from then on what was made under its old catalog.
    drop_sees_promises: a group that was promised something since it was emptied is emptied again.
    drop_looks_again: after the listing the dropper sees that the database is still the one that it means.
    drop_accepts_anew: an order to empty a group leads to an accept, and so does one of what was only promised.
    end_is_not_first: who ends a transaction that saw no ballot does not count as the first who sends it.
    seen_kept: who tries again what a coordinator had in an accept names the ballot at which it saw the group there.
    sequence_jumps: the first ids that are taken of a sequence in a generation lie beyond a jump.
    """

    promise_durable: bool = True
    accept_durable: bool = True
    refuse_lower_ballot: bool = True
    delta_base_checked: bool = True
    boot_in_ballot: bool = True
    one_accept_in_flight: bool = True
    chosen_before_answer: bool = True
    drop_after_failed_accept: bool = True
    promise_not_across_epochs: bool = True
    confirm_refusal: bool = True
    prepare_at_both: bool = True
    window: bool = True
    window_floor: bool = True
    applied_floor: bool = True
    refusal_recorded_at_retry: bool = True
    seen_was_chosen: bool = True
    inherited_marked: bool = True
    read_same_ballot: bool = True
    read_writes_back: bool = True
    find_lists_unsettled: bool = True
    find_intents: bool = True
    find_majority: bool = True
    reads_resolve_intents: bool = True
    abort_before_touching_intent: bool = True
    decision_kept: bool = True
    prepare_before_commit: bool = True
    read_majority: bool = True
    read_exact_data: bool = True
    serving_only: bool = True
    find_indexed: bool = True
    op_in_ballot: bool = True
    rollback_recorded: bool = True
    collected_primary_asked: bool = True
    version_with_promise: bool = True
    fence_settles_groups: bool = True
    fence_ends_intents: bool = True
    empty_bound: bool = True
    listed_at_one_epoch: bool = True
    drop_confirms_version: bool = True
    drop_sees_promises: bool = True
    drop_looks_again: bool = True
    drop_accepts_anew: bool = True
    end_is_not_first: bool = True
    seen_kept: bool = True
    sequence_jumps: bool = True


RULES = Rules()
