"""Commands that ask the daemon how things are: status, node, domain, data."""

from __future__ import annotations

import re
import time
from pathlib import Path

import click

from dht.errors import DhtError, Invalid, Unavailable
from dht.model import GLOBAL, SPANNING, GroupKey, Value
from dht.rows import group_key
from lucd import messages
from lucd.cli.connection import Seconds, ask, client, socket_option, store
from lucd.cli.output import format_option, show_fields, show_json, show_table
from lucd.messages import NodeLine

_NUMBER = re.compile("-?[0-9]+")
_NUMBER_CHARS_MAX = 40
_NODE_HEAD = ("NODE", "POP", "FAILURE DOMAIN", "ADDRESS", "ROLE", "REACHABLE")


def _node_row(node: NodeLine) -> tuple[str, ...]:
    mark = "*" if node.this else ""
    return (
        node.node_id + mark,
        node.pop,
        node.failure_domain,
        node.address,
        node.role,
        "yes" if node.reachable else "no",
    )


def node_id_of(text: str) -> str:
    """A node's id as the daemon writes it, out of what a human copied: also with the mark of `lucd node list`."""
    try:
        return bytes.fromhex(text.strip().removesuffix("*")).hex()
    except ValueError:
        raise Invalid(f"{text!r} is no node id; `lucd node list` shows them") from None


def _to_copy(node: NodeLine) -> str:
    parts = [f"{node.to_take_over} tablets"] if node.to_take_over else []
    if node.to_copy:
        parts.append(f"{node.to_copy} groups ({node.to_copy_bytes / 2**20:.1f} MiB)")
    return ", ".join(parts) or "nothing"


def _losses(survivable: tuple[str, ...]) -> str:
    """What may be lost without anything stopping."""
    words = [{"pop": "PoP"}.get(loss, loss.replace("_", " ")) for loss in survivable]
    return f"the loss of any one {' or '.join(words)}" if words else "no loss"


def _shared(figures: messages.DomainFigures) -> str:
    """The domain over all PoPs, in one line."""
    if not figures.joined:
        return f"{figures.members} members, this node is none of them"
    tablets = ", ".join(f"{number} {name}" for name, number in figures.tablets.items())
    return f"{figures.members} members, {figures.reachable} reachable; tablets: {tablets}"


@click.command()
@socket_option
@format_option
def status(config: Path | None, socket: Path | None, form: str) -> None:
    """How this node is."""
    reply = ask(config, socket, messages.AskStatus(), messages.StatusReply)
    if form == "json":
        show_json(messages.plain(reply))
        return
    show_fields(
        [
            ("state", reply.state),
            ("node", reply.node_id),
            ("pop", reply.pop),
            ("address", reply.address),
            ("cluster", reply.cluster_id),
            ("members", f"{reply.members}, {reply.reachable} reachable"),
            ("roster", f"epoch {reply.roster_epoch}, generation {reply.generation}"),
            ("tablets", ", ".join(f"{number} {name}" for name, number in reply.tablets.items())),
            ("survives", _losses(reply.survivable)),
            *((("copying", f"{reply.to_copy} groups still to come"),) if reply.to_copy else ()),
            (GLOBAL, _shared(reply.global_domain)),
            ("up", f"{reply.uptime_s:.0f} s, start number {reply.boot}"),
            ("version", reply.version),
            *(("warning", text) for text in reply.warnings),
        ]
    )


@click.group()
def node() -> None:
    """The nodes of the cluster."""


@node.command("list")
@socket_option
@format_option
def node_list(config: Path | None, socket: Path | None, form: str) -> None:
    """The nodes that this one knows; * marks itself."""
    reply = ask(config, socket, messages.AskNodes(), messages.NodesReply)
    if form == "json":
        show_json([messages.plain(line) for line in reply.nodes])
    else:
        show_table(_NODE_HEAD, [_node_row(line) for line in reply.nodes])


@node.command("drain", short_help="Move the tablets away from a node, so that it can leave.")
@click.argument("node_id")
@click.option(
    "--timeout", default=600.0, show_default=True, type=Seconds(), help="Seconds to wait for its tablets to move."
)
@socket_option
def node_drain(node_id: str, timeout: float, config: Path | None, socket: Path | None) -> None:
    """Move the tablets away from NODE_ID (of this PoP); returns when its PoP and global have let it go."""
    node_id = node_id_of(node_id)
    with client(config, socket, timeout) as daemon:
        daemon.call(messages.DrainNode(node_id))
        deadline_s = time.monotonic() + timeout
        for name in ("", GLOBAL):
            show = f"lucd domain show {name}".strip()
            while _lists(daemon.call(messages.AskDomain(name), repeatable=True), node_id):
                if time.monotonic() > deadline_s:
                    raise Unavailable(
                        f"node {node_id} is being drained, but is not out after {timeout:.0f} s: it leaves by itself "
                        f"when the others have copied its tablets; `{show}` tells what remains"
                    )
                time.sleep(0.2)
    click.echo(f"Node {node_id} left the roster; stop it.")


def _lists(reply: object, node_id: str) -> bool:
    return isinstance(reply, messages.DomainReply) and any(m.node_id == node_id for m in reply.members)


@node.command("remove", short_help="Take a node that is lost for good out of the roster.")
@click.argument("node_id")
@socket_option
def node_remove(node_id: str, config: Path | None, socket: Path | None) -> None:
    """Take NODE_ID (of this PoP), which is lost for good, out of the roster now, not after `remove_after_s`.

    Refused while it answers: drain it then. If it comes back it has to join with an empty data directory. Of a PoP that
    is lost as a whole the members of domain global are taken out of that.
    """
    node_id = node_id_of(node_id)
    with client(config, socket, 60.0) as daemon:
        daemon.call(messages.DrainNode(node_id, lost=True))
    click.echo(
        f"Node {node_id} leaves the roster as soon as others have its tablets; `lucd domain show` lists it till then."
    )


@click.group()
def domain() -> None:
    """The domains: which nodes keep which groups."""


@domain.command("show", short_help="How a domain is: members, tablets, what may be lost.")
@click.argument("name", default="")
@socket_option
@format_option
def domain_show(name: str, config: Path | None, socket: Path | None, form: str) -> None:
    """The domain NAME (default: this node's PoP; else global), its members and tablets."""
    reply = ask(config, socket, messages.AskDomain(name), messages.DomainReply)
    if form == "json":
        show_json(messages.plain(reply))
        return
    show_fields(
        [
            ("domain", reply.name),
            ("generation", reply.generation),
            ("epoch", reply.epoch),
            ("state", reply.state),
            ("tablets", ", ".join(f"{number} {name}" for name, number in reply.state_of_tablets.items())),
            ("survives", _losses(reply.survivable)),
            *((("comparing", f"{reply.unchecked} tablets here with their other replicas"),) if reply.unchecked else ()),
        ]
    )
    click.echo()
    show_table((*_NODE_HEAD, "TO COPY"), [(*_node_row(line), _to_copy(line)) for line in reply.members])
    click.echo()
    short = {line.node_id: line.node_id[8:16] for line in reply.members}
    show_table(
        ("TABLET", "EPOCH", "REPLICAS", "SERVED HERE"),
        [
            (t.tablet, t.epoch, " ".join(short.get(r, r[8:16]) for r in t.replicas), "yes" if t.serving else "no")
            for t in reply.tablets
        ],
    )
    show_recoveries(reply.recoveries)


def show_recoveries(recoveries: tuple[messages.RecoveryLine, ...]) -> None:
    for line in recoveries:
        when = f" at {line.when}" if line.when else ""
        click.echo(f"\ngeneration {line.generation} began{when} at link {line.epoch} without a majority")
        click.echo(f"  survivors: {' '.join(line.survivors)}")
        click.echo(f"  lost: {' '.join(line.lost)}")
        if line.empty_tablets:
            click.echo(f"  tablets that began empty: {' '.join(map(str, line.empty_tablets))}")
        for text in line.findings:
            click.echo(f"  {text}")


@domain.command("recover", short_help="A majority is lost for good: go on with the survivors.")
@click.argument("name", default="")
@click.option("--accept-data-loss", is_flag=True, help="Really do it: what only the lost members had is gone.")
@click.option(
    "--survivor", "survivors", multiple=True, metavar="NODE_ID", help="Who survived (default: all that answer)."
)
@click.option(
    "--timeout",
    default=120.0,
    show_default=True,
    type=Seconds(),
    help="Seconds to wait until the tablets are served again.",
)
@socket_option
def domain_recover(
    name: str,
    survivors: tuple[str, ...],
    accept_data_loss: bool,
    timeout: float,
    config: Path | None,
    socket: Path | None,
) -> None:
    """A majority of the domain NAME (default: this PoP's; else global) is lost for good: go on with the survivors.

    Run it on one survivor, once. Members that were not named stop when they meet the others, and have to be wiped.
    """
    with client(config, socket, 2 * timeout + 30) as daemon:
        named = tuple(node_id_of(text) for text in survivors)
        reply = daemon.call(messages.RecoverDomain(named, accept_data_loss, timeout, name))
    if isinstance(reply, messages.RecoverReply):
        show_recoveries((reply.recovery,))
    fit_unique_entries(name, config, socket)


def fit_unique_entries(domain: str, config: Path | None, socket: Path | None) -> None:
    """Unique entries and sequences follow the rows that survived; indexes are built from rows anyway.

    Of a database over several PoPs the domain has some of them, whichever it is.
    """
    from nova_bridge.sql.database import Database  # pulls in the SQL door, which other commands do without
    from nova_bridge.sql.repair import check

    recovered = domain or ask(config, socket, messages.AskStatus(), messages.StatusReply).pop
    with store(config, socket, 120.0) as opened:
        try:
            names = [name for name, home in opened.homes().items() if home == recovered or home in SPANNING]
        except DhtError as error:
            names = []
            click.echo(f"  databases: {error.message}: run `lucd database check NAME --repair` for each of {recovered}")
        for name in names:
            try:
                found = list(check(Database(opened, name, 120.0), repair=True))
            except DhtError as error:
                found = [f"{error.message}: run `lucd database check {name} --repair`"]
            for text in found:
                click.echo(f"  database {name}: {text}")


@click.group()
def data() -> None:
    """The data and where it lives."""


def parse_key(text: str) -> GroupKey:
    """The group's key in DATABASE/FAMILY/VALUE[/VALUE...]; digits are numbers unless they stand in quotes."""
    database, _, rest = text.partition("/")
    family, *values = rest.split("/")
    if not database or not family:
        raise Invalid(f"{text!r} is not a key; write DATABASE/FAMILY/VALUE, for example nova_cell1/instance/UUID")
    return group_key(database, family, tuple(_value(v) for v in values))


def _value(text: str) -> Value:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if not _NUMBER.fullmatch(text):
        return text
    if len(text) > _NUMBER_CHARS_MAX:
        raise Invalid(
            f"{text[:_NUMBER_CHARS_MAX]}... does not fit 64 bits; put text that looks like a number in quotes"
        )
    return int(text)


@data.command("where", short_help="Where a group lives, and who keeps it.")
@click.argument("key")
@socket_option
@format_option
def data_where(key: str, config: Path | None, socket: Path | None, form: str) -> None:
    """Where the group DATABASE/FAMILY/VALUE lives, for example nova_cell1/instance/UUID."""
    reply = ask(config, socket, messages.AskWhere(parse_key(key)), messages.WhereReply)
    if form == "json":
        show_json(messages.plain(reply))
        return
    show_fields(
        [
            ("home of the database", reply.home),
            ("domain", reply.domain),
            *([("hint", reply.hint)] if reply.hint else []),
            ("tablet", f"{reply.tablet} (epoch {reply.epoch})"),
            ("coordinator", reply.coordinator),
            ("group", f"{reply.rows} rows at {reply.ballot}" if reply.exists else "does not exist"),
        ]
    )
    click.echo()
    show_table(_NODE_HEAD, [_node_row(line) for line in reply.replicas])
