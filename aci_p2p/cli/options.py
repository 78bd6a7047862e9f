"""Options made from the table of settings: what a command line says goes before the environment and the file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import click

from aci_p2p.config import SETTINGS, Loaded, Setting, default_config, load
from aci_p2p.config.kinds import Switch, Texts
from aci_p2p.config.sources import FILE_VARIABLE, Flag

R = TypeVar("R")

FOLDERS: Final = ("home", "state", "runtime", "model_store")
"""Settings of every command that reads or writes files."""
NODE: Final = (*FOLDERS, "network", "key", "bootstrap", "offline", "p2p.*", "provider.*", "log.*")
"""Settings of a node that runs until it is stopped."""
CLIENT: Final = (
    *FOLDERS, "network", "bootstrap", "offline", "stakes", "p2p.relay_client", "p2p.hole_punching", "p2p.mdns",
    "client.*",
)  # fmt: skip
"""Settings of a node that lives for one question."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says; a running node reads the rest again."""

    flags: dict[str, Flag] = field(default_factory=dict[str, Flag])
    """By key of the setting."""
    file: Path | None = None
    """The file that it names."""

    def load(self) -> Loaded:
        """The effective configuration. Raises ConfigError."""
        return load(self.flags, self.file)


def config_option(function: Callable[..., R]) -> Callable[..., R]:
    """Adds `--config`, to the command and to the group above it."""
    return click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path),
        help=f"Configuration file.  [default: ${FILE_VARIABLE}, else config.toml in $ACI_HOME or ~/.config/aci-p2p]",
    )(function)


def configured(*patterns: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Adds `--config` and the options of all settings whose keys match a pattern; the command gets them as `given`."""
    chosen = [setting for setting in SETTINGS if any(fnmatch(setting.key, pattern) for pattern in patterns)]

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(function)
        def command(*, config_file: Path | None, **parameters: Any) -> R:  # noqa: ANN401 - click's
            said = {setting.key: parameters.pop(_parameter(setting)) for setting in chosen}
            flags = {key: value for key, value in said.items() if value is not None and value != ()}
            above: Path | None = click.get_current_context().find_root().params.get("config_file")
            return function(given=Given(flags, config_file or above), **parameters)

        decorated: Callable[..., R] = command
        for setting in reversed(chosen):
            decorated = _option(setting)(decorated)
        return config_option(decorated)

    return decorate


def _option(setting: Setting) -> Callable[[Callable[..., R]], Callable[..., R]]:
    switch = isinstance(setting.kind, Switch)
    return click.option(
        *setting.flag.split(),
        _parameter(setting),
        type=bool if switch else str,
        is_flag=switch,
        multiple=isinstance(setting.kind, Texts),
        default=None,
        metavar=None if switch else setting.kind.metavar,
        help=setting.help + _default_text(setting),
    )


def _parameter(setting: Setting) -> str:
    return setting.key.replace(".", "_")


def _default_text(setting: Setting) -> str:
    """The default as a person would write the flag; empty for none."""
    value = setting.of(default_config())
    if setting.key == "home":
        text = "$ACI_HOME or ~/.local/share/aci-p2p"
    elif isinstance(value, bool):
        on, _, off = setting.flag.partition("/")
        text = (on if value else off).removeprefix("--")
    elif isinstance(value, tuple):
        text = " ".join(cast("tuple[str, ...]", value))
    else:
        text = "" if value is None else str(setting.kind.to_json(value))
    return f"  [default: {text}]" if text else ""
