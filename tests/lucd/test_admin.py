"""The admin address: what it answers, and that its text is Prometheus'."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dht.errors import Invalid, Unavailable
from dht.storage.disk import DiskCounters
from lucd.admin import AdminDoor
from lucd.conf.options import Endpoint
from lucd.demo.daemons import free_port
from lucd.messages import StatusReply
from lucd.turnstile import Turnstile
from nova_bridge.rpc.bus import Bus
from tests.lucd.test_cli import STATUS

ROOT = Path(__file__).parents[2]
OF_THE_ROSTER = {f"lucd_domain_{name}" for name in ("members", "members_reachable", "epoch", "generation")}


class Now:
    """A status that a test changes."""

    def __init__(self) -> None:
        self.value = STATUS

    def __call__(self) -> StatusReply:
        return self.value


@pytest.fixture
async def served() -> AsyncIterator[tuple[Now, Endpoint]]:
    now, where = Now(), Endpoint("127.0.0.1", free_port())
    door = AdminDoor(where, now)
    await door.start()
    yield now, where
    await door.stop()


async def get(where: Endpoint, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{where}{path}") as reply:
        return reply.status, await reply.text()


async def test_readyz_follows_the_state_and_livez_does_not(served: tuple[Now, Endpoint]) -> None:
    now, where = served
    assert await get(where, "/readyz") == (200, "ready\n")
    now.value = msgspec.structs.replace(STATUS, ready=False, state="joining through 192.0.2.1:7650")
    assert await get(where, "/readyz") == (503, "joining through 192.0.2.1:7650\n")
    assert await get(where, "/livez") == (200, "ok\n")


async def test_status_is_json(served: tuple[Now, Endpoint]) -> None:
    code, text = await get(served[1], "/status")
    assert code == 200
    assert msgspec.json.decode(text)["warnings"] == ["node bb does not answer"]


async def test_metrics_are_what_prometheus_reads(served: tuple[Now, Endpoint]) -> None:
    now, where = served
    now.value = msgspec.structs.replace(
        STATUS, counters={"disk": {"commits": 7, "pending_bytes": 3}, "links": {"links": 2}}
    )
    code, text = await get(where, "/metrics")
    assert code == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["lucd_disk_commits"].type == "counter"
    assert families["lucd_disk_commits"].samples[0].value == 7
    assert families["lucd_disk_pending_bytes"].type == "gauge"
    assert families["lucd_links_links"].type == "gauge"
    assert families["lucd_ready"].samples[0].value == 1


async def test_pop_of_five_whose_next_loss_stops_a_tablet_is_one_that_the_alert_is_about(
    served: tuple[Now, Endpoint],
) -> None:
    """Three of five nodes are reachable, and the two that are not share a tablet's replicas."""
    now, where = served
    alerts = yaml.safe_load((ROOT / "config" / "prometheus" / "alerts.yml").read_text())
    rules = {rule["alert"]: rule["expr"] for group in alerts["groups"] for rule in group["rules"]}
    for survivable, fires in ((("node", "failure_domain"), False), ((), True)):
        now.value = msgspec.structs.replace(STATUS, members=5, reachable=3, survivable=survivable)
        text = (await get(where, "/metrics"))[1]
        values = {f.name: f.samples[0].value for f in text_string_to_metric_families(text)}
        expression = rules["LucdOneFailureFromStopping"]
        assert eval(expression, {name: values[name] for name in re.findall(r"lucd_\w+", expression)}) is fires


async def test_age_of_the_copy_of_global_is_a_metric_that_goes_up_and_down(served: tuple[Now, Endpoint]) -> None:
    now, where = served
    copies = {"copies": 2, "open": 1, "global_age_s": -1, "stale_s_most": 7.5, "stale_reads": 3}
    now.value = msgspec.structs.replace(STATUS, counters={"copies": copies})
    families = {family.name: family for family in text_string_to_metric_families((await get(where, "/metrics"))[1])}
    told = {name: families[f"lucd_copies_{name}"] for name in copies}
    assert {name: family.type for name, family in told.items()} == {
        **dict.fromkeys(copies, "gauge"),
        "stale_reads": "counter",
    }
    assert told["global_age_s"].samples[0].name == "lucd_copies_global_age_s"
    assert told["global_age_s"].samples[0].value == -1
    assert families["lucd_node_info"].samples[0].labels["pop"] == "paris"


async def test_counts_of_what_is_there_now_are_gauges_and_what_only_grows_are_counters(
    served: tuple[Now, Endpoint],
) -> None:
    now, where = served
    counters = {
        "turnstile": Turnstile().counters,
        "bus": Bus(0).counters,
        "disk": dataclasses.asdict(DiskCounters()),
        "domain": {"copied_bytes": 1, "repaired_bytes": 1},
    }
    now.value = msgspec.structs.replace(STATUS, counters=counters)
    families = text_string_to_metric_families((await get(where, "/metrics"))[1])
    kinds = {
        family.name: family.type for family in families if family.name.startswith(tuple(f"lucd_{p}_" for p in counters))
    }
    assert {name for name, kind in kinds.items() if kind == "gauge"} - OF_THE_ROSTER == {
        *("lucd_turnstile_waiting", "lucd_bus_listeners", "lucd_bus_queued_messages", "lucd_bus_queued_bytes"),
        "lucd_disk_pending_bytes",
    }
    assert {"lucd_disk_written_bytes", "lucd_domain_copied_bytes", "lucd_domain_repaired_bytes"} <= kinds.keys()


async def test_unknown_path_is_404(served: tuple[Now, Endpoint]) -> None:
    assert (await get(served[1], "/"))[0] == 404


async def test_start_on_a_taken_port_says_which_option(served: tuple[Now, Endpoint]) -> None:
    with pytest.raises(Unavailable, match=r"admin = 127\.0\.0\.1:\d+: another process uses this port"):
        await AdminDoor(served[1], lambda: STATUS).start()


async def test_start_on_a_foreign_address_is_invalid() -> None:
    with pytest.raises(Invalid, match="name an address of this host"):
        await AdminDoor(Endpoint("192.0.2.1", free_port()), lambda: STATUS).start()
