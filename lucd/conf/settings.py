"""A node's settings: read from one file, checked whole, then immutable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oslo_config import cfg

from dht.errors import Invalid, NotFound
from lucd.conf import options
from lucd.conf.options import Endpoint


@dataclass(frozen=True, slots=True)
class NovaSettings:
    """What the RPC door's workers are started with."""

    workers: int
    worker_threads: int
    transport_url: str
    main_database: str
    api_database: str
    config_file: str | None
    server: str


@dataclass(frozen=True, slots=True)
class Settings:
    """All options of a node after the defaults that depend on others were filled in."""

    data_dir: Path
    pop: str
    failure_domain: str
    listen: Endpoint
    advertise: Endpoint
    link_tls: bool
    bootstrap: tuple[Endpoint, ...]
    socket: Path
    socket_mode: int
    admin: Endpoint
    log_level: str
    bootstrap_retry_s: float
    remove_after_s: float
    copy_bytes_per_s: int
    repair_bytes_per_s: int
    follow_interval_s: float
    staleness_max_s: float
    backup_pops: int
    nova: NovaSettings


def load(path: Path | None) -> Settings:
    """The settings in the file; None: the defaults alone.

    Raises NotFound when there is no such file, Invalid for anything in it that lucd does not know or cannot use; the
    message names file, option, value and what is allowed.
    """
    where = str(path) if path else "the defaults"
    if path is not None and not path.is_file():
        raise NotFound(f"no configuration file {path}; `lucd config sample` prints one to start from")
    conf: Any = cfg.ConfigOpts()
    options.register(conf)
    try:
        if path is not None:
            _refuse_unknown(path)
        conf(args=[], project="lucd", default_config_files=[str(path)] if path else [], default_config_dirs=[])
    except cfg.ConfigFilesPermissionDeniedError:
        raise Invalid(f"{path} cannot be read by this user; change its owner or mode") from None
    except (cfg.ParseError, cfg.ConfigFileParseError, UnicodeDecodeError) as error:
        raise Invalid(f"{path} is not a configuration file: {_one_line(error)}") from None
    return _settings(conf, where)


def _refuse_unknown(path: Path) -> None:
    sections: dict[str, dict[str, list[str]]] = {}
    try:
        cfg.ConfigParser(str(path), sections).parse()
    except PermissionError:
        raise cfg.ConfigFilesPermissionDeniedError([str(path)]) from None
    for section, values in sections.items():
        known = options.GROUPS.get(section)
        if known is None:
            raise Invalid(
                f"{path}: unknown section [{section}]; there are {', '.join(f'[{g}]' for g in options.GROUPS)}"
            )
        names = {option.dest for option in known}
        for name in values:
            if name.replace("-", "_") not in names:
                raise Invalid(
                    f"{path}: unknown option {name} in [{section}]; known there: {', '.join(sorted(names))}",
                    option=name,
                )


def _value(conf: Any, where: str, group: str, option: Any) -> Any:
    try:
        value = conf[option.dest] if group == "DEFAULT" else conf[group][option.dest]
        if isinstance(value, float) and not math.isfinite(value):
            # It is neither below the least nor above the greatest allowed, and no wait for it ever ends.
            raise ValueError("a number is expected")
        return value
    except (cfg.ConfigFileValueError, ValueError) as error:
        given = _given(conf, group, option)
        raise Invalid(f"{where}: [{group}] {option.dest} = {given}: {_allowed(error)}", option=option.dest) from None


def _given(conf: Any, group: str, option: Any) -> str:
    sections: dict[str, dict[str, list[str]]] = {}
    for file in conf.config_file or []:
        cfg.ConfigParser(file, sections).parse()
    return (sections.get(group, {}).get(option.dest) or ["?"])[-1]


def _allowed(error: Exception) -> str:
    text = _one_line(error).split("is not valid: ", 1)[-1]
    if text.startswith("invalid literal for int"):
        return "a whole number is expected"
    if text.startswith("could not convert string to float"):
        return "a number is expected"
    if text.startswith("Unexpected boolean value"):
        return "true or false is expected"
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _settings(conf: Any, where: str) -> Settings:
    values = {
        (group, option.dest): _value(conf, where, group, option)
        for group, known in options.GROUPS.items()
        for option in known
    }

    def top(name: str) -> Any:
        return values["DEFAULT", name]

    data_dir = Path(top("data_dir")).absolute()
    listen: Endpoint = top("listen")
    advertise: Endpoint = top("advertise") or listen
    if advertise.wildcard:
        raise Invalid(
            f"{where}: [DEFAULT] listen = {listen} names no address that other nodes could dial; "
            "set advertise = HOST:PORT to this node's own"
        )
    bootstrap = []
    for item in top("bootstrap"):
        try:
            bootstrap.append(options.endpoint(item))
        except ValueError as error:
            raise Invalid(f"{where}: [DEFAULT] bootstrap = {item}: {error}", option="bootstrap") from None
    socket = Path(top("socket")).absolute()
    if len(str(socket).encode()) > 100:
        raise Invalid(
            f"{where}: [DEFAULT] socket = {socket}: Unix sockets take at most 100 bytes of path; choose a shorter one"
        )
    return Settings(
        data_dir=data_dir,
        pop=top("pop"),
        failure_domain=top("failure_domain") or options.host_name(),
        listen=listen,
        advertise=advertise,
        link_tls=top("link_tls"),
        bootstrap=tuple(bootstrap),
        socket=socket,
        socket_mode=int(top("socket_mode"), 8),
        admin=top("admin"),
        log_level=top("log_level"),
        bootstrap_retry_s=values["limits", "bootstrap_retry_s"],
        remove_after_s=values["limits", "remove_after_s"],
        copy_bytes_per_s=values["limits", "copy_bytes_per_s"],
        repair_bytes_per_s=values["limits", "repair_bytes_per_s"],
        follow_interval_s=values["limits", "follow_interval_s"],
        staleness_max_s=values["limits", "staleness_max_s"],
        backup_pops=values["limits", "backup_pops"],
        nova=NovaSettings(
            workers=values["nova", "workers"],
            worker_threads=values["nova", "worker_threads"],
            transport_url=values["nova", "transport_url"] or f"lucd://{socket}",
            main_database=values["nova", "main_database"],
            api_database=values["nova", "api_database"],
            config_file=values["nova", "config_file"],
            server=values["nova", "server"] or options.host_name(),
        ),
    )
