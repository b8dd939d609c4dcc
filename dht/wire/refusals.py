"""What the log says of those that are refused at the links' port: one line for each host and reason in a minute.

Who is refused comes again and again, every half second where it is a daemon; how often, the counters say.
"""

from __future__ import annotations

import asyncio
import logging

from dht.errors import RemoteProtocolError

AGAIN_AFTER_S = 60.0
LINES_MAX = 100
"""In that time, of all hosts together."""
SEEN_TO = frozenset({"link_tls", "channel", "wrong_key", "signature", "other_cluster", "boot", "version"})
"""Reasons of a refusal that do not go away by themselves: an operator, or somebody on the way, made a node so."""
UNTOLD = frozenset({"ended"})

log = logging.getLogger(__name__)


class Refusals:
    """Those that this node has told lately."""

    def __init__(self) -> None:
        self._told_s: dict[tuple[str, str], float] = {}

    def tell(self, whom: str, error: RemoteProtocolError) -> None:
        """`whom`: as the log is to name it, a host or a node at its address."""
        reason = str(error.detail.get("reason", ""))
        their = str(error.detail.get("their_reason", reason))
        if reason not in UNTOLD and self._is_news(whom, reason):
            level = logging.WARNING if their in SEEN_TO else logging.INFO
            log.log(level, "no link with %s: %s", whom, _in_one_line(error.message))

    def _is_news(self, whom: str, reason: str) -> bool:
        now_s = asyncio.get_running_loop().time()
        self._told_s = {key: told_s for key, told_s in self._told_s.items() if now_s - told_s < AGAIN_AFTER_S}
        if (whom, reason) in self._told_s or len(self._told_s) >= LINES_MAX:
            return False
        self._told_s[whom, reason] = now_s
        return True


def _in_one_line(text: str) -> str:
    """Some of it may be the other end's words, of whom nothing is known."""
    return "".join(character if character.isprintable() else "?" for character in text)
