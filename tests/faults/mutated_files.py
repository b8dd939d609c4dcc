"""Data files damaged at random: the storage says so or gives exactly what was written, never anything else.

    python -m tests.faults.mutated_files --files 10000 --seed 1      in children, so that a crash is a finding
    python -m tests.faults.mutated_files --seed 1 --case 4711        one case again, in this process

Each case is a function of the seed and its number. The files are those of a node that was stopped or killed. A log
that lost its end cannot be told from a crash before the sync: there, and only there, an earlier commit is a right
answer, whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dht.errors import StorageError
from dht.model import Ballot, IndexSpec, TableSpec
from dht.rows import encode_row, group_key, row_key
from dht.storage.disk import SqliteDisk
from dht.storage.registers import Header, RegisterFile
from dht.world import Batch, Space

SPACES = [number for name, number in vars(Space).items() if name.isupper()]
PAGE_BYTES = 8192
BATCH_FILES = 500
CASE_S_MAX = 20.0
MUTATIONS = ("flip", "flips", "zeros", "zero page", "cut", "swap", "garbage", "no log", "set byte")
State = dict[tuple[int, bytes], bytes]
WHAT_TO_DO = ("wipe", "Check", "start the newer lucd", "directory of its own")


@dataclass(frozen=True, slots=True)
class Template:
    """The bytes of a killed node's files, a stopped node's one, and the content after each commit."""

    database: bytes
    stopped: bytes
    log: bytes
    lock: bytes
    states: list[State]


def content(disk: SqliteDisk) -> State:
    return {(space, bytes(key)): bytes(value) for space in SPACES for key, value in disk.range(space, b"", None)}


async def template(path: Path, groups: int = 60) -> Template:
    """Groups with rows, indexes and all other key spaces; about half of the commits are in the log only."""
    disk = SqliteDisk(path / "store.sqlite", reserve_bytes=0)
    file = RegisterFile(disk)
    specs = Batch()
    file.set_specs(specs, "db", 1, [TableSpec(1, (0,), (IndexSpec(1, (1,)), IndexSpec(2, (2, 0))))])
    await disk.durable(disk.submit(specs))
    states = [content(disk)]
    for number in range(groups):
        batch = Batch()
        ballot = Ballot(1, 1, number + 1, b"n" * 20, 1, number + 1)
        rows = {row_key(1, (i,)): encode_row({0: i, 1: f"host-{number % 7}", 2: "x" * (40 * i)}) for i in range(6)}
        key = group_key("db", "f", (number % (groups * 2 // 3),))
        file.replace(batch, key, Header(ballot, ballot, ballot, bytes([number]) * 16), rows)
        for space in (Space.META, Space.ROSTER, Space.DECREE, Space.TABLET, Space.STAGED, Space.PEER):
            batch.put(space, b"key-%d" % (number % 9), b"value %d " % number * 5)
        await disk.durable(disk.submit(batch))
        states.append(content(disk))
        if number == groups // 2:
            disk._file.writer.wal_checkpoint(mode=3)
    database, log, lock = [(path / f"store.sqlite{end}").read_bytes() for end in ("", "-wal", ".lock")]
    disk.close()
    return Template(database, (path / "store.sqlite").read_bytes(), log, lock, states)


def mutated(chance: random.Random, whole: Template) -> tuple[str, bytes, bytes | None]:
    """(what was done, database, log or None)."""
    kind = chance.choice(MUTATIONS)
    if kind == "no log":
        return kind, whole.database, None
    where = chance.choice(("stopped node's database", "killed node's database", "log"))
    in_log = where == "log"
    database = whole.stopped if where.startswith("stopped") else whole.database
    source = whole.log if in_log else database
    data = bytearray(source)
    page = PAGE_BYTES + 24 if in_log else PAGE_BYTES
    start = 32 if in_log else 0
    pages = (len(data) - start) // page
    first, second = (start + page * chance.randrange(pages) for _ in range(2))
    match kind:
        case "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case "flips":
            for _ in range(chance.randrange(2, 200)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case "set byte":
            # Page and cell headers, where most of what SQLite believes stands.
            data[min(len(data) - 1, first + chance.randrange(64))] = chance.choice([0, 1, 2, 127, 128, 255])
        case "zeros":
            at, size = chance.randrange(len(data)), chance.randrange(1, 600)
            data[at : at + size] = bytes(len(data[at : at + size]))
        case "zero page":
            data[first : first + page] = bytes(page)
        case "cut":
            del data[chance.randrange(len(data)) :]
        case "swap":
            data[first : first + page], data[second : second + page] = (
                data[second : second + page],
                data[first : first + page],
            )
        case "garbage":
            data += chance.randbytes(chance.randrange(1, 3 * page))
    said = f"{kind} in the {where}"
    if where == "log":
        return said, whole.database, bytes(data)
    return said, bytes(data), whole.log if where.startswith("killed") else None


def judge(path: Path, whole: Template, kind: str) -> str:
    """What the storage made of the file: refused, exact, or the end of the log lost. Raises AssertionError if wrong."""
    newest = whole.states[-1]
    try:
        disk = SqliteDisk(path, reserve_bytes=0)
        try:
            found = content(disk)
            RegisterFile(disk)
            for place, value in newest.items():
                assert disk.get(*place) == found.get(place), f"get and range differ at {place}: {value!r}"
        finally:
            disk.close()
    except StorageError as error:
        if str(path) not in error.message or not any(word in error.message for word in WHAT_TO_DO):
            raise AssertionError(f"the message says too little: {error.message}") from error
        return "refused"
    if found == newest:
        return "exact"
    assert kind.endswith("log"), "the content is wrong"
    assert kind != "no log", "a missing log was not noticed"
    assert found in whole.states, "the content is of no commit"
    return "end of the log lost"


def run_case(seed: int, number: int, whole: Template, path: Path) -> tuple[str, str]:
    chance = random.Random(f"{seed}/{number}")
    kind, database, log = mutated(chance, whole)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    file = path / "store.sqlite"
    file.write_bytes(database)
    (path / "store.sqlite.lock").write_bytes(b"" if "stopped" in kind else whole.lock)
    if log is not None:
        (path / "store.sqlite-wal").write_bytes(log)
    began = time.monotonic()
    try:
        outcome = judge(file, whole, kind)
    except Exception as error:
        raise AssertionError(f"seed {seed} case {number} ({kind}): {type(error).__name__}: {error}") from error
    assert time.monotonic() - began < CASE_S_MAX, f"seed {seed} case {number} ({kind}) took too long"
    return kind, outcome


def run_cases(seed: int, first: int, count: int) -> Counter[str]:
    """How often each mutation had each outcome."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="lucd-mutated-") as name:
        directory = Path(name)
        whole = asyncio.run(template(directory))
        totals: Counter[str] = Counter()
        for number in range(first, first + count):
            kind, outcome = run_case(seed, number, whole, directory / "case")
            totals[f"{kind}: {outcome}"] += 1
        return totals


def run_in_children(seed: int, files: int) -> tuple[Counter[str], list[str]]:
    """Totals, and what went wrong."""
    totals: Counter[str] = Counter()
    wrong: list[str] = []
    for first in range(0, files, BATCH_FILES):
        count = min(BATCH_FILES, files - first)
        command = [sys.executable, "-m", "tests.faults.mutated_files", "--seed", str(seed), "--first", str(first)]
        try:
            child = subprocess.run(
                [*command, "--count", str(count)], capture_output=True, check=False, text=True, timeout=CASE_S_MAX * 30
            )
        except subprocess.TimeoutExpired:
            wrong.append(f"cases {first} to {first + count - 1} did not end")
            continue
        if child.returncode:
            last = child.stderr.strip().splitlines()[-1:]
            wrong.append(f"cases {first} to {first + count - 1}: exit {child.returncode} {' '.join(last)}")
        else:
            totals.update(json.loads(child.stdout))
    return totals, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--case", type=int)
    parser.add_argument("--first", type=int)
    parser.add_argument("--count", type=int, default=1)
    given = parser.parse_args()
    if given.case is not None:
        print(*run_cases(given.seed, given.case, 1))
        return 0
    if given.first is not None:
        print(json.dumps(run_cases(given.seed, given.first, given.count)))
        return 0
    print(f"{given.files} data files, seed {given.seed}; one again: --seed {given.seed} --case NUMBER", flush=True)
    began = time.monotonic()
    totals, wrong = run_in_children(given.seed, given.files)
    for kind, times in sorted(totals.items()):
        print(f"{times:7d}  {kind}")
    print(f"{totals.total()} files in {time.monotonic() - began:.0f} s, {len(wrong)} batches with a wrong outcome")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
