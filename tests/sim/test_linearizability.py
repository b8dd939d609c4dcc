import random
import time

import pytest

from dht.sim.linearizability import Interval, Undecided, check


def read(call: int, ret: int, value: int) -> Interval:
    return Interval(call, ret, lambda state: state if state == value else None, f"read {value}")


def write(call: int, ret: int | None, value: int) -> Interval:
    return Interval(call, ret, lambda state: value, f"write {value}")


def swap(call: int, ret: int | None, old: int, new: int, done: bool = True) -> Interval:
    if not done:
        return Interval(call, ret, lambda state: state if state != old else None, f"swap {old} {new} refused")
    return Interval(call, ret, lambda state: new if state == old else None, f"swap {old} {new}")


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([], id="empty"),
        pytest.param([write(1, 2, 7), read(3, 4, 7)], id="sequential"),
        pytest.param([write(1, 10, 7), read(2, 3, 0), read(4, 5, 7)], id="overlap, either side"),
        pytest.param([swap(1, 8, 0, 1), swap(2, 9, 1, 2), read(10, 11, 2)], id="two swaps in one order"),
        pytest.param([swap(1, 4, 0, 1), swap(2, 5, 0, 2, done=False), read(6, 7, 1)], id="one swap refused"),
        pytest.param([write(1, None, 7), read(2, 3, 0), read(8, 9, 7)], id="unknown write lands late"),
        pytest.param([write(1, None, 7), read(2, 3, 0), read(8, 9, 0)], id="unknown write never lands"),
        pytest.param([swap(1, None, 5, 6), write(2, 3, 5), read(4, 5, 6)], id="unknown swap lands after its base"),
    ],
)
def test_good_history_has_an_order(history: list[Interval]) -> None:
    assert check(history, 0) is None


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([write(1, 2, 7), read(3, 4, 0)], id="stale read"),
        pytest.param([write(1, 10, 7), read(2, 3, 7), read(4, 5, 0)], id="read goes back"),
        pytest.param([swap(1, 8, 0, 1), swap(2, 9, 0, 2)], id="both swaps won"),
        pytest.param([swap(1, 2, 0, 1), read(3, 4, 1), swap(5, 6, 1, 2, done=False)], id="refused without reason"),
        pytest.param([write(5, None, 7), read(1, 2, 7)], id="seen before it was asked"),
        pytest.param([write(1, None, 7), read(2, 3, 7), read(4, 5, 0)], id="unknown write taken back"),
        pytest.param([write(1, 2, 1), write(3, 4, 2), read(5, 6, 1)], id="lost update"),
    ],
)
def test_bad_history_is_refused_and_names_an_operation(history: list[Interval]) -> None:
    stuck = check(history, 0)
    assert stuck
    assert all(isinstance(operation.label, str) for operation in stuck)


def _random_history(seed: int, operations: int, clients: int) -> list[Interval]:
    chance = random.Random(seed)
    free = [0.0] * clients
    points = []
    for _ in range(operations):
        client = chance.randrange(clients)
        call = free[client] + chance.random()
        point = call + 2 * chance.random()
        free[client] = ret = point + chance.random()
        points.append((point, call, ret))
    out, state = [], 0
    for _, call, ret in sorted(points):
        a, b = int(call * 1e9), int(ret * 1e9)
        old, new = state if chance.random() < 0.7 else chance.randrange(50), chance.randrange(50)
        if chance.random() < 0.4:
            out.append(read(a, b, state))
        elif old == state:
            out.append(swap(a, b, old, new))
            state = new
        else:
            out.append(swap(a, b, old, new, done=False))
    return out


def test_long_history_of_many_clients_is_decided_fast() -> None:
    started = time.process_time()
    history = _random_history(1, 1000, 10)
    assert check(history, 0) is None
    history[500] = read(history[500].call, history[500].ret or 0, 77)
    assert check(history, 0)
    assert time.process_time() - started < 10


def test_too_entangled_history_is_undecided() -> None:
    history = [write(1, 1000, i) for i in range(40)] + [read(1001, 1002, -1)]
    with pytest.raises(Undecided):
        check(history, 0, states_max=1000)
