"""A domain that lost all its disks, begun anew by one new node out of followers' copies (DESIGN section 8).

Of each tablet the copy that covers it furthest is taken, whole: another one might still have what was deleted and
collected since. The registers are put into the new node's file, where nobody sees them until the domain begins its next
generation with them (`Domain.restore`). No accept of an earlier generation is admitted any more; a transaction that saw
an absent group before is not applied to it now, for the floor of every tablet is above all that was promised then.

Members that come back meanwhile are noticed in two ways. The new node may join them while it still fetches: then
nothing more is put into its file, where their tablets are by then. Or the followers hear them, and their copies go on,
or begin again: then what was fetched is of no one moment, and of a domain that is not lost.

A domain that was begun anew may be lost again before anybody has copied all of it. So who keeps copies keeps the one of
the generation before, under a name of its own, until the new one is complete; it is asked for where none is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from dht.domain.asking import Ask, ask_each
from dht.domain.copy import Copy, Coverage
from dht.domain.follower import Follower
from dht.domain.messages import (
    LINKS_PER_PAGE,
    AskCopy,
    AskCopyLinks,
    AskCopyPage,
    CopyCovers,
    DomainMessage,
    Links,
    RegisterCopy,
    Registers,
)
from dht.domain.roster import Roster
from dht.domain.source import REPLY_BYTES_MAX
from dht.errors import Invalid, NotFound, RemoteProtocolError
from dht.model import Ballot, GroupKey, NodeId, Struct
from dht.storage.registers import RegisterFile
from dht.world import Batch, Disk

PAGE_KEYS_MAX: Final = 500
BEFORE: Final = "~before"
"""Behind a domain's name: a copy that another generation has outlived. No PoP has such a character in its name."""
QUESTIONS: Final = (AskCopy, AskCopyLinks, AskCopyPage)
STANDING_S_MAX: Final = 5.0
"""By how much what a copy covers may seem to go on while nobody is there to copy from: a round that was under way ends
late, and the follower's clock is set."""
R = TypeVar("R", bound=Struct)


def hand_over(follower: Follower | None, question: DomainMessage) -> CopyCovers | Links | Registers:
    """What a follower tells a node that restores the domain. Raises NotFound where it has no copy of it."""
    if follower is None or follower.chain.newest is None:
        raise NotFound(f"there is no copy of domain {question.domain} on this node")
    match question:
        case AskCopyLinks():
            return Links(follower.chain.after(question.after, LINKS_PER_PAGE), follower.chain.epoch)
        case AskCopyPage():
            return Registers(tuple(_page(follower.copy, question.tablet, question.after)))
        case _:
            noted, newest = follower.noted(), follower.chain.newest
            if question.domain.endswith(BEFORE):
                return CopyCovers(newest.epoch, noted.generation, noted.wall_s, noted.open)
            if noted.generation < newest.generation:
                noted = Coverage()  # about to begin again, or to be set aside
            return CopyCovers(newest.epoch, newest.generation, noted.wall_s, noted.open)


def _page(copy: Copy, tablet: int, after: GroupKey) -> Iterable[RegisterCopy]:
    size_bytes = 0
    for key in copy.registers.keys(tablet, after, PAGE_KEYS_MAX):
        header = copy.registers.header(key)
        if size_bytes and size_bytes + header.size_bytes > REPLY_BYTES_MAX:
            return
        size_bytes += header.size_bytes
        yield RegisterCopy(key, header, copy.registers.rows(key))


class Restoration:
    """`sources[t]`: whose copy of the tablet is taken; `covered_s[t]`: up to which wall-clock time it covers it.

    `open`: registers that are covered up to an earlier moment, with that. `generation`: of the copies that are taken.
    `heard`: the highest that any copy has heard of, a complete one or not; the one that begins now has to be above.
    `silent`: nodes that did not say whether they have a copy: if one has, it may cover more than those that are taken.
    `before`: copies that a generation has outlived.
    """

    def __init__(
        self,
        domain: str,
        ask: Ask,
        found: dict[NodeId, CopyCovers],
        heard: int = 0,
        silent: Sequence[NodeId] = (),
        before: dict[NodeId, CopyCovers] | None = None,
    ) -> None:
        named = {domain: found, domain + BEFORE: before or {}}
        every = {(node, name): covers for name, of in named.items() for node, covers in of.items()}
        self.generation = max(covers.generation for covers in every.values())
        self.heard = max(heard, self.generation)
        self.silent = tuple(silent)
        self._domain = domain
        self._ask = ask
        self._found = {held: covers for held, covers in every.items() if covers.generation == self.generation}
        tablets = max(len(covers.wall_s) for covers in self._found.values())
        self._taken: list[tuple[NodeId, str]] = []
        self.covered_s: list[float] = []
        for tablet in range(tablets):
            best = max(self._found, key=lambda held: (self._wall_s(held, tablet), held))
            self._taken.append(best)
            self.covered_s.append(self._wall_s(best, tablet))
        self.sources = [node for node, _ in self._taken]
        self.open: dict[GroupKey, float] = {}
        self.registers = 0

    def _wall_s(self, held: tuple[NodeId, str], tablet: int) -> float:
        walls = self._found[held].wall_s
        return walls[tablet] if tablet < len(walls) else 0.0

    async def links(self) -> list[Roster]:
        """The domain's links, from the copy that has the most of them: `heard` may be higher then."""
        node, name = self._longest()
        links: list[Roster] = []
        while True:
            asked = AskCopyLinks(name, links[-1].epoch if links else 0)
            page = _expect(await self._ask(node, asked), Links).links
            links += page
            if len(page) < LINKS_PER_PAGE:
                # One that was outlived knows the link of the generation that did so.
                self.heard = max(self.heard, links[-1].generation if links else 0)
                return links

    def _longest(self) -> tuple[NodeId, str]:
        return max(self._found, key=lambda held: (self._found[held].epoch, held))

    async def fetch(self, file: RegisterFile, disk: Disk, check: Callable[[], None]) -> None:
        """Put all registers into the file, durably. What an earlier attempt left there goes.

        `check`: raises once the file is not to be touched any more; asked before each page. Raises Invalid, too, if the
        copies did not stand still meanwhile.
        """
        for tablet, (node, name) in enumerate(self._taken):
            check()
            for key in file.keys(tablet):
                batch = Batch()
                file.erase(batch, key)
                disk.submit(batch)
            after = b""
            while copies := _expect(await self._ask(node, AskCopyPage(name, tablet, after)), Registers).copies:
                check()
                number = 0
                for copy in copies:
                    batch = Batch()
                    file.replace(batch, copy.key, copy.header, copy.rows)
                    number = disk.submit(batch)
                    self.registers += 1
                await disk.durable(number)
                after = copies[-1].key
            opened = self._found[node, name].open
            self.open.update({key: wall_s for key, wall_s in opened.items() if file.tablet(key) == tablet})
        await self._check_standing()

    async def _check_standing(self) -> None:
        for node, name in dict.fromkeys((*self._taken, self._longest())):
            was, now = self._found[node, name], _expect(await self._ask(node, AskCopy(name)), CopyCovers)
            same = (was.epoch, was.generation, len(was.wall_s)) == (now.epoch, now.generation, len(now.wall_s))
            if not same or any(not 0.0 < b <= a + STANDING_S_MAX for a, b in zip(was.wall_s, now.wall_s, strict=True)):
                raise Invalid(
                    f"the copy of domain {self._domain} at {node.hex()} went on while it was fetched, so nodes of the "
                    "domain are heard there: nothing is lost for good, and nothing was changed; see `lucd pop list`, "
                    "and give the order again if they are gone after all"
                )


async def find_copies(domain: str, ask: Ask, nodes: Sequence[NodeId]) -> Restoration:
    """Ask the nodes what their copies cover, those of a generation before, too.

    Raises Invalid if none has one that was ever complete.
    """
    silent = {(node, name): None for node in nodes for name in (domain, domain + BEFORE)}

    async def heard(node: NodeId, question: DomainMessage) -> Struct:
        try:
            reply = await ask(node, question)
        except NotFound:
            silent.pop((node, question.domain), None)
            raise
        silent.pop((node, question.domain), None)
        return reply

    found, outlived = await asyncio.gather(
        ask_each(heard, nodes, AskCopy(domain), CopyCovers),
        ask_each(heard, nodes, AskCopy(domain + BEFORE), CopyCovers),
    )
    mute = tuple(dict.fromkeys(node for node, _ in silent))
    complete, before = _complete(found), _complete(outlived)
    if not complete and not before:
        raise Invalid(
            f"none of the {len(found)} copies of domain {domain} that were found among {len(nodes)} nodes is complete, "
            f"and {len(mute)} of these nodes do not answer; start the nodes of the PoPs that back it up, and see "
            "`lucd pop list`"
        )
    newest = max((covers.generation for covers in found.values()), default=0)
    return Restoration(domain, ask, complete, newest, mute, before)


def _complete(found: dict[NodeId, CopyCovers]) -> dict[NodeId, CopyCovers]:
    return {node: covers for node, covers in found.items() if covers.wall_s and all(covers.wall_s)}


def floors_after(before: Roster) -> list[Ballot]:
    """Of each tablet, above all that was promised in the generation that ends."""
    floor = Ballot(before.generation, before.epoch + 1, 0, b"", 0, 0)
    return [floor] * len(before.tablets)


def _expect(reply: Struct, kind: type[R]) -> R:
    if not isinstance(reply, kind):
        raise RemoteProtocolError(f"a follower answered with {type(reply).__name__} where {kind.__name__} was due")
    return reply
