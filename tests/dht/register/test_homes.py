"""Homes of databases: what is believed of them, and how they are made, dropped and looked after."""

from __future__ import annotations

import asyncio

import pytest

from dht.errors import Conflict, Invalid, NotFound, StorageError, Unavailable
from dht.model import GLOBAL, LOCAL, Applied, FindQuery, FindResult, GroupRead, PopClaim
from dht.register import homes as homes_module
from dht.register.catalog import no_such_database, shard_home
from dht.register.homes import HomedStore
from dht.register.noted_homes import NotedHomes
from dht.rows import group_key
from dht.storage.memory import MemoryDisk
from tests.dht.register.test_far_store import KEY, WRITE, A, World


class Pop:
    """A PoP's own store: what it has, and the list if it keeps it. `away`: what to raise instead of answering."""

    def __init__(self, *databases, listed=()):
        self.databases = list(databases)
        self.listed = dict(listed)
        self.dropping = set()
        self.away = None
        self.asked = []

    def _serve(self, kind, database=None):
        self.asked.append(kind)
        if self.away is not None:
            raise self.away
        if database is not None and database not in self.databases:
            raise no_such_database(database)

    async def read(self, keys, known=None, timeout_s=None, near=False):
        self._serve("read")
        return tuple(GroupRead(key, None, {}) for key in keys)

    async def find(self, query, timeout_s=None):
        self._serve("find", query.database)
        return FindResult((), ())

    async def commit(self, transaction, attempt=0, timeout_s=None):
        self._serve("commit", transaction.database)
        return Applied(())

    async def list_databases(self, timeout_s=None):
        self._serve("list")
        return tuple(self.databases)

    async def homes(self, timeout_s=None):
        self._serve("homes")
        return {**dict.fromkeys(self.databases, ""), **self.listed}

    async def create_database(self, name, timeout_s=None, home=""):
        self._serve("create")
        if name in self.databases or name in self.listed:
            return False
        if home:
            self.listed[name] = home
        if home in ("", GLOBAL):
            self.databases.append(name)
        return True

    async def pops(self, timeout_s=None):
        self._serve("pops")
        return {pop: PopClaim(A, b"i" * 16, index) for index, pop in enumerate(("lyon", "nice"))}

    async def drop_database(self, name, timeout_s=None, home=None):
        self._serve("drop")
        had = name in self.databases or name in self.listed
        if name in self.dropping:
            self.dropping.remove(name)
            return True
        if home not in (None, self.listed.get(name, "")):
            return False
        self.databases = [other for other in self.databases if other != name]
        self.listed.pop(name, None)
        return had


async def settled(store):
    """Look-ups that are under way have ended."""
    await asyncio.gather(*store._looking)


class Pops:
    """Two PoPs, and `global` with the list; a homed store of any PoP."""

    def __init__(self):
        self.world = World()
        shared = Pop("shared", listed={"d": "lyon", "shared": GLOBAL})
        self.pops = {GLOBAL: shared, "lyon": Pop("d"), "nice": Pop()}

        self.disks = {pop: MemoryDisk() for pop in self.pops}

    def store(self, pop):
        """As a node that starts with what the PoP's last one left in its file."""
        noted = NotedHomes(self.disks[pop])
        return HomedStore(pop, self.world, self.pops[pop], self.pops.__getitem__, lambda: self.pops[GLOBAL], noted)

    def asked(self):
        return {name: pop.asked for name, pop in self.pops.items() if pop.asked}


@pytest.fixture
def pops():
    return Pops()


async def test_database_at_home_asks_no_other_pop(pops):
    store = pops.store("lyon")
    await store.commit(WRITE)
    await store.read([KEY])
    assert pops.asked() == {"lyon": ["list", "commit", "read"]}
    assert store.counters == {"passed_on": 0, "homes_looked_up": 1}


async def test_database_of_another_pop_is_looked_up_once_and_passed_on(pops):
    store = pops.store("nice")
    for _ in range(3):
        await store.find(FindQuery("d", 1, 0))
    assert pops.asked() == {"nice": ["list"], GLOBAL: ["homes"], "lyon": ["find"] * 3}
    assert store.counters["passed_on"] == 3 + 0


async def test_home_is_believed_on_while_the_list_is_out_of_reach(pops):
    store = pops.store("nice")
    await store.commit(WRITE)
    pops.world.now_s += 10 * homes_module.HOMES_KEPT_S
    pops.pops[GLOBAL].away = Unavailable("cut off")
    await store.commit(WRITE)
    await settled(store)
    await store.commit(WRITE)
    assert pops.pops["lyon"].asked == ["commit"] * 3


async def test_no_request_waits_while_a_known_home_is_looked_up_again(pops):
    store = pops.store("lyon")
    await store.commit(WRITE)
    pops.world.now_s += homes_module.HOMES_KEPT_S
    for _ in range(5):
        await store.commit(WRITE)
    assert pops.pops["lyon"].asked == ["list", *["commit"] * 6]
    await settled(store)
    assert pops.pops["lyon"].asked == ["list", *["commit"] * 6, "list"], "once, for all of them"


async def test_home_that_moved_is_learned_even_if_nobody_refuses(pops):
    store = pops.store("lyon")
    await store.read([KEY])
    pops.pops["lyon"].databases.remove("d")
    pops.pops["nice"].databases.append("d")
    pops.pops[GLOBAL].listed["d"] = "nice"
    pops.world.now_s += homes_module.HOMES_KEPT_S
    await store.read([KEY])
    await settled(store)
    await store.read([KEY])
    assert pops.pops["nice"].asked == ["read"]


@pytest.fixture
async def restarted(pops):
    """The store of a node of nice that read the list before it was started again, out of reach of the list."""
    await pops.store("nice").homes()
    pops.pops[GLOBAL].away = Unavailable("cut off")
    return pops.store("nice")


async def test_home_that_was_noted_is_believed_by_a_node_that_starts_out_of_reach_of_the_list(pops, restarted):
    assert await asyncio.gather(restarted.home("shared"), restarted.home("shared")) == [GLOBAL, GLOBAL]
    await restarted.commit(WRITE)
    assert pops.pops["lyon"].asked == ["commit"]


async def test_home_that_was_noted_is_believed_where_the_list_does_not_answer_in_time(pops, restarted, monkeypatch):
    monkeypatch.setattr(homes_module, "NOTED_AFTER_S", 0.01)
    restarted._registry = Silent
    assert await asyncio.wait_for(restarted.home("d"), 5.0) == "lyon"
    await restarted.stop()


class Silent:
    async def homes(self, timeout_s=None):
        await asyncio.Event().wait()

    async def list_databases(self, timeout_s=None):
        await asyncio.Event().wait()


class Late:
    async def list_databases(self, timeout_s=None):
        await asyncio.sleep(0.05)
        return ("d",)

    async def homes(self, timeout_s=None):
        return {"d": ""}


async def test_home_that_was_noted_wrongly_is_not_believed_where_the_list_answers(pops, restarted):
    pops.pops[GLOBAL].away = None
    pops.pops[GLOBAL].listed["d"] = "nice"
    del pops.pops[GLOBAL].listed["shared"], pops.pops[GLOBAL].databases[:]
    pops.pops["nice"].databases.append("d")
    assert await restarted.home("d") == "nice"
    with pytest.raises(NotFound):
        await restarted.home("shared")
    pops.pops[GLOBAL].away = Unavailable("cut off again")
    with pytest.raises(Unavailable):
        await restarted.home("shared")
    assert pops.store("nice")._listed == {"d": "nice"}, "the file follows the list"


async def test_home_that_was_noted_wrongly_is_looked_up_again_beside_the_second_request(pops, restarted):
    assert await restarted.home("d") == "lyon"
    pops.pops[GLOBAL].away = None
    pops.pops[GLOBAL].listed["d"] = GLOBAL
    assert await restarted.home("d") == "lyon"
    await settled(restarted)
    assert await restarted.home("d") == GLOBAL


async def test_home_that_was_listed_once_is_believed_by_a_node_that_never_asked_for_it_before_the_cut(pops):
    store = pops.store("nice")
    await store.homes()
    pops.pops[GLOBAL].away = Unavailable("cut off")
    assert await store.home("shared") == GLOBAL
    await store.commit(WRITE)
    assert pops.pops["lyon"].asked == ["commit"]


async def test_database_of_many_pops_is_known_by_its_shard_to_a_node_that_joins_a_pop_which_is_cut_off(pops):
    pops.pops["nice"].listed["shared"] = shard_home(b"mark")
    pops.pops[GLOBAL].away = Unavailable("cut off")
    store = pops.store("nice")
    assert await store.home("shared") == GLOBAL
    with pytest.raises(Unavailable, match="cut off"):
        await store.home("d")
    pops.pops[GLOBAL].away = None
    pops.pops[GLOBAL].listed["shared"] = LOCAL
    await store.home("shared")
    await settled(store)
    assert await store.home("shared") == LOCAL


async def test_shard_that_a_drop_left_behind_is_not_believed_by_a_node_that_knows_the_home(pops):
    store = pops.store("nice")
    assert await store.home("d") == "lyon"
    pops.pops["nice"].listed["d"] = shard_home(b"an earlier one")
    pops.pops[GLOBAL].away = Unavailable("cut off")
    for _ in range(2):
        pops.world.now_s += homes_module.HOMES_KEPT_S
        assert await store.home("d") == "lyon"
        await settled(store)


async def test_home_that_the_list_had_no_more_when_it_was_read_last_is_not_believed(pops):
    store = pops.store("nice")
    await store.homes()
    del pops.pops[GLOBAL].listed["d"]
    await store.homes()
    pops.pops[GLOBAL].away = Unavailable("cut off")
    with pytest.raises(Unavailable, match="cut off"):
        await store.home("d")


async def test_note_that_its_home_refuted_is_no_word_for_not_found_without_the_list(pops, restarted):
    pops.pops["lyon"].databases.remove("d")
    with pytest.raises(Unavailable, match="cut off"):
        await restarted.commit(WRITE)


async def test_notes_outlive_neither_the_database_nor_a_disk_that_failed(pops):
    await pops.store("nice").homes()
    del pops.pops[GLOBAL].listed["d"]
    disk = pops.disks["nice"]
    noted = NotedHomes(disk)

    def fail(batch):
        raise StorageError("full")

    submit, disk.submit = disk.submit, fail
    noted.follow({})
    assert noted.all() == NotedHomes(disk).all() == {"d": "lyon", "shared": GLOBAL}
    disk.submit = submit
    noted.follow({"shared": GLOBAL})
    assert noted.all() == NotedHomes(disk).all() == {"shared": GLOBAL}


async def test_database_unknown_here_is_unavailable_not_missing_while_the_list_is_out_of_reach(pops):
    pops.pops[GLOBAL].away = Unavailable("cut off")
    store = pops.store("nice")
    for ask in (store.commit(WRITE), store.read([KEY]), store.find(FindQuery("d", 1, 0))):
        with pytest.raises(Unavailable):
            await ask


async def test_database_that_no_list_has_is_not_found(pops):
    with pytest.raises(NotFound, match="no database 'x'"):
        await pops.store("nice").find(FindQuery("x", 1, 0))


async def test_database_that_moved_is_found_at_its_new_home(pops):
    store = pops.store("nice")
    await store.commit(WRITE)
    pops.pops["lyon"].databases.remove("d")
    pops.pops[GLOBAL].databases.append("d")
    pops.pops[GLOBAL].listed["d"] = GLOBAL
    await store.commit(WRITE)
    assert pops.pops[GLOBAL].asked[-1] == "commit"


async def test_home_that_lost_the_database_says_not_found(pops):
    store = pops.store("nice")
    await store.commit(WRITE)
    pops.pops["lyon"].databases.remove("d")
    with pytest.raises(NotFound):
        await store.commit(WRITE)


async def test_creation_takes_the_name_first_and_what_broke_off_is_finished(pops):
    store = pops.store("nice")
    pops.pops["lyon"].away = Unavailable("cut off")
    with pytest.raises(Unavailable):
        await store.create_database("new", home="lyon")
    assert pops.pops[GLOBAL].listed["new"] == "lyon"
    with pytest.raises(Conflict, match="in PoP lyon"):
        await store.create_database("new", home="nice")
    with pytest.raises(Conflict, match="in PoP lyon"):
        await store.create_database("new", home=GLOBAL)
    pops.pops["lyon"].away = None
    assert await store.create_database("new") is True
    assert "new" in pops.pops["lyon"].databases


async def test_creation_whose_home_is_out_of_reach_says_that_the_name_is_taken_and_how_to_go_on(pops):
    pops.pops["lyon"].away = Unavailable("cut off")
    store = pops.store("nice")
    with pytest.raises(Unavailable, match="has its name in the list, but is not in PoP lyon yet: cut off; create it"):
        await store.create_database("new", home="lyon")
    assert (await store.homes())["new"] == "lyon"
    pops.pops["lyon"].away = None
    assert await store.create_database("new", home="lyon") is True


async def test_database_of_domain_global_is_created_used_and_dropped_there_alone(pops):
    store = pops.store("nice")
    assert await store.create_database("new", home=GLOBAL) is True
    assert await store.create_database("new") is False
    await store.find(FindQuery("new", 1, 0))
    assert (await store.homes())["new"] == await store.home("new") == GLOBAL
    assert await store.drop_database("new") is True
    assert pops.pops["nice"].databases == []
    assert pops.pops["lyon"].asked == []
    with pytest.raises(NotFound):
        await store.find(FindQuery("new", 1, 0))


async def test_home_that_is_no_pop_is_refused_before_the_name_is_taken(pops):
    with pytest.raises(NotFound, match="no PoP metz"):
        await pops.store("nice").create_database("new", home="metz")
    assert "new" not in pops.pops[GLOBAL].listed


async def test_own_database_is_served_while_domain_global_is_out_of_reach(pops):
    pops.pops[GLOBAL].away = Unavailable("cut off")
    await pops.store("lyon").commit(WRITE)
    assert pops.pops["lyon"].asked == ["list", "commit"]


async def test_database_of_another_pop_is_served_while_the_own_pop_has_no_majority(pops):
    pops.pops["nice"].away = Unavailable("no majority")
    store = pops.store("nice")
    await store.commit(WRITE)
    assert await store.home("shared") == GLOBAL
    assert pops.pops["lyon"].asked == ["commit"]


async def test_database_of_another_pop_is_served_while_the_own_pop_does_not_answer(pops, monkeypatch):
    monkeypatch.setattr(homes_module, "OWN_FIRST_S", 0.01)
    store = pops.store("nice")
    store._own = Silent()
    await asyncio.wait_for(store.commit(WRITE), 5.0)
    assert pops.pops["lyon"].asked == ["commit"]


@pytest.mark.parametrize("database", ["d", "nowhere"])
async def test_database_is_unavailable_not_missing_where_only_the_own_pop_could_say_that_it_is_nowhere(pops, database):
    """A list that was recovered may have lost what lives there."""
    del pops.pops[GLOBAL].listed["d"]
    pops.pops["lyon"].away = Unavailable("no majority")
    store = pops.store("lyon")
    with pytest.raises(Unavailable, match="no majority"):
        await store.home(database)


async def test_own_database_is_found_where_the_own_pop_is_slow_and_the_list_out_of_reach(pops, monkeypatch):
    monkeypatch.setattr(homes_module, "OWN_FIRST_S", 0.01)
    pops.pops[GLOBAL].away = Unavailable("cut off")
    store = pops.store("lyon")
    store._own = Late()
    assert await store.home("d") == "lyon"
    with pytest.raises(Unavailable, match="cut off"):
        await store.home("shared")


async def test_database_that_the_list_lost_is_entered_again_by_its_home(pops):
    del pops.pops[GLOBAL].listed["d"]
    with pytest.raises(NotFound):
        await pops.store("nice").find(FindQuery("d", 1, 0))
    assert await pops.store("lyon").relist() == ("d",)
    assert await pops.store("lyon").relist() == ()
    await pops.store("nice").find(FindQuery("d", 1, 0))


async def test_database_that_is_dropped_while_the_lists_are_compared_stays_dropped(pops):
    store = pops.store("lyon")
    names = pops.pops["lyon"].homes

    async def dropped_before(timeout_s=None):
        assert await pops.store("nice").drop_database("d") is True
        return await names(timeout_s)

    pops.pops["lyon"].homes = dropped_before
    assert await store.relist() == ()
    assert "d" not in pops.pops[GLOBAL].listed


async def test_shard_of_a_database_that_is_in_no_list_is_told_and_dropped_by_order(pops):
    own, store = pops.pops["nice"], pops.store("nice")
    own.listed = {"left": "~6d61726b", "shared": "~6d61726c"}
    assert await store.left_behind() == ("left",)
    assert await pops.store("lyon").left_behind() == ()
    assert await pops.store("lyon").drop_database("left") is False
    assert await store.drop_database("left") is True
    assert own.listed == {"shared": "~6d61726c"}
    assert await store.left_behind() == ()
    assert await store.drop_database("left") is False


async def test_shard_of_a_database_that_is_made_while_shards_are_looked_for_is_not_left_behind(pops):
    own, store = pops.pops["nice"], pops.store("nice")
    names = own.homes

    async def made_after(timeout_s=None):
        found = await names(timeout_s)
        await pops.store("lyon").create_database("new", home=GLOBAL)
        own.listed["new"] = "~6d61726b"
        return found

    own.homes = made_after
    assert await store.left_behind() == ()
    own.homes = names
    assert await store.left_behind() == ()


async def test_drop_that_broke_off_is_finished_by_the_next(pops):
    store = pops.store("nice")
    pops.pops["lyon"].databases.remove("d")
    assert await store.drop_database("d") is True
    assert "d" not in pops.pops[GLOBAL].listed
    assert await store.drop_database("d") is False


async def test_drop_that_broke_off_in_the_list_is_finished_by_the_next(pops):
    """The list has the name as being dropped, and tells nobody of it."""
    store, list_of = pops.store("nice"), pops.pops[GLOBAL]
    list_of.dropping.add("half")
    with pytest.raises(NotFound):
        await store.find(FindQuery("half", 1, 0))
    assert await store.drop_database("half") is True
    assert await store.drop_database("half") is False
    assert list_of.dropping == set()


async def test_drop_of_a_database_with_another_home_drops_nothing(pops):
    store = pops.store("nice")
    assert await store.drop_database("d", home="nice") is False
    assert pops.pops["lyon"].databases == ["d"]
    assert await store.drop_database("d", home="lyon") is True


async def test_groups_of_two_databases_in_one_read_are_refused(pops):
    with pytest.raises(Invalid, match="different databases"):
        await pops.store("lyon").read([KEY, group_key("shared", "f", (1,))])


async def test_many_databases_do_not_fill_the_memory(pops, monkeypatch):
    monkeypatch.setattr(homes_module, "HOMES_MAX", 8)
    pops.pops["lyon"].databases = [f"d{n}" for n in range(50)]
    store = pops.store("lyon")
    await asyncio.gather(*(store.find(FindQuery(f"d{n}", 1, 0)) for n in range(50)))
    for n in range(50):
        await store.read([group_key(f"d{n}", "f", (1,))])
    assert len(store._homes) <= 8
    assert len(store._names) <= 9
