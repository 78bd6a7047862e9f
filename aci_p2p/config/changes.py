"""What a running node does about a changed configuration: takes it, or names what needs a restart."""

from __future__ import annotations

from dataclasses import dataclass

from aci_p2p.config.settings import SETTINGS, Config, Setting, build


@dataclass(frozen=True, slots=True)
class Change:
    """A setting with a new value."""

    setting: Setting
    """Which."""
    old: object
    """Value that it had."""
    new: object
    """Value that it has."""

    def __str__(self) -> str:
        kind = self.setting.kind
        return f"{self.setting.key} {kind.to_toml(self.old) or 'unset'} -> {kind.to_toml(self.new) or 'unset'}"


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs between two configurations."""

    live: tuple[Change, ...]
    """What a running node takes."""
    restart: tuple[Change, ...]
    """What it takes when it starts again."""

    def touch(self, section: str) -> bool:
        """Whether something of a table of the file is to be taken now."""
        return any(change.setting.section == section for change in self.live)


def apply(old: Config, changes: Changes) -> Config:
    """What a node runs with that has taken all it can of the changes."""
    taken = {change.setting.key: change.new for change in changes.live}
    return build({setting.key: taken.get(setting.key, setting.of(old)) for setting in SETTINGS})


def compare(old: Config, new: Config, *, serving: bool) -> Changes:
    """What changed, in the order of the settings; a node that serves nothing cannot take what it would serve."""
    changes = [
        Change(setting, setting.of(old), setting.of(new)) for setting in SETTINGS if setting.of(old) != setting.of(new)
    ]
    live = tuple(change for change in changes if change.setting.live and (serving or not _provides(change)))
    return Changes(live, tuple(change for change in changes if change not in live))


def _provides(change: Change) -> bool:
    return change.setting.section == "provider"
