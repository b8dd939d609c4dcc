"""The switches of the reconfiguration rules (DESIGN section 5). All on; the simulator turns single ones off.

A rule whose breaking no test notices is not tested: each switch is a planted bug.
"""

from __future__ import annotations

from dht.model import Struct


class DomainRules(Struct, frozen=True):
    """True: the rule holds.

    seal: a seal is recorded at all. seal_on_accept: it stops accepts too, not only prepares. seal_before_init: the old
    replicas are sealed before they are read. serve_only_initialised: a member votes only when initialised.
    only_initialised_contribute: rule 2. highest_ballot_wins: rule 2, per register. init_durable: the initialised epoch
    survives a restart. refuse_stale_init: rule 3, an epoch below a sealed or initialised one is never initialised, nor
    one twice. replace_content: rule 3, what the replica held before is not merged. decided_by_previous_voters: the
    voters of link e decide link e+1. incarnation_checked: a wiped node does not pass for the one it was.
    ballot_promised_once: a voter promises a ballot for a link to one proposer.
    gate_on_majority: rule 5, the wait for the last change. floor_carried: rule 7, a new replica takes the floor over.
    collect_needs_all: rule 7, a tombstone goes only when every replica has it. floor_keeps_promise: rule 7, the floor
    is above what was promised for the collected register, not only above its tombstone. floor_raised: rule 7, there is
    a floor at all. epoch_checked: a frame of another tablet epoch is refused. versions_carried,
    promises_carried: what fences rely on goes over to new replicas (dht.register.fence). followed_served_only: a
    replica tells followers that it serves a tablet only where it does. followed_durable: what it tells is on its disk.
    """

    seal: bool = True
    seal_on_accept: bool = True
    seal_before_init: bool = True
    serve_only_initialised: bool = True
    only_initialised_contribute: bool = True
    highest_ballot_wins: bool = True
    init_durable: bool = True
    refuse_stale_init: bool = True
    replace_content: bool = True
    decided_by_previous_voters: bool = True
    incarnation_checked: bool = True
    ballot_promised_once: bool = True
    gate_on_majority: bool = True
    floor_carried: bool = True
    collect_needs_all: bool = True
    floor_keeps_promise: bool = True
    floor_raised: bool = True
    epoch_checked: bool = True
    versions_carried: bool = True
    promises_carried: bool = True
    followed_served_only: bool = True
    followed_durable: bool = True


RULES = DomainRules()


class FollowRules(Struct, frozen=True):
    """The rules of followers (`dht.domain.follower`), as `DomainRules`.

    follow_chosen_only: a follower applies nothing that may not be chosen. follow_inherited_marked: as
    `inherited_marked` of the registers. cover_by_quorum: a tablet is covered by an
    answer of a quorum of its replicas. cover_from_begin: up to the begin of the round. open_is_older: a register of
    which more was heard is covered as far as its tablet was then. intents_stay_open: so is one with an intent.
    overflow_surveyed: a node whose changes were forgotten, or that began to count anew, is compared with as a whole.
    gone_is_erased: what was collected at the replicas goes from the copy. floor_of_all: what is not in the copy is told
    at a floor that all who cover the tablet had agreed on. generation_begins_again: everything goes from the copy when
    the domain was recovered.
    """

    follow_chosen_only: bool = True
    follow_inherited_marked: bool = True
    cover_by_quorum: bool = True
    cover_from_begin: bool = True
    open_is_older: bool = True
    intents_stay_open: bool = True
    overflow_surveyed: bool = True
    gone_is_erased: bool = True
    floor_of_all: bool = True
    generation_begins_again: bool = True


FOLLOW_RULES = FollowRules()
