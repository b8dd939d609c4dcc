"""Races of Nova's API, conductor and Placement, each on a daemon of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lucd.demo.processes import Program
from tests.cluster import Cluster
from tests.placement import Placement

pytestmark = [pytest.mark.cluster, pytest.mark.nova]
ROUNDS = int(os.environ.get("LUCD_CLAIM_ROUNDS", "1"))
CLAIMS, ROOM = 64, 10
AHEAD_S = 0.05
MEETINGS_TRIED_MAX = 400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("claims"), nodes=3) as started:
        yield started


@pytest.fixture
def placements(cluster: Cluster, tmp_path: Path) -> Iterator[list[Placement]]:
    # Sixty-four claims at once wait for each other, on a loaded machine for longer than a request usually may.
    started = [Placement(tmp_path / str(node), f"{cluster.url('placement', node)}&timeout=60") for node in range(3)]
    started[0].sync()
    for one in started:
        one.program.start()
    try:
        for one in started:
            one.wait()
        yield started
    finally:
        for one in started:
            one.program.stop()


def test_claims_of_three_daemons_on_one_provider_exactly_those_that_fit_succeed(placements: list[Placement]) -> None:
    first = placements[0]
    for number in range(ROUNDS):
        provider = str(uuid.uuid4())
        assert first.ask("POST", "/resource_providers", {"name": provider, "uuid": provider})[0] == 200
        room = {"resource_provider_generation": 0, "inventories": {"VCPU": {"total": ROOM}}}
        assert first.ask("PUT", f"/resource_providers/{provider}/inventories", room)[0] == 200
        with ThreadPoolExecutor(CLAIMS) as pool:
            claims = [pool.submit(placements[claim % 3].claim, provider) for claim in range(CLAIMS)]
        answers = Counter(claim.result() for claim in claims)
        assert answers == {"claimed": ROOM, "full": CLAIMS - ROOM}, (number, answers)
        for one in placements:
            usages = one.ask("GET", f"/resource_providers/{provider}/usages")[1]
            assert usages["usages"] == {"VCPU": ROOM}, number


def test_claims_of_one_consumer_with_one_generation_exactly_one_succeeds(placements: list[Placement]) -> None:
    first = placements[0]
    providers = [str(uuid.uuid4()) for _ in placements]
    for provider in providers:
        assert first.ask("POST", "/resource_providers", {"name": provider, "uuid": provider})[0] == 200
        room = {"resource_provider_generation": 0, "inventories": {"VCPU": {"total": ROOM}}}
        assert first.ask("PUT", f"/resource_providers/{provider}/inventories", room)[0] == 200
    consumer = f"/allocations/{uuid.uuid4()}"

    def put(number: int, generation: int | None) -> int:
        body = {
            "allocations": {providers[number]: {"resources": {"VCPU": 1}}},
            "project_id": f"project-{number}",
            "user_id": "user",
            "consumer_generation": generation,
        }
        return placements[number].ask("PUT", consumer, body)[0]

    assert put(0, None) == 204
    for number in range(10 * ROUNDS):
        generation = first.ask("GET", consumer)[1]["consumer_generation"]
        with ThreadPoolExecutor(3) as pool:
            puts = [pool.submit(put, node, generation) for node in range(3)]
        answers = [one.result() for one in puts]
        assert sorted(answers) == [204, 409, 409], (number, answers)
        found = first.ask("GET", consumer)[1]
        winner = answers.index(204)
        assert list(found["allocations"]) == [providers[winner]], (number, answers)
        assert found["project_id"] == f"project-{winner}", (number, answers)


class Destroyer:
    """`tests.races.destroyer` as a process."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.races.destroyer", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        assert self._process.stdout is not None
        return str(json.loads(self._process.stdout.readline()))

    def order(self, **what: object) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def test_build_request_destroyed_by_api_and_conductor_at_once_one_is_told_not_found(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = tmp_path / "nova.conf"
    config.write_text(f"[api_database]\nconnection = {cluster.url('nova_api', 0)}\n")
    manage = Program("nova.cmd.manage", ["--config-file", str(config), "api_db", "sync"], tmp_path / "log")
    manage.start()
    manage.finish(120)
    both = [Destroyer(cluster.url("nova_api", node)) for node in (0, 1)]
    try:
        assert [one.answer() for one in both] == ["ready", "ready"]

        def met() -> bool:
            return sum(int(one.order(reruns=True)) for one in both) > 0

        for number in range(MEETINGS_TRIED_MAX * ROUNDS):
            if number >= 40 * ROUNDS and met():
                break
            instance = str(uuid.uuid4())
            assert both[number % 2].order(make=instance) == "made"
            at = time.monotonic() + AHEAD_S
            with ThreadPoolExecutor(2) as pool:
                orders = [pool.submit(one.order, destroy=instance, at=at) for one in both]
            told = [order.result() for order in orders]
            assert sorted(told) == ["destroyed", "not found"], (number, told)
        assert met(), "they never met: nothing was tested"
    finally:
        for one in both:
            one.stop()
