"""TLS between real daemons: it is there without being asked for, and nodes that differ in `link_tls` say so."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from lucd.demo.daemons import HOST, LocalNode
from tests.cluster import Cluster
from tests.laboratory import wait_until

pytestmark = pytest.mark.cluster


def certificate(node: LocalNode) -> str:
    return ssl.get_server_certificate((HOST, node.port), timeout=10)


def test_link_port_of_a_daemon_is_tls_with_a_certificate_of_each_start_and_none_on_its_disk(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=1) as cluster:
        (node,) = cluster.nodes
        first = certificate(node)
        assert certificate(node) == first
        node.stop()
        node.start()
        assert certificate(node) != first
        files = [file.read_bytes() for file in node.path.rglob("*") if file.is_file()]
        assert not any(b"PRIVATE KEY" in content or b"CERTIFICATE" in content for content in files)


@pytest.mark.parametrize("first", ["true", "false"])
def test_daemon_of_another_link_tls_joins_when_it_is_corrected_and_until_then_both_logs_say_why(
    tmp_path: Path, first: str
) -> None:
    def told(node: LocalNode, begin: str) -> bool:
        return all(words in node.log_text() for words in (begin, "set link_tls alike on all nodes"))

    with Cluster(tmp_path, nodes=1, options=f"link_tls = {first}\n") as cluster:
        node, other = cluster.nodes[0], cluster.add()
        other.options = f"link_tls = {'false' if first == 'true' else 'true'}\n"
        other.write_config()
        other.start(wait_ready=False)
        begins = f"no link with {HOST}: it ", f"cannot join yet, trying again every 2.0 s: {node.address}: it"
        wait_until(
            lambda: told(node, begins[0]) and told(other, begins[1]),
            60.0,
            "one of the two does not say why they have no link",
        )
        assert node.get("/readyz")[0] == 200
        assert node.status()["counters"]["links"]["refused"] > 0
        other.stop()
        other.options = node.options
        other.write_config()
        other.start()
        cluster.wait_whole()
        unencrypted = "links to the other nodes are not encrypted" in node.log_text()
        assert unencrypted == (first == "false")
