"""Pending: a range is what a sorted dictionary would give, whatever was put, forgotten and put again since the last."""

from __future__ import annotations

import random

import pytest

from dht.storage import pending
from dht.storage.pending import Pending


def in_range(model: dict[bytes, tuple[int, bytes | None]], low: bytes, high: bytes | None) -> list[bytes]:
    return sorted(key for key in model if low <= key and (high is None or key < high))


@pytest.mark.parametrize("slack", [0, 1024])
@pytest.mark.parametrize("seed", range(5))
def test_range_is_that_of_a_sorted_dictionary(seed: int, slack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "_SLACK_KEYS", slack)
    chance = random.Random(seed)
    here, model = Pending(), {}
    for number in range(1, 2_000):
        key = bytes([chance.randrange(40)])
        what = chance.random()
        if what < 0.45:
            value = None if chance.random() < 0.2 else bytes([number % 256])
            here.put(key, number, value)
            model[key] = number, value
        elif what < 0.9:
            wanted = model[key][0] if key in model and chance.random() < 0.9 else number - 1
            here.forget(key, wanted)
            if key in model and model[key][0] == wanted:
                del model[key]
        else:
            low, high = bytes([chance.randrange(40)]), None if chance.random() < 0.3 else bytes([chance.randrange(40)])
            keys = in_range(model, low, high)
            assert here.range(low, high, reverse=False) == [(key, model[key][1]) for key in keys]
            assert here.range(low, high, reverse=True) == [(key, model[key][1]) for key in reversed(keys)]
        assert here.get(key) == model.get(key)
        assert len(here) == len(model)


def test_keys_that_no_range_asks_for_leave_nothing_behind() -> None:
    here = Pending()
    here.put(b"stays", 1, b"")
    for number in range(2, 20_000):
        here.put(number.to_bytes(4, "big"), number, b"")
        here.forget(number.to_bytes(4, "big"), number)
    assert len(here._fresh) < 5_000
    assert here.range(b"", None, reverse=False) == [(b"stays", b"")]
    assert len(here._ordered) == 1
