"""The documents name commands, options, metrics, files, rules and numbers: each has to be what the program has."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from dht import limits
from dht.errors import BY_CODE
from dht.sim.planted import CAUGHT, DIRECTED, RULES
from dht.wire import link, local, strangers
from lucd import directory, turnstile
from lucd.admin import StatusCollector
from lucd.cli.main import lucd
from lucd.conf import options
from lucd.conf.settings import load
from lucd.daemon import Daemon
from lucd.messages import StatusReply

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOLD = [
    *DOCS,
    ROOT / "config" / "nova" / "README.md",
    ROOT / "config" / "prometheus" / "alerts.yml",
    ROOT / "Dockerfile",
]
SOURCES = [file for part in ("lucd", "dht", "nova_bridge") for file in sorted((ROOT / part).rglob("*.py"))]


def commands(command: click.Command, path: str = "lucd") -> Iterator[tuple[str, click.Command]]:
    """Those that do something, with the words that call them."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from commands(below, f"{path} {name}")


def command_lines(file: Path) -> Iterator[str]:
    """The calls of `lucd` that a text shows: quoted, or as a line of a shell."""
    text = file.read_text()
    yield from re.findall(r"`(lucd [a-z][^`]*)`", text)
    if file.suffix == ".md":
        blocks = "\n".join([*text.split("```")[1::2], *re.findall("^    .*$", text, re.MULTILINE)])
        yield from re.findall(r"^ *(lucd [a-z].*)$", blocks, re.MULTILINE)


def fault_of(line: str) -> str:
    """What is wrong with the command line; empty if nothing is."""
    command: click.Command = lucd
    words = shlex.split(re.sub(r"\{[^}]*\}", "X", line.replace("...", "")), comments=True)[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        below = command.commands.get(words[0])
        if below is None:
            return f"there is no command {words[0]}"
        command, words = below, words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = [word.strip("[]") for word in words if word.strip("[]").startswith("-") and word != "-"]
    return "; ".join(f"there is no option {option}" for option in given if option not in known | {"--help", "-h"})


def test_every_command_is_in_the_reference() -> None:
    missing = [path for path, _ in commands(lucd) if f"`{path}" not in REFERENCE]
    assert missing == []


def test_every_command_line_that_is_shown_exists_with_its_options() -> None:
    shown = {(file, line) for file in (*TOLD, *SOURCES) for line in command_lines(file)}
    assert len(shown) > 50
    faults = {f"{file.relative_to(ROOT)}: {line}": fault for file, line in shown if (fault := fault_of(line))}
    assert faults == {}


def test_fault_of_a_command_line_that_does_not_exist_is_found() -> None:
    assert fault_of("lucd node drain ID --timeout 5") == ""
    assert fault_of("lucd node drian ID") == "there is no command drian"
    assert fault_of("lucd status --jason") == "there is no option --jason"


def names_of_metrics(status: StatusReply) -> set[str]:
    return {sample.name for family in StatusCollector(lambda: status).collect() for sample in family.samples}


async def test_every_metric_that_is_named_exists_and_every_part_is_in_the_reference(tmp_path: Path) -> None:
    config = tmp_path / "lucd.conf"
    config.write_text(f"[DEFAULT]\ndata_dir = {tmp_path}/data\n")
    settings = load(config)
    directory.found(settings.data_dir)
    opened = directory.start(settings.data_dir, settings.pop)
    daemon = Daemon(settings, opened)
    status, parts = daemon._report.status(), daemon._counters()
    await daemon.stop()
    opened.close()
    known = names_of_metrics(status)
    for file in DOCS:
        named = set(re.findall(r"`(lucd_[a-z_]+)`", file.read_text())) - {"lucd_rpc"}
        assert named <= known, (file.name, named - known)
    table = REFERENCE[REFERENCE.index("## Admin address") :]
    of_no_part = names_of_metrics(msgspec.structs.replace(status, counters={}))
    assert {name for name in of_no_part if f"`{name}`" not in table} == set()
    assert {part for part in parts if f"`{part.removeprefix('global_')}`" not in table} == set()


def test_every_error_is_in_the_reference_with_its_numbers() -> None:
    told = {
        (name, int(http), int(code))
        for name, http, code in re.findall(r"^\| (\w+) \|.*?\| (\d{3}) \| (\d+) \|", REFERENCE, re.MULTILINE)
    }
    assert told == {(kind.__name__, kind.http_status, kind.exit_code) for kind in BY_CODE.values()}


def test_limits_in_the_reference_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", REFERENCE[REFERENCE.index("## Limits") :], re.MULTILINE))
    mib = 1024 * 1024
    for what, numbers in {
        "a group of rows": [f"{limits.GROUP_BYTES_MAX // mib} MiB"],
        "a transaction": [f"{limits.TRANSACTION_BYTES_MAX // mib} MiB"],
        "groups of one read, rows of one find": [f"{limits.READ_GROUPS_MAX:,}", f"{limits.FIND_ROWS_MAX:,}"],
        "local requests served at once; of one connection; waiting; seconds of waiting": [
            f"{turnstile.AT_ONCE_REQUESTS_MAX}; {turnstile.OF_ONE_CLIENT_REQUESTS_MAX}; "
            f"{turnstile.WAITING_REQUESTS_MAX:,}; {turnstile.WAIT_S_MAX:.0f},"
        ],
        "connections to the local socket": [f"{local.CONNECTIONS_MAX:,}"],
        "connections of the links' port without a proven peer; of these at work at once; seconds; bytes": [
            f"{strangers.STRANGERS_MAX},",
            f"; {strangers.HANDSHAKES_MAX},",
            f"; {strangers.STRANGER_S:.0f};",
            f"{strangers.STRANGER_BYTES_MAX // 1024} KiB",
        ],
        "bytes waiting for one peer": [f"{link.QUEUE_BYTES_MAX // mib} MiB; {link.SILENT_QUEUE_BYTES_MAX // mib} MiB"],
        "writes waiting for one group": [f"{limits.GROUP_QUEUE_WRITES_MAX:,}"],
    }.items():
        for number in numbers:
            assert number in rows[what], (what, number)


def test_every_rule_with_a_switch_is_in_the_protocol_and_every_switch_is_a_rule() -> None:
    assert [rule for rule in RULES if f"`{rule}`" not in PROTOCOL] == []
    switches = re.findall(r"^\|.*\| ([^|]*) \|$", PROTOCOL, re.MULTILINE)
    named = {name for cell in switches for name in re.findall(r"`([a-z_]+)`", cell)}
    assert named - set(RULES) == {"next_pop_index"} & named
    assert f"finds {len(CAUGHT)} by random runs" in PROTOCOL
    assert f"{len(DIRECTED)} others" in PROTOCOL


def test_table_of_planted_bugs_names_for_each_rule_the_test_that_notices() -> None:
    table = (ROOT / "docs" / "benchmarks" / "planted-bugs.md").read_text()
    rows = {rule: row for row in table.splitlines() for rule in RULES if f"| `{rule}` |" in row}
    assert rows.keys() == set(RULES)
    for rule, (scenario, seeds) in CAUGHT.items():
        assert f"random runs of `{scenario}`" in rows[rule], rule
        assert f"within {seeds} |" in rows[rule], rule
    for rule, (module, *tests) in DIRECTED.items():
        assert f"a schedule: {module.rpartition('.')[2]}, `{tests[-1]}`" in rows[rule], rule


def test_options_are_named_in_full_with_their_units() -> None:
    known = {option.dest for group in options.GROUPS.values() for option in group}
    for file in DOCS:
        named = set(re.findall(r"`([a-z_]+)`", file.read_text()))
        short = {name for name in named - known for unit in ("_s", "_per_s", "_bytes_per_s") if name + unit in known}
        assert short == set(), file.name


def test_files_modules_and_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in DOCS:
        text = file.read_text()
        for name in re.findall(r"(?<![\w/])(?:docs|config|tests|lucd|dht|nova_bridge)/[\w/.*-]*\w", text):
            assert list(ROOT.glob(name)), (file.name, name)
        for name in re.findall(r"`((?:lucd|dht|nova_bridge)(?:\.\w+)+)", text):
            assert _found(name), (file.name, name)
        for target in re.findall(r"`make ([a-z][\w-]*)", text):
            assert target in targets, (file.name, target)


def _found(name: str) -> bool:
    """Whether there is such a module, or such a thing in one."""
    module, _, rest = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return bool(module) and hasattr(importlib.import_module(module), rest)
    return True
