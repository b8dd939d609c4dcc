"""The admin address: /livez, /readyz, /metrics and /status over plain HTTP, on loopback unless configured otherwise.

It shows numbers and names, never rows, and changes nothing; there is no login.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from dht.errors import Invalid, Unavailable
from lucd.conf.options import Endpoint
from lucd.messages import StatusReply, plain

NOW = frozenset(
    {
        *("connections", "links", "copies", "open", "held_addresses", "known_addresses", "far_calls", "listeners"),
        *("waiting", "queued_messages", "queued_bytes", "pending_bytes"),
    }
)
NOW_ENDS = ("_now", "_most", "_age_s")
"""Counters that say how many there are now, or how much, not how many there were since the start."""


class StatusCollector(Collector):
    """The node's status as Prometheus metrics: `lucd_PART_NAME`, with _total where it only grows."""

    def __init__(self, status: Callable[[], StatusReply]) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        shared = status.global_domain
        unavailable = shared.tablets.get("unavailable", 0) if shared.joined else 0
        info = {
            "version": status.version,
            "node_id": status.node_id,
            "pop": status.pop,
            "cluster_id": status.cluster_id,
        }
        yield InfoMetricFamily("lucd_node", "Who this node is", value=info)
        for name, text, value in (
            ("ready", "1 when the node serves", status.ready),
            ("uptime_seconds", "Time since the start", status.uptime_s),
            ("boot", "How often the node was started", status.boot),
            ("domain_members", "Members of the PoP's domain", status.members),
            ("domain_members_reachable", "Members that answer", status.reachable),
            ("domain_epoch", "Newest roster epoch held", status.roster_epoch),
            ("domain_generation", "Generation of the domain", status.generation),
            ("tablets_whole", "Tablets with all replicas working", status.tablets.get("whole", 0)),
            ("tablets_degraded", "Tablets with a majority of replicas working", status.tablets.get("degraded", 0)),
            ("tablets_unavailable", "Tablets without a majority", status.tablets.get("unavailable", 0)),
            ("survives_node", "1 when any one node of the PoP may be lost", "node" in status.survivable),
            ("copying", "Groups that this node still copies", status.to_copy),
            ("global_joined", "1 when the node is a member of domain global", shared.joined),
            ("global_members", "Members of domain global", shared.members),
            ("global_members_reachable", "Members of domain global that answer this one", shared.reachable),
            ("global_epoch", "Newest roster epoch of domain global held", shared.roster_epoch),
            ("global_tablets_unavailable", "Tablets of domain global without a majority", unavailable),
            ("warnings", "Conditions that a human should look at", len(status.warnings)),
        ):
            yield GaugeMetricFamily(f"lucd_{name}", text, value=float(value))
        for part, counters in status.counters.items():
            for name, number in counters.items():
                text = f"{name.replace('_', ' ')} of {part}"
                if name in NOW or name.endswith(NOW_ENDS):
                    yield GaugeMetricFamily(f"lucd_{part}_{name}", text, value=float(number))
                else:
                    yield CounterMetricFamily(f"lucd_{part}_{name}", text, value=float(number))


class AdminDoor:
    """The HTTP server. `start` raises Unavailable when the port is taken, Invalid when the host is not ours."""

    def __init__(self, where: Endpoint, status: Callable[[], StatusReply]) -> None:
        self.where = where
        self._status = status
        self._registry = CollectorRegistry()
        self._registry.register(StatusCollector(status))
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status_json),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.where.host, self.where.port)
        try:
            await site.start()
        except OSError as error:
            await self.stop()
            raise port_error("admin", self.where, error) from None

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _livez(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        status = self._status()
        return web.Response(text=f"{status.state}\n", status=200 if status.ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status_json(self, request: web.Request) -> web.Response:
        return web.json_response(plain(self._status()), dumps=lambda value: json.dumps(value, indent=2) + "\n")


def port_error(option: str, where: Endpoint, error: OSError) -> Invalid | Unavailable:
    """Why an address could not be listened on, in one line."""
    if error.errno == errno.EADDRINUSE:
        return Unavailable(f"{option} = {where}: another process uses this port; stop it or choose another port")
    if error.errno == errno.EACCES:
        return Unavailable(f"{option} = {where}: this user may not listen there; choose a port from 1024 up")
    return Invalid(f"{option} = {where}: cannot listen there ({error.strerror}); name an address of this host")
