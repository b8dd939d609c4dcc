"""What counts as the same answer of two control planes."""

from __future__ import annotations

import hashlib
from unittest.mock import Mock

from tests.control_plane.operations import Answer, Recorder, differences


def answer(body: object) -> list[Answer]:
    recorder = Recorder(Mock(ask=lambda method, path, body: (200, body)))
    recorder.do("show", "GET", "/", body)
    return recorder.answers


def host_id(host: str) -> str:
    return hashlib.sha224(host.encode()).hexdigest()


def test_answers_with_another_host_and_its_host_id_are_the_same() -> None:
    here = {"server": {"host": "compute-1", "hostId": host_id("compute-1"), "id": "0" * 32}}
    there = {"server": {"host": "compute-2", "hostId": host_id("compute-2"), "id": "1" * 32}}
    assert differences(answer(here), answer(there)) == []


def test_answers_with_and_without_a_host_differ_and_say_where() -> None:
    here = {"server": {"host": "compute-1", "hostId": host_id("compute-1")}}
    there = {"server": {"host": None, "hostId": ""}}
    assert differences(answer(here), answer(there)) == [
        "show: /body/server/host is 'varies' here, None there",
        "show: /body/server/hostId is 'varies' here, '' there",
    ]


def test_answers_that_name_one_thing_twice_differ_from_two_things() -> None:
    assert differences(answer(["a" * 32, "a" * 32]), answer(["a" * 32, "b" * 32])) == [
        "show: /body/1 is 'thing 1' here, 'thing 2' there"
    ]
