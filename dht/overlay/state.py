"""The contacts of the last run, so that a node finds the others again without its bootstrap peers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from dht.overlay.messages import Contact, decode_contacts, encode

log = logging.getLogger(__name__)

STATE_BYTES_MAX: Final = 1024 * 1024


def save_contacts(path: Path, contacts: Sequence[Contact]) -> None:
    """Replace the file. A file that cannot be written is logged: it only makes the next start slower."""
    draft = path.with_name(path.name + ".new")
    try:
        draft.write_bytes(encode(tuple(contacts)))
        os.replace(draft, path)
    except OSError as error:
        log.warning("overlay: the contacts cannot be saved in %s: %s", path, error.strerror)


def load_contacts(path: Path) -> list[Contact]:
    """The saved contacts; none, and a line in the log, if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return list(decode_contacts(file.read(STATE_BYTES_MAX)))
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("overlay: the contacts saved in %s cannot be read (%s); starting without them", path, error)
        return []
