"""The options of the group [lucd] in nova.conf: how a process of Nova's finds the RPC door."""

from __future__ import annotations

import socket
from typing import Any

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "lucd",
    title="lucd",
    help="How Nova's processes on this host reach the lucd daemon that keeps Nova's database.",
)

OPTIONS = [
    cfg.StrOpt(
        "socket",
        default="/run/lucd/lucd.sock",
        help="Path of the daemon's Unix socket. The default transport_url of the RPC door goes through it.",
    ),
    cfg.StrOpt(
        "transport_url",
        help="oslo.messaging transport of the RPC door. The default is lucd:// by way of `socket`; any other that "
        "oslo.messaging has, rabbit:// for example, is possible as well.",
    ),
    cfg.StrOpt(
        "server",
        help="Name of the server that runs the database calls. The default is this host's name: every host asks the "
        "workers beside its own daemon.",
    ),
    cfg.IntOpt(
        "rpc_timeout",
        default=60,
        min=1,
        help="Seconds that a database call may take. Past it the caller gets DBConnectionError.",
    ),
]


def register_opts(conf: Any) -> None:
    """Register [lucd] on `conf`; doing it again changes nothing."""
    conf.register_group(GROUP)
    conf.register_opts(OPTIONS, group=GROUP)


def list_opts() -> list[tuple[Any, list[Any]]]:
    """For oslo-config-generator."""
    return [(GROUP, OPTIONS)]


def transport_url(conf: Any) -> str:
    return conf.lucd.transport_url or f"lucd://{conf.lucd.socket}"


def server_name(conf: Any) -> str:
    return conf.lucd.server or socket.gethostname()
