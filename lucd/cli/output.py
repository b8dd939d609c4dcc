"""What commands print: tables for people, JSON for scripts, one line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from dht.errors import DhtError

F = TypeVar("F", bound=Callable[..., Any])


def format_option(command: F) -> F:
    """The option -f that every showing command has."""
    decorate: Callable[[F], F] = click.option(
        "-f", "--format", "form", type=click.Choice(["table", "json"]), default="table", help="How to print it."
    )
    return decorate(command)


def show_json(value: object) -> None:
    """Print the value as JSON."""
    click.echo(json.dumps(value, indent=2))


def show_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns as wide as they need to be."""
    lines = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(title), *(len(line[i]) for line in lines)]) for i, title in enumerate(head)]
    for line in [list(head), *lines]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def show_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print names and values below each other."""
    pairs = [(name, str(value)) for name, value in fields]
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name.ljust(width)}  {value}".rstrip())


def fail(error: DhtError) -> int:
    """Print the error as one line on stderr; returns its exit code."""
    click.echo(f"lucd: {' '.join(error.message.split())}", err=True)
    sys.stderr.flush()
    return error.exit_code
