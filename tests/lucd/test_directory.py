"""The data directory: what starts, what is refused, and what the refusal says."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from dht.errors import Conflict, Invalid, NotFound, StorageError, Unavailable
from lucd import directory


def test_start_twice_raises_the_boot_counter_and_keeps_the_identity(tmp_path: Path) -> None:
    directory.found(tmp_path / "d")
    first = directory.start(tmp_path / "d", "paris")
    first.close()
    second = directory.start(tmp_path / "d", "paris")
    second.close()
    assert (first.boot, second.boot) == (1, 2)
    assert first.incarnation == second.incarnation
    assert first.private_key == second.private_key
    assert first.cluster == second.cluster


def test_found_secrets_are_private(tmp_path: Path) -> None:
    directory.found(tmp_path / "d")
    assert {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "d").iterdir()} == {
        "node.json": 0o600,
        "node.key": 0o600,
        "cluster.key": 0o600,
        "boot": 0o600,
    }


def test_join_same_cluster_is_another_node(tmp_path: Path) -> None:
    cluster = directory.found(tmp_path / "a")
    directory.join(tmp_path / "b", cluster)
    a, b = directory.start(tmp_path / "a", "p"), directory.start(tmp_path / "b", "p")
    assert a.cluster == b.cluster
    assert a.private_key != b.private_key
    assert a.incarnation != b.incarnation
    a.close()
    b.close()


def test_start_missing_directory_says_init_or_join(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"lucd init.*lucd join"):
        directory.start(tmp_path / "none", "p")


def test_start_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ibdata1").write_bytes(b"x")
    with pytest.raises(StorageError, match="not a data directory of lucd"):
        directory.start(tmp_path, "p")
    with pytest.raises(Conflict, match="not empty"):
        directory.found(tmp_path)


def test_found_over_a_node_is_refused(tmp_path: Path) -> None:
    directory.found(tmp_path / "d")
    with pytest.raises(Conflict, match="already is the data directory"):
        directory.found(tmp_path / "d")


def test_join_over_a_node_of_another_cluster_is_refused(tmp_path: Path) -> None:
    mine = directory.found(tmp_path / "a")
    other = directory.found(tmp_path / "b")
    with pytest.raises(Conflict, match=mine.cluster_id):
        directory.join(tmp_path / "a", other)


def test_start_with_another_clusters_key_is_refused(tmp_path: Path) -> None:
    directory.found(tmp_path / "a")
    directory.found(tmp_path / "b")
    (tmp_path / "a" / "cluster.key").write_text((tmp_path / "b" / "cluster.key").read_text())
    with pytest.raises(StorageError, match="is the key of cluster"):
        directory.start(tmp_path / "a", "p")


def test_start_in_another_pop_is_refused(tmp_path: Path) -> None:
    directory.found(tmp_path / "d")
    directory.start(tmp_path / "d", "paris").close()
    with pytest.raises(Invalid, match="PoP paris"):
        directory.start(tmp_path / "d", "rome")


def test_start_readable_key_is_refused(tmp_path: Path) -> None:
    directory.found(tmp_path / "d")
    (tmp_path / "d" / "node.key").chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        directory.start(tmp_path / "d", "p")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("node.json", "{", "damaged"),
        ("node.json", '{"format": 99}', "format 99"),
        ("node.key", "beef", "damaged"),
        ("boot", "many", "damaged"),
        ("cluster.key", "hello", "not a cluster key"),
    ],
)
def test_start_damaged_file_is_refused_by_name(tmp_path: Path, name: str, content: str, words: str) -> None:
    directory.found(tmp_path / "d")
    (tmp_path / "d" / name).write_text(content)
    with pytest.raises((StorageError, Invalid)) as caught:
        directory.start(tmp_path / "d", "p")
    assert words in caught.value.message
    assert name in caught.value.message
    assert content not in caught.value.message or name != "cluster.key"


def test_start_missing_key_is_refused(tmp_path: Path) -> None:
    directory.found(tmp_path / "d")
    (tmp_path / "d" / "node.key").unlink()
    with pytest.raises(StorageError, match=r"node\.key is missing"):
        directory.start(tmp_path / "d", "p")


def test_start_unreadable_file_is_refused(tmp_path: Path) -> None:
    directory.found(tmp_path / "d")
    (tmp_path / "d" / "node.json").unlink()
    (tmp_path / "d" / "node.json").mkdir()
    with pytest.raises(StorageError, match=r"node\.json: Is a directory; check data_dir, its owner"):
        directory.start(tmp_path / "d", "p")


@pytest.mark.parametrize("gone", [directory.STORE_FILE, directory.GLOBAL_FILE])
def test_start_without_a_file_that_held_promises_is_refused(tmp_path: Path, gone: str) -> None:
    directory.found(tmp_path / "d")
    opened = directory.start(tmp_path / "d", "p")
    opened.store_file.touch()
    opened.global_file.touch()
    opened.note_stored()
    opened.close()
    directory.start(tmp_path / "d", "p").close()
    (tmp_path / "d" / gone).unlink()
    with pytest.raises(StorageError, match=f"{gone} is gone.*wipe the directory"):
        directory.start(tmp_path / "d", "p")


def test_found_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        directory.found(tmp_path / "file" / "d")


def _hold(path: str, ready: object, done: object) -> None:
    opened = directory.start(Path(path), "p")
    ready.set()  # type: ignore[attr-defined]
    done.wait(120)  # type: ignore[attr-defined]
    opened.close()


def test_start_in_use_by_another_process_is_refused(tmp_path: Path) -> None:
    directory.found(tmp_path / "d")
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "d"), ready, done))
    process.start()
    try:
        assert ready.wait(120)
        with pytest.raises(Unavailable, match="in use by another lucd process"):
            directory.start(tmp_path / "d", "p")
        assert (tmp_path / "d" / "boot").read_text() == "1\n"
    finally:
        done.set()
        process.join(10)


def test_cluster_key_text_round_trip_and_garbage(tmp_path: Path) -> None:
    cluster = directory.found(tmp_path / "d")
    assert directory.ClusterKey.parse(cluster.text(), "x") == cluster
    assert directory.cluster_key(tmp_path / "d") == cluster
    for garbage in ("", "a b c d", cluster.text() + " more", cluster.text()[:-2], cluster.text().replace(" 1 ", " 2 ")):
        with pytest.raises(Invalid, match="is not a cluster key"):
            directory.ClusterKey.parse(garbage, "x")


def test_start_that_a_key_import_overtakes_runs_with_the_new_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = directory.found(tmp_path / "n")
    take_lock = directory._take_lock

    def overtaken(path: Path) -> int:
        monkeypatch.setattr(directory, "_take_lock", take_lock)
        directory.replace_key(path, old.renewed())
        return take_lock(path)

    monkeypatch.setattr(directory, "_take_lock", overtaken)
    opened = directory.start(tmp_path / "n", "pop1")
    opened.close()
    assert opened.cluster == directory.cluster_key(tmp_path / "n") != old
