"""The `lucd` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from dht.errors import DhtError, StorageError, Unavailable
from lucd import version
from lucd.cli import cluster, database, pop, show
from lucd.cli.output import fail


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def lucd() -> None:
    """Nova's database without a database server: a replicated, locality-aware store on every node."""


@lucd.command("version")
def show_version() -> None:
    """Print the version."""
    click.echo(f"lucd {version()}")


@lucd.group()
def config() -> None:
    """The configuration file."""


@config.command("sample")
def config_sample() -> None:
    """Print a configuration file with every option and its default."""
    from lucd.conf.sample import render

    click.echo(render(), nl=False)


@lucd.command(short_help="Show it on this machine: daemons, Nova, a kill or a cut.")
@click.option(
    "--keep", is_flag=True, help="Keep the daemons' directories and logs afterwards and print where they are."
)
@click.option("--instances", default=20, show_default=True, type=click.IntRange(2, 500), help="How many to create.")
@click.option(
    "--control-plane",
    is_flag=True,
    help="The whole of Nova and Placement, driven through the REST API, in place of one conductor.",
)
@click.option(
    "--computes",
    default=3,
    show_default=True,
    type=click.IntRange(2, 32),
    help="How many nova-compute with Nova's fake virt driver, for --control-plane.",
)
@click.option(
    "--pops",
    default=1,
    show_default=True,
    type=click.IntRange(1, 8),
    help="More than one: a conductor and a cell in each PoP, or a control plane; one PoP is cut off (as root).",
)
@click.option(
    "--latency-ms",
    default=50.0,
    show_default=True,
    type=click.FloatRange(0.0, 500.0),
    help="Round trip between the PoPs, for --pops.",
)
def demo(keep: bool, instances: int, control_plane: bool, computes: int, pops: int, latency_ms: float) -> None:
    """Show it: three daemons on this machine keep Nova's state while one of them is killed."""
    # These need the nova extra, which a daemon does without.
    if pops > 1 and control_plane:
        from lucd.demo.pops import planes

        sys.exit(planes.play(pops, latency_ms, instances=instances, keep=keep))
    if pops > 1:
        from lucd.demo.pops import story as pops_story

        sys.exit(pops_story.play(pops, latency_ms, instances=instances, keep=keep))
    if control_plane:
        from lucd.demo.plane import story as plane_story

        sys.exit(plane_story.play(instances=instances, computes=computes, keep=keep))
    from lucd.demo import story

    sys.exit(story.play(instances=instances, keep=keep))


for command in (
    cluster.init,
    cluster.join,
    cluster.key,
    cluster.run,
    show.status,
    show.node,
    show.domain,
    show.data,
    pop.pop,
    database.database,
):
    lucd.add_command(command)


def _forbidden(error: PermissionError) -> StorageError:
    """What this host refused to a command. Where more is known of it, it is told where it happens."""
    what = f"{error.filename} cannot be used" if error.filename else "this host refused what the command needs"
    return StorageError(
        f"{what}: this user may not ({error.strerror}); run the command as the user that lucd runs as, or as root"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: every error is one line on stderr and an exit code of its own (`dht.errors`)."""
    try:
        lucd.main(args=list(arguments) if arguments is not None else None, prog_name="lucd", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as error:
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        click.echo(f"lucd: {error.format_message()}{hint}", err=True)
        sys.exit(64)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(fail(Unavailable("whoever reads the output went away")))
    except PermissionError as error:
        sys.exit(fail(_forbidden(error)))
    except DhtError as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
