"""lucd-status upgrade check: what stops an upgrade, what is only worth a look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from dht.codec import Message
from dht.errors import Unavailable
from lucd import messages, version
from lucd.cli import upgrade
from tests.lucd.test_cli import STATUS as SAMPLE

# oslo.upgradecheck's, of the table that it prints.
pytestmark = pytest.mark.filterwarnings("ignore:the '.*' constant is deprecated:DeprecationWarning")
STATUS = msgspec.structs.replace(
    SAMPLE, version=version(), tablets={"whole": 64, "degraded": 0, "unavailable": 0}, warnings=()
)
DOMAIN = messages.DomainReply("paris", 1, 4, (), (), ("node",), state="healthy")


class Daemon:
    """Answers as told in the place of a BlockingClient; `None`: it is not there."""

    status: messages.StatusReply | None = STATUS
    domain: messages.DomainReply = DOMAIN

    def __init__(self, path: str, timeout_s: float) -> None:
        assert path.endswith("lucd.sock")

    def call(self, message: Message, **_: Any) -> Message:
        if self.status is None:
            raise Unavailable("no daemon answers")
        return self.status if isinstance(message, messages.AskStatus) else self.domain

    def close(self) -> None: ...


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> type[Daemon]:
    fresh = type("Daemon", (Daemon,), {})
    monkeypatch.setattr(upgrade, "BlockingClient", fresh)
    return fresh


def check(tmp_path: Path) -> int:
    config = tmp_path / "lucd.conf"
    config.write_text("[DEFAULT]\nsocket = /run/lucd/lucd.sock\n")
    return upgrade.main(["--config-file", str(config), "upgrade", "check"])


def test_healthy_domain_may_be_upgraded(daemon: type[Daemon], tmp_path: Path) -> None:
    assert check(tmp_path) == 0


@pytest.mark.parametrize(
    ("status", "domain", "code", "words"),
    [
        ({"ready": False, "state": "joining"}, {}, 2, "joining"),
        ({"version": "0.0.0"}, {}, 1, "not restarted since"),
        ({}, {"state": "degraded"}, 2, "one too many"),
        ({}, {"survivable": ()}, 1, "not every tablet survives"),
        ({"to_copy": 7}, {}, 2, "7 groups"),
        ({"global_domain": messages.DomainFigures(True, to_copy=7)}, {}, 2, "7 groups"),
        ({"global_domain": messages.DomainFigures(True, tablets={"degraded": 3})}, {}, 1, "3 tablets of domain global"),
        ({"global_domain": messages.DomainFigures(False, tablets={"degraded": 3})}, {}, 0, "Success"),
        ({"warnings": ("node bb does not answer",)}, {}, 1, "node bb"),
    ],
)
def test_what_is_wrong_is_told_with_its_code(
    daemon: type[Daemon],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: dict[str, Any],
    domain: dict[str, Any],
    code: int,
    words: str,
) -> None:
    daemon.status = msgspec.structs.replace(STATUS, **status)
    daemon.domain = msgspec.structs.replace(DOMAIN, **domain)
    assert check(tmp_path) == code
    printed = " ".join(capsys.readouterr().out.replace("|", " ").split())
    assert words in printed


def test_daemon_that_is_not_there_stops_the_upgrade(daemon: type[Daemon], tmp_path: Path) -> None:
    daemon.status = None
    assert check(tmp_path) == 2


def test_file_that_the_environment_names_is_read(
    daemon: type[Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "lucd.conf"
    config.write_text("[DEFAULT]\nsocket = /run/elsewhere/lucd.sock\n")
    monkeypatch.setenv("LUCD_CONFIG", str(config))
    asked: list[str] = []
    monkeypatch.setattr(daemon, "__init__", lambda self, path, timeout_s: asked.append(path))
    assert upgrade.main(["upgrade", "check"]) == 0
    assert set(asked) == {"/run/elsewhere/lucd.sock"}


def test_file_that_is_not_there_is_told_in_one_line_with_a_code_that_is_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upgrade.main(["--config-file", str(tmp_path / "none.conf"), "upgrade", "check"]) == 64
    told = capsys.readouterr().err
    assert told.startswith("lucd: the configuration cannot be read")
    assert told.count("\n") == 1
