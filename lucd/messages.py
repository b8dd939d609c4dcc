"""What the command line and the admin address ask the daemon (numbers 200-249).

Ids travel as hex text: these messages are for humans and scripts, and turn into JSON as they are.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dht.codec import Message, message
from dht.model import GroupKey, Struct


@message
class AskStatus(Message, frozen=True, tag=200):
    """How is this node?"""


class DomainFigures(Struct, frozen=True):
    """Domain `global` as this node sees it; figures as in `StatusReply`. `joined`: whether it is a member there."""

    joined: bool = False
    members: int = 0
    reachable: int = 0
    roster_epoch: int = 0
    generation: int = 0
    tablets: dict[str, int] = {}
    to_copy: int = 0


@message
class StatusReply(Message, frozen=True, tag=201):
    """`warnings`: what a human should know or do, one sentence each; empty when all is well.

    `tablets`: how many are whole, degraded (a majority works) and unavailable. `survivable`: what may be lost, one at
    a time, while everything goes on: node, failure_domain; pop, of domain global. `counters`: part -> name -> number
    since the start (or now, for sizes). Times in seconds.
    """

    version: str
    node_id: str
    pop: str
    cluster_id: str
    incarnation: str
    boot: int
    address: str
    uptime_s: float
    ready: bool
    state: str
    members: int
    reachable: int
    roster_epoch: int
    generation: int
    tablets: dict[str, int]
    to_copy: int
    survivable: tuple[str, ...]
    warnings: tuple[str, ...]
    counters: dict[str, dict[str, int | float]]
    global_domain: DomainFigures = DomainFigures()


@message
class AskNodes(Message, frozen=True, tag=202):
    """Which nodes does this one know?"""


class NodeLine(Struct, frozen=True):
    """`role`: voter, member, or contact (known to the overlay only). `reachable`: as this node sees it.

    `to_copy`: groups that the member still has to copy, as it told last, of `to_copy_bytes`; `to_take_over`: its
    tablets that it does not serve yet.
    """

    node_id: str
    pop: str
    failure_domain: str
    address: str
    role: str
    reachable: bool
    this: bool
    to_copy: int = 0
    to_copy_bytes: int = 0
    to_take_over: int = 0


@message
class NodesReply(Message, frozen=True, tag=203):
    nodes: tuple[NodeLine, ...]


@message
class AskDomain(Message, frozen=True, tag=204):
    """The domain of that name; empty: this node's PoP."""

    name: str = ""


class TabletLine(Struct, frozen=True):
    """`epoch`: the roster epoch in which the replicas last changed. `replicas`: node ids, coordinator first."""

    tablet: int
    epoch: int
    replicas: tuple[str, ...]
    serving: bool


class RecoveryLine(Struct, frozen=True):
    """One time that a majority was lost for good. `findings`: what was done; known where the recovery was ordered.

    `when`: UTC, empty elsewhere. `empty_tablets`: those that began with nothing, as known there.
    """

    generation: int
    epoch: int
    survivors: tuple[str, ...]
    lost: tuple[str, ...]
    when: str = ""
    empty_tablets: tuple[int, ...] = ()
    findings: tuple[str, ...] = ()


@message
class DomainReply(Message, frozen=True, tag=205):
    """`survivable`, `state_of_tablets`: as in the status. `state`: healthy, degraded or unavailable.

    `unchecked`: tablets that this node has not compared with another replica since it started.
    """

    name: str
    generation: int
    epoch: int
    members: tuple[NodeLine, ...]
    tablets: tuple[TabletLine, ...]
    survivable: tuple[str, ...]
    recoveries: tuple[RecoveryLine, ...] = ()
    state: str = ""
    state_of_tablets: dict[str, int] = {}
    unchecked: int = 0


@message
class AskWhere(Message, frozen=True, tag=206):
    """Where does the group live? `key`: the group's key as bytes."""

    key: GroupKey


@message
class WhereReply(Message, frozen=True, tag=207):
    """`exists`: whether the group has rows now; `ballot`: at which ballot, as text.

    `home`: the database's. `hint`: of a group of a local family, the PoP that the overlay names for it, or "none".
    """

    domain: str
    tablet: int
    epoch: int
    coordinator: str
    replicas: tuple[NodeLine, ...]
    exists: bool
    rows: int
    ballot: str
    home: str = ""
    hint: str = ""


@message
class DrainNode(Message, frozen=True, tag=208):
    """Take the node of this PoP out of the roster. Replied to when that is begun.

    `lost`: it does not answer and never will again with this disk; else its tablets move away first.
    """

    node_id: str
    lost: bool = False


@message
class RecoverDomain(Message, frozen=True, tag=209):
    """Begin a new generation of a domain with the survivors (empty: all that answer), a majority being lost.

    Without `accept_data_loss` it is refused with what it would mean. `timeout_s`: for the tablets to be served again.
    """

    survivors: tuple[str, ...]
    accept_data_loss: bool
    timeout_s: float
    name: str = ""


@message
class RecoverReply(Message, frozen=True, tag=210):
    recovery: RecoveryLine


@message
class RecoverPop(Message, frozen=True, tag=220):
    """All disks of the PoP are gone: this new node of it begins its domain anew, with what other PoPs have copied.

    Without `accept_data_loss` it is refused with what it would mean. Answered with `RecoverReply`.
    """

    name: str
    accept_data_loss: bool
    timeout_s: float


@message
class AskPops(Message, frozen=True, tag=221):
    """Which PoPs are there, and who keeps copies of them?"""


class CopyLine(Struct, frozen=True):
    """One copy of a domain. `age_s`: how old its least covered tablet is, -1 while one was never covered.

    `open`: groups of which more was heard than the copy has; they may be older. `node_id`, `pop`: who keeps it.
    """

    domain: str
    age_s: float
    open: int
    generation: int
    node_id: str = ""
    pop: str = ""


class PopLine(Struct, frozen=True):
    """`members`: of domain `global`, from this PoP. `backups`: copies of its domain in other PoPs."""

    name: str
    index: int
    founder: str
    members: tuple[NodeLine, ...]
    backups: tuple[CopyLine, ...]
    global_copies: tuple[CopyLine, ...]


@message
class PopsReply(Message, frozen=True, tag=222):
    """By index. `silent`: members of `global` that were asked for their copies and did not answer."""

    pops: tuple[PopLine, ...]
    silent: tuple[str, ...]


@message
class AskCopies(Message, frozen=True, tag=223):
    """A node asks another one which copies that keeps."""


@message
class CopiesReply(Message, frozen=True, tag=224):
    copies: tuple[CopyLine, ...]


def plain(value: Struct) -> dict[str, Any]:
    """The message as JSON-ready names and values."""
    result: dict[str, Any] = {}
    for field in msgspec.structs.fields(value):
        result[field.name] = _plain(getattr(value, field.name))
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Struct):
        return plain(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return value
