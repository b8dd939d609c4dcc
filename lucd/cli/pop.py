"""Commands on PoPs: list, show, recover."""

from __future__ import annotations

from pathlib import Path

import click

from dht.errors import NotFound
from lucd import messages
from lucd.cli.connection import Seconds, ask, client, socket_option
from lucd.cli.output import format_option, show_fields, show_json, show_table
from lucd.cli.show import fit_unique_entries, show_recoveries


@click.group()
def pop() -> None:
    """The PoPs, and the copies that they keep of each other."""


def _age(line: messages.CopyLine) -> str:
    return "never complete" if line.age_s < 0 else f"{line.age_s:.1f} s old"


def _best(lines: tuple[messages.CopyLine, ...], *, where: bool) -> str:
    """The newest copy of each PoP that keeps some."""
    best: dict[str, messages.CopyLine] = {}
    for line in sorted(lines, key=lambda line: line.age_s if line.age_s >= 0 else float("inf")):
        best.setdefault(line.pop, line)
    return ", ".join(f"{pop}: {_age(line)}" if where else _age(line) for pop, line in sorted(best.items())) or "none"


@pop.command("list", short_help="All PoPs, and who keeps which copy of them.")
@socket_option
@format_option
def pop_list(config: Path | None, socket: Path | None, form: str) -> None:
    """All PoPs, who keeps a backup of each, and how old its own copy of domain global is."""
    reply = ask(config, socket, messages.AskPops(), messages.PopsReply)
    if form == "json":
        show_json(messages.plain(reply))
        return
    rows = [
        (
            line.name,
            line.index,
            f"{len(line.members)}, {sum(m.reachable for m in line.members)} reachable",
            _best(line.backups, where=True),
            _best(line.global_copies, where=False),
        )
        for line in reply.pops
    ]
    show_table(("POP", "INDEX", "MEMBERS OF GLOBAL", "BACKUP", "COPY OF GLOBAL"), rows)
    _show_silent(reply.silent)


def _show_silent(silent: tuple[str, ...]) -> None:
    if silent:
        click.echo(f"\nwhat these keep is not known, for they do not answer: {' '.join(silent)}")


@pop.command("show", short_help="One PoP: index, members of global, copies.")
@click.argument("name")
@socket_option
@format_option
def pop_show(name: str, config: Path | None, socket: Path | None, form: str) -> None:
    """The PoP NAME: its index, its members of domain global, the copies of its data."""
    reply = ask(config, socket, messages.AskPops(), messages.PopsReply)
    line = next((line for line in reply.pops if line.name == name), None)
    if line is None:
        raise NotFound(f"there is no PoP {name}; `lucd pop list` shows all")
    if form == "json":
        show_json(messages.plain(line))
        return
    show_fields([("pop", line.name), ("index", line.index), ("founder", line.founder)])
    click.echo()
    show_table(
        ("MEMBER OF GLOBAL", "ADDRESS", "REACHABLE"),
        [(m.node_id, m.address, "yes" if m.reachable else "no") for m in line.members],
    )
    click.echo()
    copies = [(c.domain, c.pop, c.node_id, _age(c), c.open, c.generation) for c in (*line.backups, *line.global_copies)]
    show_table(("COPY OF", "IN POP", "ON NODE", "COVERED", "OPEN GROUPS", "GENERATION"), copies)
    _show_silent(reply.silent)


@pop.command("recover", short_help="All disks of a PoP are gone: begin it anew.")
@click.argument("name")
@click.option("--accept-data-loss", is_flag=True, help="Really do it: what the copies do not cover is gone.")
@click.option(
    "--timeout", default=300.0, show_default=True, type=Seconds(), help="Seconds for the copies to come and be served."
)
@socket_option
def pop_recover(name: str, accept_data_loss: bool, timeout: float, config: Path | None, socket: Path | None) -> None:
    """All disks of the PoP NAME are gone: begin it anew with the copies that other PoPs keep.

    Run it on one new node of that PoP, with an empty data directory. It prints the last moment that is covered. Nodes
    of the PoP that were only cut off stop when they come back, and keep their files; others join as new ones.
    """
    with client(config, socket, 2 * timeout + 30) as daemon:
        reply = daemon.call(messages.RecoverPop(name, accept_data_loss, timeout))
    if isinstance(reply, messages.RecoverReply):
        show_recoveries((reply.recovery,))
    fit_unique_entries(name, config, socket)
