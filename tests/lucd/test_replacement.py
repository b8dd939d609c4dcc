"""A node whose disk is gone is replaced by a new one, and nothing is lost while a majority remains."""

from __future__ import annotations

import shutil

import pytest

from tests.cluster import Cluster
from tests.join.run import fill
from tests.lucd.test_one_daemon import inserted, text_of
from tests.lucd.test_repair import watch
from tests.lucd.test_three_daemons import eventually

pytestmark = pytest.mark.cluster
GROUPS = 1000


def test_wiped_node_joins_as_a_new_one_and_takes_the_lost_ones_place(tmp_path_factory: pytest.TempPathFactory) -> None:
    options = "[limits]\nremove_after_s = 10\ncopy_bytes_per_s = 500000\n"
    with Cluster(tmp_path_factory.mktemp("replacement"), nodes=3, options=options) as cluster:
        first, second, third = cluster.nodes
        first.store().create_database("d")
        for number in range(5000, 5050):
            first.store().commit(inserted(number, "kept"))
        fill([first, second, third], GROUPS)
        lost = third.status()["node_id"]
        third.kill()
        shutil.rmtree(third.data_dir)
        third.make_directory(cluster.cluster)
        third.start(wait_ready=False)
        eventually(lambda: third.status().get("node_id", lost) != lost)
        assert max(watch(first, third.status()["node_id"])) > 10
        first.store().commit(inserted(5060, "meanwhile"))

        def replaced() -> bool:
            status = first.status()
            return bool(status["members"] == 3 and status["tablets"]["whole"] == sum(status["tablets"].values()))

        eventually(replaced, 60.0)
        cluster.wait_whole()
        assert first.status()["survivable"] == ["node", "failure_domain"]
        second.kill()
        assert [text_of(third.store(), number) for number in range(5000, 5050)] == ["kept"] * 50
        assert text_of(third.store(), 5060) == "meanwhile"
        third.store().commit(inserted(5061, "with two"))
