"""Commands that make a node and its cluster: init, join, key, run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dht.errors import Invalid, StorageError
from lucd import directory
from lucd.cli.connection import config_option, settings
from lucd.conf.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


def _data_dir(command: F) -> F:
    decorate: Callable[[F], F] = click.option(
        "--data-dir", type=click.Path(path_type=Path), help="Use this directory, whatever is configured."
    )
    return decorate(command)


def _directory(config: Path | None, data_dir: Path | None) -> Path:
    return data_dir.absolute() if data_dir is not None else settings(config).data_dir


@click.command()
@config_option
@_data_dir
def init(config: Path | None, data_dir: Path | None) -> None:
    """Found a cluster: once, on its first node."""
    path = _directory(config, data_dir)
    cluster = directory.found(path)
    click.echo(f"Founded cluster {cluster.cluster_id} in {path}.")
    click.echo(f"Start this node:      lucd run{f' --config {config}' if config else ''}")
    click.echo(f"Add another node:     copy {path}/cluster.key there (keep it secret), then there:")
    click.echo(
        "                      lucd join --key-file cluster.key; lucd run  (with bootstrap = this node's address)"
    )


@click.command()
@config_option
@_data_dir
@click.option(
    "--key-file", required=True, help="File with the cluster's key (`lucd key show` on a member), or - for stdin."
)
def join(config: Path | None, data_dir: Path | None, key_file: str) -> None:
    """Make this host a node of an existing cluster."""
    path = _directory(config, data_dir)
    cluster = _cluster_key(key_file)
    directory.join(path, cluster)
    click.echo(f"Made the data directory {path} of a node of cluster {cluster.cluster_id}.")
    click.echo("Start it with `lucd run`; bootstrap in its configuration names nodes to join through.")


def _cluster_key(key_file: str) -> directory.ClusterKey:
    return directory.ClusterKey.parse(_read(key_file), key_file if key_file != "-" else "standard input")


def _read(key_file: str) -> str:
    if key_file == "-":
        return sys.stdin.read()
    file = Path(key_file)
    try:
        mode = file.stat().st_mode & 0o777
        if mode & 0o077:
            raise Invalid(
                f"{file} can be read by others (mode {mode:o}); run chmod 600 {file}, it holds the cluster's key"
            )
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{file} cannot be read ({error}); name the file with the cluster's key") from None


@click.group()
def key() -> None:
    """The cluster's key. Who has it is a member: keep it secret."""


@key.command("show")
@config_option
@_data_dir
def key_show(config: Path | None, data_dir: Path | None) -> None:
    """Print the key, for `lucd join --key-file -` on another host."""
    click.echo(directory.cluster_key(_directory(config, data_dir)).text())


@key.command("new", short_help="Print a new key for this cluster.")
@config_option
@_data_dir
def key_new(config: Path | None, data_dir: Path | None) -> None:
    """Print a new key for this cluster; nothing changes before `lucd key import` on every node."""
    click.echo(directory.cluster_key(_directory(config, data_dir)).renewed().text())


@key.command("import", short_help="Replace the key of this node, which must not run.")
@click.argument("key_file")
@config_option
@_data_dir
def key_import(key_file: str, config: Path | None, data_dir: Path | None) -> None:
    """Replace the key of this node, which must not run, by the one in KEY_FILE (- for stdin).

    Nodes with different keys refuse each other: stop all, import on each, start all.
    """
    path = _directory(config, data_dir)
    directory.replace_key(path, _cluster_key(key_file))
    click.echo(f"{path} has the new key. A node with the old one is refused from now on.")


@click.command()
@config_option
def run(config: Path | None) -> None:
    """Run the daemon in the foreground until SIGTERM."""
    chosen: Settings = settings(config)
    from lucd.process import run_daemon  # pulls in the whole daemon, which other commands do without

    run_daemon(chosen)
