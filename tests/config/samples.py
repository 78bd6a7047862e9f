"""For every setting two values that differ from its default, as each way of setting them writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aci_p2p.config import SETTINGS, Setting, kinds
from aci_p2p.protocol.identity import KeyPair

PEERS = [KeyPair(bytes([number]) * 32).node_id for number in (1, 2)]
SPECIAL = {
    "client.temperature": ("0.5", "1.25"),
    "client.providers": ("2", "5"),
    "client.hedge_after_ms": ("2500", "4000"),
    "client.busy_wait_ms": ("0", "20000"),
    "log.format": ("logfmt", "json"),
    "log.level": ("debug", "error"),
    "network": ("aci-a", "aci-b"),
    "p2p.low_water": ("7", "8"),
    "p2p.high_water": ("1000", "1001"),
    "home": ("/a", "/b"),
    "stakes": (f"{PEERS[0]}=1,{PEERS[1]}=0.5", f"{PEERS[1]}=2"),
    "provider.price": ("auto", "fixed"),
    "provider.price_curve": ("0.5:1.25,0.9:2", "0.75:1.001"),
    "provider.price_floor": ("0.000001", "0.000002"),
    "provider.price_ceiling": ("0.5", "2"),
    "bootstrap": ("/dnsaddr/boot.example,/dns4/boot.example/tcp/9400", "/ip6/::1/tcp/1"),
    "p2p.listen": ("/ip4/127.0.0.1/tcp/0,/ip6/::/tcp/9400", "/ip4/127.0.0.1/tcp/1"),
    "p2p.announce": ("/dns4/node.example/tcp/9400,/ip4/192.0.2.1/tcp/1", "/ip6/2001:db8::1/tcp/1"),
}
"""Where the first or second value of its kind would be refused, or there are none."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a setting."""

    setting: Setting
    text: str
    """For a variable, and after a flag."""
    value: object

    @property
    def flags(self) -> list[str]:
        """The command line."""
        names = self.setting.flag.replace("/", " ").split()
        if isinstance(self.setting.kind, kinds.Switch):
            return [names[0] if self.value else names[1]]
        if isinstance(self.setting.kind, kinds.Texts):
            return [part for text in self.text.split(",") for part in (names[0], text)]
        return [names[-1], self.text]

    @property
    def line(self) -> str:
        """The file."""
        header = f"[{self.setting.section}]\n" if self.setting.section else ""
        return f"{header}{self.setting.name} = {self.setting.kind.to_toml(self.value)}\n"


def samples(setting: Setting) -> tuple[Sample, Sample]:
    """The two."""
    kind = setting.kind
    name = type(kind).__name__ + kind.name
    values = {
        "Texta text": (("left", "left"), ("right", "right")),
        "Wholea whole number": (("12", 12), ("13", 13)),
        "Optionala whole number": (("2", 2), ("3", 3)),
        "Foldera folder": (("/left", Path("/left")), ("/right", Path("/right"))),
        "Optionala folder": (("/left", Path("/left")), ("/right", Path("/right"))),
        "Switchtrue or false": (("yes", True), ("off", False)),
        "Textsa list of texts": (("/left,/also", ("/left", "/also")), ("/right", ("/right",))),
        "Amountan amount of ACI, such as 0.00045": (("0.5", 5 * 10**17), ("2", 2 * 10**18)),
        "Numbera number": (("0.5", 0.5), ("1.25", 1.25)),
    }
    if setting.key in SPECIAL:
        left, right = SPECIAL[setting.key]
        return Sample(setting, left, kind.from_text(left)), Sample(setting, right, kind.from_text(right))
    left_pair, right_pair = values[name]
    return Sample(setting, *left_pair), Sample(setting, *right_pair)


ALL = [(setting, *samples(setting)) for setting in SETTINGS]
"""Every setting with its two values."""
