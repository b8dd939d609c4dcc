"""A short run of `make fuzz`'s messages with senseless values."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import pytest

from tests.faults import fuzzed_bus, fuzzed_requests


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_messages_with_senseless_values_are_answered_or_refused_and_lose_nothing() -> None:
    seed = random.SystemRandom().randrange(10**6)
    totals = fuzzed_requests.play(fuzzed_requests.Target, seed, 0, 4000)
    answered = sum(times for kind, times in totals.items() if kind != "no message")
    assert answered > 500, f"seed {seed}"


def test_bus_messages_with_senseless_values_are_answered_or_refused_and_nothing_is_kept_of_them() -> None:
    seed = random.SystemRandom().randrange(10**6)
    totals = fuzzed_requests.play(fuzzed_bus.Target, seed, 0, 1000)
    answered = sum(times for kind, times in totals.items() if kind != "no message")
    assert answered > 300, f"seed {seed}"
