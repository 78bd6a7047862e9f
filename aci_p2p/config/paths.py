"""Where files lie: below one home if the user names one, else in the folders of the XDG base directory specification.

The specification (freedesktop.org, version 0.8) keeps apart what must survive (data), what may be lost (state), what
belongs to one login (runtime) and what the user writes (configuration).
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from aci_p2p.protocol.errors import LocalError

FOLDER: Final = "aci-p2p"
"""Our folder in each XDG directory."""
CONFIG_NAME: Final = "config.toml"
"""The configuration file."""
SOCKET_PATH_MAX: Final = 103
"""Bytes of a unix socket's path: `sun_path` holds 104 on macOS and 108 on Linux, with a zero byte at the end."""
PRIVATE_MODE: Final = 0o700
"""Only the owner may enter."""


def default_home() -> Path:
    """Where a node keeps its keys, models and database: `$ACI_HOME`, else below the XDG data directory."""
    return given_home() or _xdg("XDG_DATA_HOME", "~/.local/share")


def given_home() -> Path | None:
    """`$ACI_HOME`, if it is set."""
    home = os.environ.get("ACI_HOME")
    return Path(home).expanduser() if home else None


def default_config_file(home: Path | None = None) -> Path:
    """The file that is read when none is named: in the home if the user gave one, else in the XDG directory."""
    home = home or given_home()
    return (home or _xdg("XDG_CONFIG_HOME", "~/.config")) / CONFIG_NAME


def state_folder(home: Path) -> Path:
    """Where what may be lost lies that belongs to a home, such as the address cache."""
    return _xdg("XDG_STATE_HOME", "~/.local/state") if _is_xdg(home) else home


def runtime_folder(home: Path) -> Path:
    """Where the sockets of running nodes lie that belong to a home."""
    if _is_xdg(home) and os.environ.get("XDG_RUNTIME_DIR"):
        return _xdg("XDG_RUNTIME_DIR", "")
    return home / "run"


def socket_path(folder: Path, name: str) -> Path:
    """A path in `folder` for a unix socket; a shorter one below the temporary directory if that would be too long."""
    path = folder / f"{name}.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        return path
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"{FOLDER}-{os.getuid()}" / f"{digest}.sock"


def make_private_folder(folder: Path) -> None:
    """Make a folder that only we may enter, or check that it is one.

    Raises LocalError when it cannot be made, is another user's, or others may enter it: the temporary directory is
    everybody's, and whoever owns the folder of a socket can put another in its place.
    """
    try:
        folder.mkdir(mode=PRIVATE_MODE, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        msg = f"cannot make the folder {folder}: {error.strerror}"
        raise LocalError(msg) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        msg = f"{folder} is not a folder of yours that nobody else may write to"
        raise LocalError(msg, hint=f"remove it, or: chmod 700 {folder}")


def _xdg(variable: str, otherwise: str) -> Path:
    """Our folder in an XDG directory; a relative path in the variable is ignored, as the specification says."""
    value = os.environ.get(variable, "")
    return (Path(value) if Path(value).is_absolute() else Path(otherwise).expanduser()) / FOLDER


def _is_xdg(home: Path) -> bool:
    return home == _xdg("XDG_DATA_HOME", "~/.local/share")
