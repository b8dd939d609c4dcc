"""The table of planted bugs: what each switch breaks, and what it took to notice."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Final

from dht.sim.explore import EXPLORED
from dht.sim.planted import CAUGHT, CAUGHT_TOO, DIRECTED, RULES, Hunt

BUGS: Final = {
    "promise_durable": "a promise is told before it is on the disk",
    "accept_durable": "an accepted value is told before it is on the disk",
    "refuse_lower_ballot": "an acceptor takes a ballot below its promise",
    "delta_base_checked": "a delta is applied on another base",
    "boot_in_ballot": "the boot counter does not grow: ballots of two starts are the same",
    "one_accept_in_flight": "two accepts of a group in flight",
    "chosen_before_answer": "a write is answered before its quorum",
    "drop_after_failed_accept": "a coordinator writes on after an accept without quorum",
    "promise_not_across_epochs": "a one-round-trip promise is carried into the next tablet epoch",
    "confirm_refusal": "an overtaken coordinator refuses out of its cache",
    "prepare_at_both": "of two replicas one is enough for a promise",
    "window": "no window: a retry is applied twice",
    "window_floor": "a retry after its id left the window is applied",
    "applied_floor": "a retry that its group has forgotten is told that it was not applied",
    "seen_was_chosen": "a write says that it saw what its gateway's acceptor holds, chosen or not",
    "end_is_not_first": "a transaction that was applied and forgotten is ended as if it had not been sent before",
    "seen_kept": "what a coordinator tries again after an accept of its own no longer names what it saw",
    "refusal_recorded_at_retry": "a refused retry leaves no record, the first attempt applies later",
    "read_same_ballot": "a read's majority need not agree on one ballot",
    "read_writes_back": "a read takes the highest ballot without writing it back",
    "find_lists_unsettled": "find trusts a group that is not settled (an unlisted group)",
    "find_intents": "find ignores intents",
    "find_majority": "find answers without a majority of each tablet",
    "reads_resolve_intents": "a read does not ask the primary of an intent",
    "abort_before_touching_intent": "a resolver touches an intent before it wrote the abort",
    "decision_kept": "a decision record is dropped early",
    "prepare_before_commit": "the primary commits before all groups have prepared",
    "version_with_promise": "a value made under an older catalog is proposed on a newer promise",
    "fence_settles_groups": "a fence does not settle what a minority accepted",
    "fence_ends_intents": "a fence leaves intents of the older catalog",
    "empty_bound": "a late order to empty a group takes what a new database of the name wrote there",
    "listed_at_one_epoch": "the groups of a database that is dropped are listed by replicas of two tablet epochs",
    "drop_confirms_version": "a drop's last listing leaves its replicas to take writes of the dropped database",
    "drop_sees_promises": "a drop takes for empty what was promised a write since it was emptied",
    "drop_looks_again": "a dropper empties what it listed, whoever has the name by now",
    "drop_accepts_anew": "a drop leaves groups alone of which it sees nothing but a promise, or a tombstone",
    "read_majority": "a read from one replica",
    "read_exact_data": "a read returns data of another ballot than the quorum's",
    "serving_only": "a sealed or uninitialised replica answers reads and counts in a find",
    "find_indexed": "find counts a half-indexed replica",
    "op_in_ballot": "the next ballot is not unique per operation",
    "collected_primary_asked": "a collected primary is taken for one that has not decided",
    "rollback_recorded": "a late prepare after an abort leaves an intent",
    "seal": "no seal",
    "seal_on_accept": "a seal stops prepares but not accepts",
    "seal_before_init": "the old replicas are read before they are sealed",
    "serve_only_initialised": "a member votes before it is initialised",
    "only_initialised_contribute": "uninitialised replicas contribute (the empty majority)",
    "highest_ballot_wins": "any value is merged instead of the highest ballot",
    "init_durable": "the initialised flag is not durable",
    "refuse_stale_init": "a late initialisation of an older epoch",
    "replace_content": "initialisation merges the replica's own leftovers: a deleted row is resurrected",
    "decided_by_previous_voters": "a link is decided by the voters of the last but one",
    "incarnation_checked": "a wiped disk under the same id",
    "ballot_promised_once": "a voter promises a ballot again to a node that was wiped since",
    "gate_on_majority": "the next change does not wait for the last",
    "floor_carried": "a deletion's floor is not carried to new replicas",
    "collect_needs_all": "a tombstone is collected after a majority: late rows are resurrected",
    "floor_keeps_promise": "the floor forgets the promise: a late create passes",
    "versions_carried": "new replicas do not know the catalog versions that the old ones told",
    "promises_carried": "new replicas do not list groups that were only promised",
    "floor_raised": "deletion without floor",
    "followed_served_only": "a sealed replica tells followers that it serves the tablet",
    "followed_durable": "a replica tells followers what it may forget",
    "inherited_marked": "a majority that was handed a ballot of an earlier epoch proves it chosen",
    "follow_inherited_marked": "the same, to a follower",
    "follow_chosen_only": "a follower applies a value that is not chosen",
    "cover_by_quorum": "a follower's tablet counts as covered by one replica",
    "cover_from_begin": "a follower's tablet counts as covered up to the end of the round",
    "open_is_older": "a follower serves a register of which it heard more than it has",
    "intents_stay_open": "a follower serves a group that holds an intent",
    "overflow_surveyed": "a follower takes a count that forgot changes for complete",
    "gone_is_erased": "what was collected unseen stays in a follower's copy",
    "floor_of_all": "what a follower does not have is told at a floor that one replica agreed on",
    "generation_begins_again": "a follower keeps what a recovery of its domain lost",
    "epoch_checked": "a stale roster's frame is accepted",
    "boots_checked": "a copied or rolled-back data directory is accepted",
    "sequence_jumps": "ids are taken after a recovery from where the survivors' sequence stands",
    "flush_awaited": "the disk lies: durable before the flush",
}


def table(hunts: Iterable[Hunt]) -> str:
    """Markdown, in the order of the rules."""
    by_rule = {found.rule: found for found in hunts}
    lines = [
        "| planted bug | switch | caught by | seeds to catch: first, median, most | stated in the tests |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rule in RULES:
        ways, seeds, stated = [], "", ""
        if random := (CAUGHT | CAUGHT_TOO).get(rule):
            name, within = random
            ways.append(f"random runs of `{name}`")
            stated = f"within {within}"
            found = by_rule.get(rule)
            if found is not None and found.caught:
                gaps = found.gaps
                seeds = f"{gaps[0]}, {statistics.median(gaps):g}, {max(gaps)} ({len(gaps)} catches)"
                seeds += "" if found.scenario == name else f" of `{found.scenario}`"
            elif found is not None:
                seeds = f"none in {found.tried}"
        if rule in DIRECTED:
            module, *names = DIRECTED[rule]
            ways.append(f"a schedule: {module.rpartition('.')[2]}, `{names[-1]}`")
        if rule in EXPLORED:
            ways.append(f"the explorer: `{EXPLORED[rule]}`")
        lines.append(f"| {BUGS[rule]} | `{rule}` | {'; '.join(ways)} | {seeds} | {stated} |")
    return "\n".join(lines)


def page(text: str, first: int, seeds: int, catches: int) -> str:
    """The document around the table."""
    return f"""# Planted bugs

Each rule of the protocol has a switch that breaks it. This table was made by

    python -m dht.sim planted --first {first} --seeds {seeds} --catches {catches}

which, with the rule off, runs seed after seed until so many have shown a violation. `tests/sim/test_planted_bugs.py`
holds that each is caught within the stated number of seeds, or has a hand-made schedule that shows it. Why a rule is
there is in [protocol](../protocol.md).

{text}
"""
