"""The command `lucd-status upgrade check`, as nova-status has it: may a node of this PoP be upgraded now?

Exit code 0 yes, 1 yes with something to look at, 2 no. Asks the daemon of this host; changes nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from oslo_config import cfg
from oslo_upgradecheck.upgradecheck import Code, Result, UpgradeCommands
from oslo_upgradecheck.upgradecheck import main as run

from dht.codec import Message
from dht.errors import DhtError, Invalid, RemoteProtocolError
from dht.wire.blocking import BlockingClient
from lucd import messages, version
from lucd.cli.output import fail
from lucd.conf import options

ASK_TIMEOUT_S = 10.0


class ReadyToUpgrade(UpgradeCommands):
    """Nodes are upgraded one at a time, so everything has to bear the loss of the one that is stopped."""

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        super().__init__()
        self._conf = conf

    def _ask(self, question: Message) -> Message:
        client = BlockingClient(str(self._conf.socket), ASK_TIMEOUT_S)
        try:
            return client.call(question, repeatable=True, connect_wait_s=1.0)
        finally:
            client.close()

    def _status(self) -> messages.StatusReply:
        reply = self._ask(messages.AskStatus())
        if not isinstance(reply, messages.StatusReply):
            raise RemoteProtocolError(f"the daemon replied {type(reply).__name__} to a question for its status")
        return reply

    def _check_daemon(self) -> Result:
        try:
            status = self._status()
        except DhtError as error:
            return Result(Code.FAILURE, error.message)
        if not status.ready:
            return Result(Code.FAILURE, f"the daemon of this host is {status.state}: wait until /readyz answers 200")
        if status.version != version():
            return Result(
                Code.WARNING,
                f"the daemon runs {status.version}, installed is {version()}: it is not restarted since the upgrade",
            )
        return Result(Code.SUCCESS)

    def _check_domain(self) -> Result:
        try:
            reply = self._ask(messages.AskDomain())
        except DhtError as error:
            return Result(Code.FAILURE, error.message)
        if not isinstance(reply, messages.DomainReply) or reply.state != "healthy":
            state = reply.state if isinstance(reply, messages.DomainReply) else "unknown"
            return Result(
                Code.FAILURE,
                f"the domain is {state}: a node that is stopped now may be one too many; `lucd domain show` tells what "
                "is missing",
            )
        if "node" not in reply.survivable:
            return Result(
                Code.WARNING,
                "not every tablet survives the loss of a node: some stand still while the node that has them restarts",
            )
        return Result(Code.SUCCESS)

    def _check_global(self) -> Result:
        """Its other replicas are in other PoPs, whose nodes this PoP's domain does not speak of."""
        try:
            shared = self._status().global_domain
        except DhtError as error:
            return Result(Code.FAILURE, error.message)
        missing = shared.tablets.get("degraded", 0) + shared.tablets.get("unavailable", 0)
        if shared.joined and missing:
            return Result(
                Code.WARNING,
                f"{missing} tablets of domain global lack a replica: those of which this node keeps another stand "
                "still while it restarts; `lucd domain show global` tells what is missing",
            )
        return Result(Code.SUCCESS)

    def _check_copies(self) -> Result:
        try:
            status = self._status()
        except DhtError as error:
            return Result(Code.FAILURE, error.message)
        if to_copy := status.to_copy + status.global_domain.to_copy:
            return Result(Code.FAILURE, f"{to_copy} groups are still to be copied to this node: wait for them")
        return Result(Code.WARNING, "; ".join(status.warnings)) if status.warnings else Result(Code.SUCCESS)

    _upgrade_checks = (
        ("Daemon of this host", _check_daemon),
        ("Health of the domain", _check_domain),
        ("Health of domain global", _check_global),
        ("Copies and warnings", _check_copies),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`[--config-file FILE] upgrade check`; returns the exit code. LUCD_CONFIG names a file, too, as for `lucd`."""
    conf = cfg.ConfigOpts()
    options.register(conf)
    argv = list(sys.argv[1:] if arguments is None else arguments)
    named = os.environ.get("LUCD_CONFIG")
    try:
        return int(run(conf, "lucd", ReadyToUpgrade(conf), argv, [named] if named else None))
    except cfg.Error as error:
        return fail(Invalid(f"the configuration cannot be read: {error}"))


if __name__ == "__main__":
    sys.exit(main())
