"""Every option of a lucd node, registered on a given ConfigOpts and nowhere global."""

from __future__ import annotations

import socket
from typing import Any, NamedTuple

from oslo_config import cfg, types

from dht import limits
from dht.domain import backups, follower
from dht.model import GLOBAL, LOCAL
from dht.register import copies


class Endpoint(NamedTuple):
    """A host and a port; one number serves TCP links and UDP overlay alike."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def wildcard(self) -> bool:
        """Whether it names every address of the host, which no peer can dial."""
        return self.host in ("0.0.0.0", "::", "")


def endpoint(value: object) -> Endpoint:
    """`HOST:PORT` or `[IPV6]:PORT`; raises ValueError with what is allowed, as oslo.config expects of a type."""
    if isinstance(value, Endpoint):
        return value
    host, colon, port = str(value).strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address stands in brackets: [::1]:7650")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("HOST:PORT is expected, with a port from 1 to 65535, for example 192.0.2.10:7650")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(
            "HOST:PORT is expected; no host has that name, for a part of it is empty or too long"
        ) from None
    return Endpoint(host, int(port))


def pop_name(value: object) -> str:
    """A PoP's name: 1-63 letters, digits, '.', '_' or '-', and no home that a database has without a PoP."""
    text = str(value)
    if text in (GLOBAL, LOCAL):
        raise ValueError(f"{text} cannot name a PoP, for it means something else where databases live")
    if not 0 < len(text) <= 63 or not all(c.isascii() and (c.isalnum() or c in "._-") for c in text):
        raise ValueError("a name of 1 to 63 letters, digits, '.', '_' or '-' is expected")
    return text


DEFAULTS: list[Any] = [
    cfg.StrOpt(
        "data_dir", default="/var/lib/lucd", help="The node's data directory, made by `lucd init` or `lucd join`."
    ),
    cfg.Opt(
        "pop", type=pop_name, default="pop1", help="The site (point of presence) of this node. It cannot change later."
    ),
    cfg.StrOpt(
        "failure_domain",
        sample_default="the host's name",
        help="Nodes of one failure domain (host, rack) never hold two replicas of a tablet while others are there.",
    ),
    cfg.Opt(
        "listen",
        type=endpoint,
        default="127.0.0.1:7650",
        help="HOST:PORT for the other nodes: links on TCP and the overlay on UDP, both on this number.",
    ),
    cfg.Opt(
        "advertise",
        type=endpoint,
        sample_default="the value of listen",
        help="HOST:PORT at which the other nodes reach this one. Needed where listen is 0.0.0.0 or [::].",
    ),
    cfg.BoolOpt(
        "link_tls",
        default=True,
        help="Links to the other nodes are encrypted (TLS 1.3, without files or an authority). The same on every node; "
        "false only where the network below encrypts already.",
    ),
    cfg.ListOpt(
        "bootstrap",
        item_type=types.String(),
        default=[],
        help="HOST:PORT of nodes to join through, comma-separated. The cluster's first node needs none.",
    ),
    cfg.StrOpt(
        "socket", default="/run/lucd/lucd.sock", help="The Unix socket for Nova's processes and the command line."
    ),
    cfg.StrOpt(
        "socket_mode",
        regex=r"^0?[0-7]{3}$",
        default="660",
        help="File mode of that socket: who may read and write Nova's state.",
    ),
    cfg.Opt(
        "admin", type=endpoint, default="127.0.0.1:7651", help="HOST:PORT of /livez, /readyz, /metrics and /status."
    ),
    cfg.StrOpt(
        "log_level", default="info", choices=["debug", "info", "warning", "error"], help="Least level that is logged."
    ),
]

LIMITS: list[Any] = [
    cfg.FloatOpt(
        "bootstrap_retry_s",
        default=2.0,
        min=0.1,
        max=300.0,
        help="Seconds between two attempts to reach the bootstrap nodes while this node is no member yet.",
    ),
    cfg.FloatOpt(
        "remove_after_s",
        default=limits.REMOVE_AFTER_S,
        min=10.0,
        max=7 * 86400.0,
        help="Seconds after which a member that no other one reaches is replaced, while a majority remains.",
    ),
    cfg.IntOpt(
        "copy_bytes_per_s",
        default=limits.COPY_BYTES_PER_S,
        min=64 * 1024,
        max=1 << 40,
        help="Bandwidth at which this node copies all tablets together that it is to keep from now on.",
    ),
    cfg.IntOpt(
        "repair_bytes_per_s",
        default=limits.REPAIR_BYTES_PER_S,
        min=64 * 1024,
        max=1 << 40,
        help="Bandwidth at which this node copies what it missed while it was away.",
    ),
    cfg.FloatOpt(
        "follow_interval_s",
        default=follower.FOLLOW_INTERVAL_S,
        min=0.05,
        max=60.0,
        help="Seconds between two questions of a follower to the domain that it copies.",
    ),
    cfg.FloatOpt(
        "staleness_max_s",
        default=copies.STALENESS_MAX_S,
        min=0.0,
        max=3600.0,
        help="How old what is read from a copy of domain global may be; past it, the domain itself is asked.",
    ),
    cfg.IntOpt(
        "backup_pops",
        default=backups.BACKUP_POPS,
        min=0,
        max=8,
        help="How many other PoPs keep a copy of each PoP's data, for the day it is lost. The same on every node.",
    ),
]

NOVA: list[Any] = [
    cfg.IntOpt(
        "workers", default=0, min=0, max=64, help="Worker processes of the RPC door beside this daemon; 0: none."
    ),
    cfg.IntOpt(
        "worker_threads", default=8, min=1, max=256, help="Database calls that one worker runs at the same time."
    ),
    cfg.StrOpt(
        "transport_url",
        sample_default="lucd:// with this daemon's socket",
        help="oslo.messaging transport of the RPC door.",
    ),
    cfg.StrOpt("main_database", default="nova_cell1", help="Database of Nova's cell that the workers serve."),
    cfg.StrOpt("api_database", default="nova_api", help="Nova's API database that the workers serve."),
    cfg.StrOpt(
        "config_file", sample_default="none", help="nova.conf that the workers read too, for options of Nova itself."
    ),
    cfg.StrOpt(
        "server", sample_default="the host's name", help="Name under which the workers of this host are called."
    ),
]

GROUPS: dict[str, list[Any]] = {"DEFAULT": DEFAULTS, "limits": LIMITS, "nova": NOVA}


def register(conf: Any) -> None:
    """Register all options on the ConfigOpts."""
    for group, options in GROUPS.items():
        conf.register_opts(options, group=None if group == "DEFAULT" else group)


def host_name() -> str:
    """This host's name, the default of `failure_domain` and `server`."""
    return socket.gethostname()
