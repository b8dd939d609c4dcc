"""A node's data directory: who the node is, which cluster it belongs to, and that nobody else uses it.

    node.json     format, cluster id, incarnation, PoP (from the first start on)
    node.key      the node's private Ed25519 key, 32 bytes in hex, mode 0600
    cluster.key   the cluster's id and key on one line, mode 0600; `lucd join --key-file` takes a copy of it
    boot          how often the node was started; raised durably before it speaks to anybody
    lock          held by the running process
    store.sqlite  the node's file of its PoP's domain (dht.storage)
    global.sqlite  its file of domain `global`
    copies/        copies of domains that it follows (lucd.followers); may be deleted while it does not run

Wiping the directory makes a new node: a new incarnation with a new key. Copying it does not make a second node: peers
refuse an incarnation whose boot counter did not grow (DESIGN section 3).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dht.errors import Conflict, Invalid, NotFound, StorageError, Unavailable

FORMAT = 1
STORE_FILE = "store.sqlite"
GLOBAL_FILE = "global.sqlite"
_KEY_WORD = "lucd-cluster-key"


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """The secret that all nodes of a cluster share; who holds it is a member."""

    cluster_id: str
    secret: bytes

    def text(self) -> str:
        """One line, for a file or a terminal."""
        return f"{_KEY_WORD} {FORMAT} {self.cluster_id} {self.secret.hex()}"

    def renewed(self) -> ClusterKey:
        """Another secret for the same cluster."""
        return ClusterKey(self.cluster_id, secrets.token_bytes(32))

    @classmethod
    def parse(cls, text: str, source: str) -> ClusterKey:
        """The key in the text. Raises Invalid, without showing the text, when it is not one."""
        words = text.split()
        try:
            word, version, cluster_id, secret = words
            if word != _KEY_WORD or version != str(FORMAT) or len(bytes.fromhex(secret)) != 32:
                raise ValueError
            return cls(str(uuid.UUID(cluster_id)), bytes.fromhex(secret))
        except ValueError:
            raise Invalid(
                f"{source} is not a cluster key; `lucd key show` on a member prints the line to copy"
            ) from None


class _NodeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    cluster_id: str
    incarnation: str
    founder: bool = False
    pop: str | None = None
    stored: bool = False
    stored_boot: int = 0
    global_stored: bool = False


@dataclass(frozen=True, slots=True)
class OpenDirectory:
    """What a starting node learns from its directory; the lock is held as long as this process lives.

    `founder`: made by `lucd init`, so the one node that may start without anybody to join.
    """

    path: Path
    cluster: ClusterKey
    private_key: bytes
    incarnation: uuid.UUID
    founder: bool
    boot: int
    lock: int
    stored_boot: int = 0
    """The newest start that the node's files are known to have noted: an older file was put back from somewhere."""
    global_stored: bool = False
    """Whether the file of domain `global` is one of them."""

    @property
    def store_file(self) -> Path:
        return self.path / STORE_FILE

    @property
    def global_file(self) -> Path:
        return self.path / GLOBAL_FILE

    def note_stored(self) -> None:
        """From now on a start without the node's files, or with one that does not note this start, is refused."""
        with _file_errors(self.path):
            node = _node_file(self.path)
            node = msgspec.structs.replace(node, stored=True, stored_boot=self.boot, global_stored=True)
            _write(self.path / "node.json", _json(node), 0o600)

    def close(self) -> None:
        """Give the directory back."""
        os.close(self.lock)


def found(path: Path) -> ClusterKey:
    """Make the directory of a new cluster's first node. Raises Conflict if there already is a node in it."""
    cluster = ClusterKey(str(uuid.uuid4()), secrets.token_bytes(32))
    _create(path, cluster, founder=True)
    return cluster


def join(path: Path, cluster: ClusterKey) -> None:
    """Make the directory of a further node. Raises Conflict if there already is a node in it."""
    _create(path, cluster, founder=False)


def _create(path: Path, cluster: ClusterKey, founder: bool) -> None:
    with _file_errors(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (path / "node.json").exists():
            old = _node_file(path)
            same = "this cluster" if old.cluster_id == cluster.cluster_id else f"cluster {old.cluster_id}"
            raise Conflict(
                f"{path} already is the data directory of a node of {same}; start it with `lucd run`, "
                "or choose another directory, or remove it for good"
            )
        foreign = sorted(p.name for p in path.iterdir() if p.name != "lost+found")
        if foreign:
            raise Conflict(f"{path} is not empty ({', '.join(foreign[:3])}) and not lucd's; choose another data_dir")
        _write(path / "cluster.key", cluster.text() + "\n", 0o600)
        _write(path / "node.key", secrets.token_bytes(32).hex() + "\n", 0o600)
        _write(path / "boot", "0\n", 0o600)
        node = _NodeFile(format=FORMAT, cluster_id=cluster.cluster_id, incarnation=str(uuid.uuid4()), founder=founder)
        _write(path / "node.json", _json(node), 0o600)


def cluster_key(path: Path) -> ClusterKey:
    """The key in a data directory, for `lucd key show`."""
    with _file_errors(path):
        node = _node_file(path)
        return _own_key(path, node)


def replace_key(path: Path, cluster: ClusterKey) -> None:
    """Put another secret of the same cluster into the directory of a node that does not run.

    Raises Conflict for another cluster's key, Unavailable while the node runs.
    """
    with _file_errors(path):
        node = _node_file(path)
        if cluster.cluster_id != node.cluster_id:
            raise Conflict(
                f"the key is of cluster {cluster.cluster_id}, but {path} belongs to cluster {node.cluster_id}; "
                "a node changes its cluster only with an empty data_dir (`lucd join`)"
            )
        lock = _take_lock(path)
        try:
            _write(path / "cluster.key", cluster.text() + "\n", 0o600)
        finally:
            os.close(lock)


def start(path: Path, pop: str) -> OpenDirectory:
    """Open the directory for a run: lock it and raise its boot counter durably.

    Raises NotFound (no directory), Unavailable (in use), StorageError (unreadable, damaged, another format) and Invalid
    (the configured PoP is not the one that this node was founded in).
    """
    with _file_errors(path):
        _own_key(path, _node_file(path))  # What is no data directory is left without a lock file.
        lock = _take_lock(path)
        try:
            # Read again: until now `lucd key import` or another start may have written them.
            node = _node_file(path)
            cluster = _own_key(path, node)
            if node.pop is not None and node.pop != pop:
                raise Invalid(
                    f"{path} belongs to a node of PoP {node.pop}, but pop = {pop} is configured; a node cannot move: "
                    "correct pop, or join again with an empty data_dir"
                )
            for file, stored in ((STORE_FILE, node.stored), (GLOBAL_FILE, node.global_stored)):
                if stored and not (path / file).exists():
                    raise StorageError(
                        f"{path}/{file} is gone, and with it what this node promised to others; "
                        "wipe the directory and join again"
                    )
            key = _node_key(path)
            boot = _read_boot(path) + 1
            _write(path / "boot", f"{boot}\n", 0o600)
            if node.pop is None:
                _write(path / "node.json", _json(msgspec.structs.replace(node, pop=pop)), 0o600)
        except BaseException:
            os.close(lock)
            raise
    incarnation = uuid.UUID(node.incarnation)
    return OpenDirectory(
        path, cluster, key, incarnation, node.founder, boot, lock, node.stored_boot, node.global_stored
    )


def _node_file(path: Path) -> _NodeFile:
    file = path / "node.json"
    if not file.exists():
        if path.exists() and any(p.name != "lost+found" for p in path.iterdir()):
            raise StorageError(f"{path} is not a data directory of lucd (no node.json in it); correct data_dir")
        raise NotFound(
            f"there is no data directory {path}; run `lucd init` to found a cluster, "
            "or `lucd join --key-file FILE` to become a node of one"
        )
    try:
        loose = msgspec.json.decode(file.read_bytes(), type=dict[str, object])
        if loose.get("format") != FORMAT:
            raise StorageError(
                f"{file} has format {loose.get('format')}, this lucd reads {FORMAT}; use the version that wrote it"
            )
        node = msgspec.convert(loose, _NodeFile)
        uuid.UUID(node.incarnation)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StorageError(f"{file} is damaged: {error}; wipe the directory and join again") from None
    return node


def _own_key(path: Path, node: _NodeFile) -> ClusterKey:
    file = path / "cluster.key"
    _refuse_open_mode(file)
    key = ClusterKey.parse(file.read_text(), str(file))
    if key.cluster_id != node.cluster_id:
        raise StorageError(
            f"{file} is the key of cluster {key.cluster_id}, but {path} belongs to cluster {node.cluster_id}; "
            "put the right key back, or join with an empty data_dir"
        )
    return key


def _node_key(path: Path) -> bytes:
    file = path / "node.key"
    _refuse_open_mode(file)
    try:
        key = bytes.fromhex(file.read_text().strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise StorageError(f"{file} is damaged; wipe the directory and join again")
    return key


def _read_boot(path: Path) -> int:
    text = (path / "boot").read_text().strip()
    if not text.isdigit():
        raise StorageError(f"{path / 'boot'} is damaged; wipe the directory and join again")
    return int(text)


def _refuse_open_mode(file: Path) -> None:
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise StorageError(f"{file} can be read by others (mode {mode:o}); run chmod 600 {file}")


def _take_lock(path: Path) -> int:
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise Unavailable(
            f"{path} is in use by another lucd process; stop it first or choose another data_dir"
        ) from None
    return lock


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"{path} is damaged: {error.filename} is missing; wipe the directory and join again"
        ) from None
    except UnicodeDecodeError:
        raise StorageError(f"{path} is damaged: a file in it is not text; wipe the directory and join again") from None
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror}; check data_dir, its owner and the disk"
        ) from None


def _json(node: _NodeFile) -> str:
    return msgspec.json.format(msgspec.json.encode(node)).decode() + "\n"


def _write(file: Path, text: str, mode: int) -> None:
    """Replace the file durably: after a crash there is the old or the new content."""
    draft = file.with_name(file.name + ".new")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    draft.rename(file)
    parent = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
