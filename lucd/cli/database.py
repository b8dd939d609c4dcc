"""Commands on databases: create, list, drop."""

from __future__ import annotations

from pathlib import Path

import click

from dht import requests
from dht.errors import Conflict, Indeterminate, Invalid, NotFound, RemoteProtocolError
from dht.model import SPANNING
from lucd.cli.connection import client, socket_option, store
from lucd.cli.output import format_option, show_json, show_table

_POP = "pop:"


@click.group()
def database() -> None:
    """The databases in the store."""


def _shown(home: str) -> str:
    return home if home in SPANNING else f"{_POP}{home}"


def _names_pop(home: str) -> bool:
    return home.startswith(_POP) and home.removeprefix(_POP) not in ("", *SPANNING)


def _order(
    config: Path | None,
    socket: Path | None,
    order: requests.CreateDatabase | requests.DropDatabase,
    timeout_s: float = 10.0,
) -> bool:
    """Whether the order changed anything. It is sent once: the answer to a second one would be about that one alone.

    Raises Indeterminate where no answer came.
    """
    with client(config, socket, timeout_s) as daemon:
        try:
            reply = daemon.call(order)
        except Indeterminate as error:
            raise Indeterminate(
                f"{error.message}; nobody knows whether it was done: `lucd database list` tells whether there is a "
                f"database {order.name} now, and if need be give the command again"
            ) from None
    if not isinstance(reply, requests.Done):
        raise RemoteProtocolError(f"the daemon replied {type(reply).__name__} where Done was due")
    return reply.changed


@database.command("list", short_help="Their names, and where they live.")
@socket_option
@format_option
def database_list(config: Path | None, socket: Path | None, form: str) -> None:
    """Their names, and where they live; without those that are being dropped."""
    with store(config, socket) as opened:
        homes = opened.homes()
    if form == "json":
        show_json([{"name": name, "home": _shown(home)} for name, home in homes.items()])
    else:
        show_table(("DATABASE", "HOME"), [(name, _shown(home)) for name, home in homes.items()])


@database.command("create", short_help="Create a database.")
@click.argument("name")
@click.option(
    "--home", default="", metavar="pop:NAME|global|local", help="Where it lives (default: the PoP of this node)."
)
@socket_option
def database_create(name: str, home: str, config: Path | None, socket: Path | None) -> None:
    """Create the database NAME, which every node of every PoP serves.

    Its data lives in one PoP, whose nodes keep it among themselves; or (global) in the domain over all PoPs, where a
    read and a write wait for the way between PoPs, and any PoP may be lost; or (local) each row in the PoP that made
    it. Families that families.yaml gives a home of their own live there, in a database that is global or local.

    Where a database of that name is being dropped, that is finished first.
    """
    if home and home not in SPANNING and not _names_pop(home):
        raise Invalid(
            f"{home!r} is not a home; write --home {_POP}NAME with the name of a PoP, --home global or --home local"
        )
    if not _order(config, socket, requests.CreateDatabase(name, home.removeprefix(_POP))):
        raise Conflict(f"database {name} already exists; nothing was changed")
    where = f" with home {home}" if home in SPANNING else f" in PoP {home.removeprefix(_POP)}" if home else ""
    click.echo(f"Created database {name}{where}.")


@database.command("drop")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Really delete it with everything in it.")
@socket_option
def database_drop(name: str, yes: bool, config: Path | None, socket: Path | None) -> None:
    """Delete the database NAME with everything in it.

    From its first moment on nobody is served from it. If it ends with an error, give it again, on any node: it goes on.
    """
    if not yes:
        raise Invalid(f"database {name} was not dropped: everything in it would be lost; add --yes if that is meant")
    if not _order(config, socket, requests.DropDatabase(name), timeout_s=120.0):
        raise NotFound(f"there is no database {name}; `lucd database list` names them")
    click.echo(f"Dropped database {name}.")


@database.command("check", short_help="Compare unique entries and sequences with the rows.")
@click.argument("name")
@click.option("--repair", is_flag=True, help="Mend what is found, too.")
@socket_option
def database_check(name: str, repair: bool, config: Path | None, socket: Path | None) -> None:
    """Compare the unique entries and sequences of the database NAME with its rows: after `lucd domain recover`."""
    from nova_bridge.sql.database import Database  # pulls in the SQL door, which other commands do without
    from nova_bridge.sql.repair import check

    found = 0
    with store(config, socket, timeout_s=120.0) as opened:
        if name not in opened.list_databases():
            raise NotFound(f"there is no database {name}; `lucd database list` names them")
        for text in check(Database(opened, name, 120.0), repair=repair):
            found += 1
            click.echo(text)
    click.echo(f"{found} found{' and mended, but where it says otherwise' if found and repair else ''}.")
