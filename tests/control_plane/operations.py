"""The life of a server and all around it through Nova's REST API, recorded so that two records can be compared.

An answer differs from run to run in what is random or a time: ids, timestamps, the host that the scheduler chose.
`Recorder` puts names in their place, the same thing under the same name throughout a record.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lucd.demo.plane.neighbours import IMAGE
from lucd.demo.plane.rest import PROJECT, USER, ComputeApi

PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl demo"
WAIT_S = 90.0
POLL_S = 0.2

ONE_OF_A_KIND = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|instance-[0-9a-f]{8}"
    r"|(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])"
)
VARIABLE = re.compile(
    # Times, hosts (by name, by address, by hostId) and reservations.
    r"[0-9a-f]{56}|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)?|compute-\d+|127\.0\.0\.1:\d+|r-[a-z0-9]{8}"
)
MEASURED = frozenset(
    [
        "uptime",
        "total_hours",
        "total_memory_mb_usage",
        "total_vcpus_usage",
        "total_local_gb_usage",
        "hours",
        "adminPass",
        "updated_at",
        "last_heartbeat",
        "load",
        "report_count",
        "host_time",
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one operation said, with names in place of what is random."""

    operation: str
    status: int
    body: object


@dataclass(slots=True)
class Recorder:
    """Runs operations and keeps what they answered."""

    api: ComputeApi
    answers: list[Answer] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)

    def do(self, operation: str, method: str, path: str, body: object = None) -> Any:
        """One operation, whatever it answers; returns the answer as it came."""
        status, reply = self.api.ask(method, path, body)
        self.answers.append(Answer(operation, status, self._plain(reply)))
        return reply

    def _plain(self, value: Any, key: str = "") -> object:
        match value:
            case dict():
                return {self._plain(k): self._plain(v, k) for k, v in sorted(value.items())}
            case list():
                return [self._plain(v, key) for v in sorted(value, key=_host)]
            case _ if key in MEASURED:
                return "measured"
            case bool() | None:
                return value
            case float():
                return "measured"
            case int() if key == "id":
                return self._named(f"number {value}")
            case str():
                return VARIABLE.sub("varies", ONE_OF_A_KIND.sub(lambda found: self._named(found.group()), value))
            case _:
                return value

    def _named(self, random: str) -> str:
        return self._names.setdefault(random, f"thing {len(self._names) + 1}")


def _host(item: Any) -> str:
    """Services and hypervisors come in the order in which they first reported, which is chance."""
    if not isinstance(item, dict):
        return ""
    return f"{item.get('host') or item.get('hypervisor_hostname') or ''} {item.get('binary') or ''}"


class Life:
    """The operations in order. Two hosts: where a server goes is decided by where it is."""

    def __init__(self, recorder: Recorder) -> None:
        self._record = recorder
        self._api = recorder.api

    def all(self) -> None:
        self._flavors()
        self._around()
        server = self._create()
        self._metadata_and_tags(server)
        self._states(server)
        self._moves(server)
        self._records(server)
        self._quotas()
        self._ends(server)

    def _act(self, server: str, action: str, argument: object, status: str, note: str = "") -> None:
        do = self._record.do
        name = f"{action}{note}"
        do(name, "POST", f"/servers/{server}/action", {action: argument})
        self._api.wait(server, status, WAIT_S)
        do(f"show after {name}", "GET", f"/servers/{server}")

    def _until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not done() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _flavors(self) -> None:
        do = self._record.do
        small = {"flavor": {"name": "small", "vcpus": 1, "ram": 512, "disk": 1, "id": "f-small"}}
        large = {"flavor": {"name": "large", "vcpus": 2, "ram": 1024, "disk": 2, "id": "f-large"}}
        hidden = {"flavor": {"name": "hidden", "vcpus": 1, "ram": 64, "disk": 0, "os-flavor-access:is_public": False}}
        do("flavor create", "POST", "/flavors", small)
        do("flavor create, another", "POST", "/flavors", large)
        do("flavor create, its name is taken", "POST", "/flavors", small)
        private = do("flavor create, private", "POST", "/flavors", hidden)["flavor"]["id"]
        access = {"addTenantAccess": {"tenant": PROJECT}}
        do("flavor access add", "POST", f"/flavors/{private}/action", access)
        do("flavor access add, twice", "POST", f"/flavors/{private}/action", access)
        do("flavor access list", "GET", f"/flavors/{private}/os-flavor-access")
        do(
            "flavor extra specs set",
            "POST",
            "/flavors/f-small/os-extra_specs",
            {"extra_specs": {"hw:cpu_policy": "shared"}},
        )
        do("flavor extra specs show", "GET", "/flavors/f-small/os-extra_specs")
        do("flavor extra spec delete", "DELETE", "/flavors/f-small/os-extra_specs/hw:cpu_policy")
        do("flavor update", "PUT", "/flavors/f-large", {"flavor": {"description": "twice the small one"}})
        do("flavor list", "GET", "/flavors/detail?is_public=None")
        do("flavor delete", "DELETE", f"/flavors/{private}")
        do("flavor show, deleted", "GET", f"/flavors/{private}")

    def _around(self) -> None:
        do = self._record.do
        do(
            "keypair import",
            "POST",
            "/os-keypairs",
            {"keypair": {"name": "key", "type": "ssh", "public_key": PUBLIC_KEY}},
        )
        do(
            "keypair import, twice",
            "POST",
            "/os-keypairs",
            {"keypair": {"name": "key", "public_key": PUBLIC_KEY, "type": "ssh"}},
        )
        do("keypair show", "GET", "/os-keypairs/key")
        do("keypair list", "GET", "/os-keypairs")
        aggregate = do(
            "aggregate create", "POST", "/os-aggregates", {"aggregate": {"name": "a", "availability_zone": None}}
        )
        path = f"/os-aggregates/{aggregate['aggregate']['id']}"
        do("aggregate add host", "POST", f"{path}/action", {"add_host": {"host": "compute-1"}})
        do("aggregate add host, twice", "POST", f"{path}/action", {"add_host": {"host": "compute-1"}})
        do("aggregate set metadata", "POST", f"{path}/action", {"set_metadata": {"metadata": {"ssd": "true"}}})
        do("aggregate show", "GET", path)
        do("aggregate remove host", "POST", f"{path}/action", {"remove_host": {"host": "compute-1"}})
        do("aggregate rename", "PUT", path, {"aggregate": {"name": "b"}})
        do("aggregate delete", "DELETE", path)
        do("aggregate list", "GET", "/os-aggregates")
        services = do("service list", "GET", "/os-services")["services"]
        compute = next(s["id"] for s in services if s["host"] == "compute-2")
        do("service disable", "PUT", f"/os-services/{compute}", {"status": "disabled", "disabled_reason": "test"})
        do("service enable", "PUT", f"/os-services/{compute}", {"status": "enabled"})
        do("hypervisor list", "GET", "/os-hypervisors/detail")
        do("availability zones", "GET", "/os-availability-zone/detail")

    def _create(self) -> str:
        do = self._record.do
        rule = {"server_group": {"name": "apart", "policy": "anti-affinity"}}
        group = do("server group create", "POST", "/os-server-groups", rule)["server_group"]["id"]
        body = {
            "server": {
                "name": "vm", "flavorRef": "f-small", "imageRef": IMAGE, "networks": "none", "key_name": "key",
                "metadata": {"role": "web"}, "tags": ["first"], "availability_zone": "nova:compute-1",
            },
            "os:scheduler_hints": {"group": group},
        }  # fmt: skip
        server = str(do("server create", "POST", "/servers", body)["server"]["id"])
        self._api.wait(server, "ACTIVE", WAIT_S)
        do("server show", "GET", f"/servers/{server}")
        do("server group show", "GET", f"/os-server-groups/{group}")
        missing = {"server": {"name": "vm", "flavorRef": "none", "imageRef": IMAGE, "networks": "none"}}
        do("server create, no such flavor", "POST", "/servers", missing)
        do("server list by name", "GET", "/servers/detail?name=vm")
        do("server list by tag", "GET", "/servers?tags=first")
        do("server list by state, none", "GET", "/servers?status=PAUSED")
        do("server rename", "PUT", f"/servers/{server}", {"server": {"name": "vm-1", "description": "renamed"}})
        return server

    def _metadata_and_tags(self, server: str) -> None:
        do, path = self._record.do, f"/servers/{server}"
        do("metadata update", "POST", f"{path}/metadata", {"metadata": {"a": "1", "b": "2"}})
        do("metadata item set", "PUT", f"{path}/metadata/a", {"meta": {"a": "3"}})
        do("metadata item delete", "DELETE", f"{path}/metadata/b")
        do("metadata item delete, not there", "DELETE", f"{path}/metadata/b")
        do("metadata list", "GET", f"{path}/metadata")
        do("metadata replace", "PUT", f"{path}/metadata", {"metadata": {"c": "4"}})
        do("tag add", "PUT", f"{path}/tags/second")
        do("tag add, twice", "PUT", f"{path}/tags/second")
        do("tag check", "GET", f"{path}/tags/second")
        do("tag list", "GET", f"{path}/tags")
        do("tags replace", "PUT", f"{path}/tags", {"tags": ["only"]})
        do("tag delete", "DELETE", f"{path}/tags/only")
        do("tag delete, not there", "DELETE", f"{path}/tags/only")

    def _states(self, server: str) -> None:
        do = self._record.do
        self._act(server, "pause", None, "PAUSED")
        do("pause, paused already", "POST", f"/servers/{server}/action", {"pause": None})
        self._act(server, "unpause", None, "ACTIVE")
        self._act(server, "suspend", None, "SUSPENDED")
        self._act(server, "resume", None, "ACTIVE")
        self._act(server, "os-stop", None, "SHUTOFF")
        do("os-stop, stopped already", "POST", f"/servers/{server}/action", {"os-stop": None})
        self._act(server, "os-start", None, "ACTIVE")
        self._act(server, "reboot", {"type": "SOFT"}, "ACTIVE", ", soft")
        self._act(server, "reboot", {"type": "HARD"}, "ACTIVE", ", hard")
        self._act(server, "lock", {"locked_reason": "test"}, "ACTIVE")
        self._act(server, "unlock", None, "ACTIVE")
        self._act(server, "rescue", None, "RESCUE")
        self._act(server, "unrescue", None, "ACTIVE")
        self._act(server, "rebuild", {"imageRef": IMAGE, "name": "vm-2"}, "ACTIVE")
        self._act(server, "createImage", {"name": "snapshot"}, "ACTIVE")
        self._act(server, "createBackup", {"name": "b", "backup_type": "daily", "rotation": 1}, "ACTIVE")
        self._act(server, "os-resetState", {"state": "active"}, "ACTIVE")
        do("shelve", "POST", f"/servers/{server}/action", {"shelve": None})
        self._api.wait(server, "SHELVED_OFFLOADED", WAIT_S)
        # Nova says so before it takes the server from its host.
        self._until(lambda: not self._api.ask("GET", f"/servers/{server}")[1]["server"]["OS-EXT-SRV-ATTR:host"])
        do("show after shelve", "GET", f"/servers/{server}")
        self._act(server, "unshelve", None, "ACTIVE")

    def _moves(self, server: str) -> None:
        do = self._record.do
        same = {"resize": {"flavorRef": "f-small"}}
        do("resize to the flavor it has", "POST", f"/servers/{server}/action", same)
        self._act(server, "resize", {"flavorRef": "f-large"}, "VERIFY_RESIZE")
        self._act(server, "revertResize", None, "ACTIVE")
        self._act(server, "resize", {"flavorRef": "f-large"}, "VERIFY_RESIZE", ", again")
        self._act(server, "confirmResize", None, "ACTIVE")
        self._act(server, "migrate", None, "VERIFY_RESIZE")
        self._act(server, "confirmResize", None, "ACTIVE", " of the migration")
        self._act(server, "os-migrateLive", {"host": None, "block_migration": "auto"}, "ACTIVE")
        do("evacuate from a host that lives", "POST", f"/servers/{server}/action", {"evacuate": {}})
        do("migration list", "GET", f"/os-migrations?instance_uuid={server}")

    def _records(self, server: str) -> None:
        do = self._record.do
        actions = do("instance actions", "GET", f"/servers/{server}/os-instance-actions")["instanceActions"]
        first = actions[-1]["request_id"]
        do("instance action with its events", "GET", f"/servers/{server}/os-instance-actions/{first}")
        do("interfaces", "GET", f"/servers/{server}/os-interface")
        do("volumes", "GET", f"/servers/{server}/os-volume_attachments")
        do("server topology", "GET", f"/servers/{server}/topology")
        do("usage", "GET", f"/os-simple-tenant-usage/{PROJECT}")

    def _quotas(self) -> None:
        do, path = self._record.do, f"/os-quota-sets/{PROJECT}"
        do("limits", "GET", "/limits")
        do("quota show", "GET", path)
        do("quota set", "PUT", path, {"quota_set": {"instances": 1}})
        over = {"server": {"name": "too many", "flavorRef": "f-small", "imageRef": IMAGE, "networks": "none"}}
        do("server create over quota", "POST", "/servers", over)
        do("quota detail", "GET", f"{path}/detail")
        do("quota of a user", "PUT", f"{path}?user_id={USER}", {"quota_set": {"cores": 4}})
        do("quota delete", "DELETE", path)
        do("quota show, deleted", "GET", path)
        do("quota class set", "PUT", "/os-quota-class-sets/default", {"quota_class_set": {"server_groups": 11}})
        do("quota defaults", "GET", f"{path}/defaults")

    def _ends(self, server: str) -> None:
        do = self._record.do
        do("server delete", "DELETE", f"/servers/{server}")
        self._until(lambda: self._api.ask("GET", f"/servers/{server}")[0] == 404)
        do("server show, deleted", "GET", f"/servers/{server}")
        do("server list with deleted", "GET", "/servers/detail?deleted=true&all_tenants=1")
        do("keypair delete", "DELETE", "/os-keypairs/key")
        do("keypair delete, not there", "DELETE", "/os-keypairs/key")
        do("flavor delete, in use no more", "DELETE", "/flavors/f-small")


def differences(mine: list[Answer], other: list[Answer]) -> list[str]:
    """What is not the same in two records, one line for each part of an answer."""
    lines = [] if len(mine) == len(other) else [f"{len(mine)} answers here, {len(other)} there"]
    for left, right in zip(mine, other, strict=False):
        if left.operation != right.operation:
            return [*lines, f"{left.operation} here stands beside {right.operation} there"]
        parts = _parts({"status": left.status, "body": left.body}, {"status": right.status, "body": right.body})
        lines += [f"{left.operation}: {part}" for part in parts]
    return lines


def _parts(left: object, right: object, path: str = "") -> list[str]:
    match left, right:
        case dict(), dict():
            keys = sorted(left.keys() | right.keys(), key=str)
            return [line for key in keys for line in _parts(left.get(key), right.get(key), f"{path}/{key}")]
        case list(), list() if len(left) == len(right):
            pairs = enumerate(zip(left, right, strict=True))
            return [line for number, pair in pairs for line in _parts(*pair, f"{path}/{number}")]
        case _:
            return [] if left == right else [f"{path} is {left!r} here, {right!r} there"]
