"""lucd.conf: what is refused, in which words, and that the sample is the options' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dht.errors import Invalid, NotFound
from lucd.conf import sample
from lucd.conf.options import Endpoint
from lucd.conf.settings import load

SAMPLE = Path(__file__).parents[2] / "config" / "lucd.conf.sample"


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "lucd.conf"
    file.write_text(text)
    return file


def test_load_full_file_fills_in_dependent_defaults(tmp_path: Path) -> None:
    settings = load(
        written(
            tmp_path,
            f"[DEFAULT]\ndata_dir = {tmp_path}/d\nlisten = 0.0.0.0:7000\nadvertise = [2001:db8::1]:7000\n"
            "bootstrap = a.example:7000, [::1]:7001\npop = paris-1\nsocket_mode = 600\n[nova]\nworkers = 3\n",
        )
    )
    assert settings.socket == Path("/run/lucd/lucd.sock")
    assert settings.advertise == Endpoint("2001:db8::1", 7000)
    assert str(settings.advertise) == "[2001:db8::1]:7000"
    assert settings.bootstrap == (Endpoint("a.example", 7000), Endpoint("::1", 7001))
    assert settings.socket_mode == 0o600
    assert settings.nova.workers == 3
    assert settings.nova.transport_url == "lucd:///run/lucd/lucd.sock"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[DEFAULT]\nlisten = 1.2.3.4\n", ["[DEFAULT] listen = 1.2.3.4", "HOST:PORT is expected"]),
        ("[DEFAULT]\nlisten = 1.2.3.4:99999\n", ["listen = 1.2.3.4:99999", "1 to 65535"]),
        ("[DEFAULT]\nlisten = ::1:7000\n", ["listen = ::1:7000", "brackets"]),
        ("[DEFAULT]\nlisten = 0.0.0.0:7000\n", ["listen = 0.0.0.0:7000", "set advertise"]),
        ("[DEFAULT]\nlink_tls = maybe\n", ["link_tls = maybe", "true or false is expected"]),
        ("[DEFAULT]\nlog_level = loud\n", ["log_level = loud", "debug, info, warning, error"]),
        ("[DEFAULT]\npop = New York\n", ["pop = New York", "letters, digits"]),
        ("[DEFAULT]\nbootstrap = a:1, b\n", ["bootstrap = b", "HOST:PORT"]),
        ("[DEFAULT]\nbootstrap = a:1, b..c:1\n", ["bootstrap = b..c:1", "no host has that name"]),
        (f"[DEFAULT]\nadvertise = {'x' * 64}:1\n", ["[DEFAULT] advertise = xxx", "no host has that name"]),
        ("[DEFAULT]\nsocket_mode = 999\n", ["socket_mode = 999", "[0-7]"]),
        ("[DEFAULT]\nsocket = /" + "x" * 120 + "\n", ["at most 100 bytes"]),
        ("[limits]\nremove_after_s = 0\n", ["[limits] remove_after_s = 0", "10"]),
        ("[limits]\nremove_after_s = nan\n", ["[limits] remove_after_s = nan", "a number is expected"]),
        ("[nova]\nworkers = many\n", ["[nova] workers = many", "whole number"]),
        ("[nova]\nworkers = 99\n", ["workers = 99", "64"]),
        ("[nova]\nworker = 1\n", ["unknown option worker in [nova]", "workers"]),
        ("[novas]\nworkers = 1\n", ["unknown section [novas]", "[nova]"]),
        ("[DEFAULT\n", ["is not a configuration file"]),
        ("listen\n", ["is not a configuration file"]),
    ],
)
def test_load_wrong_file_names_file_option_value_and_what_is_allowed(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(Invalid) as caught:
        load(file)
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_load_no_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="lucd config sample"):
        load(tmp_path / "none.conf")


def test_sample_in_config_is_current() -> None:
    assert SAMPLE.read_text() == sample.render(), "run `make sample`"


def test_sample_with_every_option_uncommented_is_read_as_the_defaults(tmp_path: Path) -> None:
    lines = [
        line.removeprefix("#")
        if line.startswith("#") and not line.startswith("# ") and not line.endswith("=")
        else line
        for line in sample.render().splitlines()
    ]
    assert load(written(tmp_path, "\n".join(lines) + "\n")) == load(None)
