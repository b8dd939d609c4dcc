"""The files in config/ and the Dockerfile say what the program does."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import yaml

from dht.errors import BY_CODE
from lucd.admin import StatusCollector
from lucd.conf.settings import load
from nova_bridge.rpc.options import OPTIONS
from tests.lucd.test_cli import STATUS

ROOT = Path(__file__).parents[2]
OF_NOVA = {"netaddr", "oslo-log", "oslo-serialization", "oslo-versionedobjects"}
"""What Nova brings along, imported beside it only."""
OF_KADEMLIA = {"rpcudp"}
"""What is subclassed through kademlia."""


def test_service_unit_starts_what_exists_and_gives_up_on_hopeless_errors() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read(ROOT / "config" / "lucd.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["ExecStart"].endswith("lucd run --config /etc/lucd/lucd.conf")
    hopeless = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert hopeless <= {error.exit_code for error in BY_CODE.values()}
    settings = load(None)
    assert settings.socket.parent == Path("/run") / service["RuntimeDirectory"]
    assert settings.data_dir == Path("/var/lib") / service["StateDirectory"]


def test_entry_points_name_what_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["scripts"], *project["entry-points"].values()]
    for name, place in [pair for group in groups for pair in group.items()]:
        module, thing = place.split(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert thing in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}, name


def test_dependencies_are_what_is_imported_and_each_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {plain_name(text) for text in project["dependencies"]}
    extra = {plain_name(text) for name in ("nova", "control-plane") for text in project["optional-dependencies"][name]}
    imported = set()
    for part in ("dht", "lucd", "nova_bridge"):
        for file in (ROOT / part).rglob("*.py"):
            imported |= {name.partition(".")[0] for name in imports_of(ast.parse(file.read_text()))}
    found = importlib.metadata.packages_distributions()
    used = {plain_name(name) for module in imported - sys.stdlib_module_names for name in found[module]} - {"lucd"}
    assert used - declared - extra == OF_NOVA
    assert declared - used == OF_KADEMLIA
    pinned = {plain_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert (declared | extra) - {"lucd"} <= pinned


def plain_name(requirement: str) -> str:
    """The distribution's name without version and extras, as it is compared."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~ ]", requirement)[0]).lower()


def imports_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_dockerfile_uses_the_default_ports_and_no_root() -> None:
    text = (ROOT / "Dockerfile").read_text()
    settings = load(None)
    assert f"EXPOSE {settings.listen.port}/tcp {settings.listen.port}/udp" in text
    assert f"http://127.0.0.1:{settings.admin.port}/readyz" in text
    assert text.index("USER lucd") < text.index("ENTRYPOINT")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert [name for name in scripts if f"/bin/{name} " not in text] == []


def test_alerts_and_dashboard_ask_only_for_metrics_that_exist() -> None:
    counters = {
        "links": dict.fromkeys(("refused", "bytes_in", "bytes_out"), 1),
        "door": dict.fromkeys(("commit", "readgroups", "find"), 1),
        "disk": dict.fromkeys(("commits", "commit_s"), 1),
    }
    status = msgspec.structs.replace(STATUS, counters=counters)
    known = set()
    for family in StatusCollector(lambda: status).collect():
        known.update(sample.name for sample in family.samples)
    alerts = yaml.safe_load((ROOT / "config" / "prometheus" / "alerts.yml").read_text())
    asked = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    dashboard = json.loads((ROOT / "config" / "grafana" / "lucd.json").read_text())
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"\blucd_\w+", expression)}
    assert names <= known, names - known


def test_scrape_example_names_the_default_admin_address() -> None:
    scrape = yaml.safe_load((ROOT / "config" / "prometheus" / "scrape.yml").read_text())
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == [str(load(None).admin)]


def test_nova_snippets_name_the_default_socket() -> None:
    socket = str(load(None).socket)
    for name in ("sql-door.conf", "rpc-door.conf", "transport.conf"):
        text = (ROOT / "config" / "nova" / name).read_text()
        assert socket in text, name


def test_options_of_the_rpc_door_that_its_snippet_names_exist() -> None:
    text = (ROOT / "config" / "nova" / "rpc-door.conf").read_text()
    group = text[text.index("[lucd]") : text.index("\n# [database]")]
    assert {option.dest for option in OPTIONS} == set(re.findall(r"^#?(\w+) = ", group, re.MULTILINE))
