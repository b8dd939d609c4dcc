"""`python -m dht.sim`: run the store in virtual time, one seed or very many."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import click

from dht.sim.costs import SIZES, costs
from dht.sim.costs import page as cost_page
from dht.sim.costs import table as cost_table
from dht.sim.explore import CASES, explore
from dht.sim.planted import CAUGHT, CAUGHT_TOO, hunt, switched_off
from dht.sim.planted_table import page, table
from dht.sim.scenario import Scenario, Verdict, run
from dht.sim.scenarios import NAMES, scenario
from dht.sim.swarm import SWARM

_SHOWN_VIOLATIONS = 5
_QUEUED_PER_JOB = 8
_TOLD_EVERY_S = 60.0


@click.group()
def main() -> None:
    """Deterministic simulation of the store under crashes, loss, reordering and changes of the roster."""


@main.command(name="run")
@click.option("--seed", type=int, required=True, help="Seed of the run.")
@click.option("--scenario", "name", type=click.Choice(NAMES), default=SWARM, show_default=True)
@click.option("--trace", is_flag=True, help="Print the story of the run even if it passed.")
@click.option("--off", multiple=True, metavar="RULE", help="Switch a rule of the registers or of the domain off.")
@click.option("--quiet", is_flag=True, help="Print no story, not even of a failure.")
def run_command(seed: int, name: str, trace: bool, off: tuple[str, ...], quiet: bool) -> None:
    """Run one seed and print the verdict; a failure prints the story. Exit code 1: a violation."""
    verdict = run(_without(name, seed, off), seed)
    if trace or (verdict.violations and not quiet):
        click.echo("\n".join(verdict.trace))
    click.echo(_line(verdict))
    click.echo("counters: " + " ".join(f"{name}={n}" for name, n in verdict.counters.items()))
    for violation in verdict.violations:
        click.echo(f"VIOLATION: {violation}")
    if verdict.violations:
        sys.exit(1)


@main.command()
@click.option("--seeds", type=click.IntRange(min=1), default=1000, show_default=True, help="How many seeds.")
@click.option("--first", type=int, default=0, show_default=True, help="The first seed.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes at a time.")
@click.option("--scenario", "scenarios", type=click.Choice(NAMES), multiple=True, help="Default: the swarm.")
@click.option("--off", multiple=True, metavar="RULE", help="Switch a rule off; failures are then what is wanted.")
@click.option("--stop", is_flag=True, help="Stop at the first failure.")
def soak(seeds: int, first: int, jobs: int, scenarios: tuple[str, ...], off: tuple[str, ...], stop: bool) -> None:
    """Run many seeds; print those that fail and how to replay them. Exit code 1: at least one failed."""
    names = scenarios or (SWARM,)
    work = ((names[seed % len(names)], off, seed) for seed in range(first, first + seeds))
    started = time.monotonic()
    failed = undecided = done = operations = 0
    counters: dict[str, int] = {}
    told_s = started
    with ProcessPoolExecutor(jobs) as pool:
        waiting = deque(pool.submit(_run_one, *one) for one in islice(work, jobs * _QUEUED_PER_JOB))
        while waiting:
            verdict = waiting.popleft().result()
            done += 1
            undecided += verdict.undecided
            operations += sum(verdict.counts.values())
            for name, n in verdict.counters.items():
                counters[name] = counters.get(name, 0) + n
            if verdict.violations:
                failed += 1
                _report(verdict, off)
                if stop:
                    break
            waiting.extend(pool.submit(_run_one, *one) for one in islice(work, 1))
            if time.monotonic() - told_s >= _TOLD_EVERY_S:
                told_s = time.monotonic()
                click.echo(f"... {done} runs, {operations} operations in {told_s - started:.0f} s, {failed} failed")
        for future in waiting:
            future.cancel()
    click.echo("counters: " + " ".join(f"{name}={n}" for name, n in sorted(counters.items())))
    took_s = time.monotonic() - started
    click.echo(
        f"{done} runs, {operations} operations in {took_s:.0f} s: {failed} failed, "
        f"{undecided} histories too entangled to decide"
    )
    sys.exit(1 if failed else 0)


@main.command(name="explore")
@click.option("--deviations", type=click.IntRange(min=0), default=2, show_default=True, help="From the plain order.")
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="Default: all.")
@click.option("--off", multiple=True, metavar="RULE", help="Switch a rule of the registers or of the domain off.")
@click.option("--runs", type=click.IntRange(min=1), help="At most so many runs of each case.")
def explore_command(deviations: int, cases: tuple[str, ...], off: tuple[str, ...], runs: int | None) -> None:
    """Make every run with so many deviations of the smallest cases. Exit code 1: a violation."""
    failed = False
    for name in cases or tuple(CASES):
        started = time.process_time()
        found = explore(CASES[name], deviations, off, runs)
        how = "all of them" if found.complete else "there are more"
        took_s = time.process_time() - started
        click.echo(f"{name}: {found.runs} runs ({how}), {found.cut_short} cut short, {took_s:.1f} s of CPU")
        for line in (*found.violations, *(f"    {told}" for told in found.story if found.violations)):
            click.echo(f"VIOLATION: {line}" if line in found.violations else line)
        failed |= bool(found.violations)
    sys.exit(1 if failed else 0)


@main.command(name="planted")
@click.option("--seeds", type=click.IntRange(min=1), default=500, show_default=True, help="At most, for each rule.")
@click.option("--catches", type=click.IntRange(min=1), default=5, show_default=True, help="Enough, for each rule.")
@click.option("--first", type=int, default=1, show_default=True, help="The first seed.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes at a time.")
@click.option("--write", type=click.Path(dir_okay=False), help="Write the table there, too.")
def planted_command(seeds: int, catches: int, first: int, jobs: int, write: str | None) -> None:
    """Search for each planted bug that random runs are to catch; print what it took as a table."""
    with ProcessPoolExecutor(jobs) as pool:
        searched = range(first, first + seeds)
        waiting = [
            pool.submit(hunt, rule, name, searched, catches) for rule, (name, _) in (CAUGHT | CAUGHT_TOO).items()
        ]
        hunts = []
        for future in waiting:
            found = future.result()
            hunts.append(found)
            click.echo(f"{found.rule}: {len(found.caught)} in {found.tried} seeds of {found.scenario}", err=True)
    text = table(hunts)
    click.echo(text)
    if write is not None:
        Path(write).write_text(page(text, first, seeds, catches))


@main.command(name="costs")
@click.option("--write", type=click.Path(dir_okay=False), help="Write the table there, too.")
def costs_command(write: str | None) -> None:
    """Messages and CPU of one write, read and find in a PoP of 3 to 50 nodes."""
    text = cost_table([costs(nodes) for nodes in SIZES])
    click.echo(text)
    if write is not None:
        Path(write).write_text(cost_page(text))


def _run_one(name: str, off: tuple[str, ...], seed: int) -> Verdict:
    verdict = run(_without(name, seed, off), seed)
    verdict.trace.clear()  # the parent prints only how to get it again
    return verdict


def _without(name: str, seed: int, off: tuple[str, ...]) -> Scenario:
    try:
        return switched_off(scenario(name, seed), off)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _line(verdict: Verdict) -> str:
    counts = " ".join(f"{name}={n}" for name, n in verdict.counts.items() if n)
    return (
        f"{verdict.scenario} seed {verdict.seed}: {'FAILED' if verdict.violations else 'passed'}, "
        f"trace {verdict.fingerprint}, {counts}" + (f", {verdict.undecided} undecided" if verdict.undecided else "")
    )


def _report(verdict: Verdict, off: tuple[str, ...]) -> None:
    switches = "".join(f" --off {rule}" for rule in off)
    click.echo(f"FAILED: python -m dht.sim run --scenario {verdict.scenario} --seed {verdict.seed}{switches}")
    for violation in verdict.violations[:_SHOWN_VIOLATIONS]:
        click.echo(f"    {violation.splitlines()[0][:300]}")


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of strings iterate by hash: the same seed has to mean the same run in every process.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "dht.sim", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    main(prog_name="python -m dht.sim")
