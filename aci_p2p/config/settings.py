"""The table of all settings, which flags, variables, the file, `config show` and its documentation are made from.

A row names a field of a dataclass, and its type and default are that field's. Its key is the path to it:
`provider.slots` is `slots` in the table `[provider]` of the file, `ACI_PROVIDER_SLOTS` in the environment, and the flag
`--slots`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, cast, get_type_hints

from aci_p2p.config import addresses, kinds
from aci_p2p.config.node import (
    DEFAULT_LISTEN,
    LOG_FORMATS,
    LOG_LEVELS,
    PRICINGS,
    ClientConfig,
    LogConfig,
    NodeConfig,
    ProviderConfig,
)
from aci_p2p.network.config import NetworkConfig

SECTIONS: Final[Mapping[str, type[Any]]] = {
    "": NodeConfig,
    "p2p": NetworkConfig,
    "provider": ProviderConfig,
    "client": ClientConfig,
    "log": LogConfig,
}
"""Tables of the file, and the dataclasses that they fill; the first is what stands before any table."""


def _daemon() -> NodeConfig:
    return NodeConfig(key="node", own_key=True, p2p=NetworkConfig(listen=(DEFAULT_LISTEN,)), provider=ProviderConfig())


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that the command line can be told."""

    node: NodeConfig = field(default_factory=_daemon)
    """A node that `join` runs; its provider is never None."""
    client: ClientConfig = field(default_factory=ClientConfig)
    """What `infer` asks for."""
    log: LogConfig = field(default_factory=LogConfig)
    """What a node logs."""

    @property
    def client_node(self) -> NodeConfig:
        """The node of a command that asks: it only dials; where it listened nobody would find it a moment later."""
        node, p2p = self.node, self.node.p2p
        return NodeConfig(
            home=node.home,
            network=node.network,
            p2p=NetworkConfig(
                listen=(),
                relay_server=False,
                relay_client=p2p.relay_client,
                hole_punching=p2p.hole_punching,
                mdns=p2p.mdns,
            ),
            bootstrap=node.bootstrap,
            model_store=node.model_store,
            state=node.state,
            runtime=node.runtime,
            offline=node.offline,
            stakes=node.stakes,
        )

    def section(self, name: str) -> object:
        """The dataclass of a table of the file."""
        parts: dict[str, object] = {
            "": self.node,
            "p2p": self.node.p2p,
            "provider": self.node.provider,
            "client": self.client,
            "log": self.log,
        }
        return parts[name]


def default_config() -> Config:
    """What `join` and `infer` do when they are told nothing."""
    return Config()


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting."""

    key: str
    """Dotted path: the table of the file, if it is in one, and the name of the field."""
    help: str
    """What it does, in a sentence."""
    kind: kinds.Kind
    """What it can hold."""
    flag: str
    """Option of the command line; of two, the second turns it off."""
    live: bool = False
    """Whether a running node takes a new value (SIGHUP)."""

    @property
    def section(self) -> str:
        """The table of the file; empty for what stands before any."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The name in its table, and of the field."""
        return self.key.rpartition(".")[2]

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "ACI_" + self.key.upper().replace(".", "_")

    def of(self, config: Config) -> object:
        """Its value in a configuration."""
        value: object = getattr(config.section(self.section), self.name)
        return value


def _kind_of(hint: object) -> kinds.Kind:
    """The kind of a field by its type."""
    simple: dict[object, kinds.Kind] = {
        str: kinds.Text(),
        int: kinds.Whole(),
        int | None: kinds.Optional(kinds.Whole()),
        float: kinds.Number(),
        bool: kinds.Switch(),
        Path: kinds.Folder(),
        Path | None: kinds.Optional(kinds.Folder()),
        tuple[str, ...]: kinds.Texts(),
    }
    return simple[hint]


def _row(key: str, flag: str, help_: str, *, live: bool = False, kind: kinds.Kind | None = None) -> Setting:
    section, _, name = key.rpartition(".")
    return Setting(key, help_, kind or _kind_of(get_type_hints(SECTIONS[section])[name]), flag, live)


def _switch(key: str, help_: str, *, live: bool = False) -> Setting:
    flag = key.rpartition(".")[2].replace("_", "-")
    return _row(key, f"--{flag}/--no-{flag}", help_, live=live)


SETTINGS: Final = (
    _row("home", "--home", "Folder of keys, models, jobs and proofs."),
    _row("model_store", "--model-store", "Folder of the models; by default in the home."),
    _row("state", "--state", "Folder of what may be lost, such as known addresses."),
    _row("runtime", "--runtime", "Folder of the control socket."),
    _row("network", "--network", "Network id; nodes of different networks ignore each other."),
    _row("key", "--key", "Name of the key that the node runs under."),
    _row(
        "bootstrap",
        "--bootstrap -b",
        "Multiaddr of a node to join through; more than one may be given.",
        live=True,
        kind=addresses.BOOTSTRAP,
    ),
    _switch("offline", "Contact nobody that is not named."),
    _row("stakes", "--stake", "Stake of a provider, <peer id>=<ACI>; more than one may be given."),
    _row(
        "p2p.listen",
        "--listen -l",
        "Multiaddr to listen on; more than one may be given, none: dial only.",
        kind=addresses.LISTEN,
    ),
    _row(
        "p2p.announce",
        "--announce",
        "Multiaddr that others can dial, if the node cannot know it: a forwarded port.",
        kind=addresses.ANNOUNCE,
    ),
    _row("p2p.low_water", "--low-water", "Connections kept when idle ones are closed."),
    _row("p2p.high_water", "--high-water", "Connections at which idle ones are closed."),
    _switch("p2p.relay_server", "Relay for nodes behind NATs, if others can reach this one."),
    _switch("p2p.relay_client", "Be reachable through relays, if others cannot reach this node."),
    _switch("p2p.hole_punching", "Make relayed connections direct where the NATs allow it."),
    _switch("p2p.mdns", "Find and be found by nodes of the local network."),
    _switch("provider.serve", "Serve models; without, the node only helps others to find each other."),
    _row(
        "provider.models",
        "--serve-model -s",
        "Model to serve; more than one may be given, none: all in the store.",
        live=True,
    ),
    _row("provider.input_token_price", "--input-price", "Price of a prompt token.", live=True, kind=kinds.Amount()),
    _row("provider.output_token_price", "--output-price", "Price of an output token.", live=True, kind=kinds.Amount()),
    _row(
        "provider.price",
        "--price",
        "Leave prices, or let them follow the load.",
        live=True,
        kind=kinds.Choice(*PRICINGS),
    ),
    _row(
        "provider.price_floor",
        "--price-floor",
        "Least for an output token, if it follows the load.",
        live=True,
        kind=kinds.Optional(kinds.Amount()),
    ),
    _row(
        "provider.price_ceiling",
        "--price-ceiling",
        "Most for an output token, if it follows the load.",
        live=True,
        kind=kinds.Optional(kinds.Amount()),
    ),
    _row(
        "provider.price_curve",
        "--price-curve",
        "Loads from which on prices are so many times as high.",
        live=True,
        kind=kinds.Curve(),
    ),
    _switch("provider.asks", "Publish standing asks, so that buyers find prices at once.", live=True),
    _row("provider.slots", "--slots", "Jobs at once.", live=True),
    _switch("provider.preload", "Load the models at the start, not at the first job."),
    _row("provider.threads", "--threads", "Threads of the executor; by default one less than there are cores."),
    _row("provider.grace_s", "--grace", "Seconds for running jobs to end when the node is stopped.", live=True),
    _row("provider.region", "--region", "Where the node is, as its asks and bids say it, such as eu-west.", live=True),
    _row("client.model", "--model -m", "Model to ask: a name, or a weights root in hex."),
    _row("client.max_tokens", "--max-tokens", "Longest answer, tokens."),
    _row("client.temperature", "--temperature", "How freely tokens are drawn; 0 always takes the likeliest."),
    _row("client.max_price", "--max-price", "Most to pay for the whole job.", kind=kinds.Amount()),
    _row("client.max_latency_ms", "--max-latency", "Longest promised time to the first token, ms."),
    _row("client.bid_window_ms", "--bid-window", "Longest wait for bids, ms."),
    _row("client.min_provider_stake", "--min-stake", "Least stake of a provider.", kind=kinds.Amount()),
    _row("client.priority_fee", "--priority-fee", "What to pay to be served before others.", kind=kinds.Amount()),
    _row("client.latency_value", "--latency-value", "What a second of waiting is worth.", kind=kinds.Amount()),
    _row("client.retry_cost", "--retry-cost", "What a provider's failure costs.", kind=kinds.Amount()),
    _row("client.quantisations", "--quantisation", "Weight format that will do; more than one may be given."),
    _row("client.regions", "--provider-region", "Region that will do; more than one may be given."),
    _row("client.providers", "--providers", "Providers that may begin: the next goes on where one has failed."),
    _row("client.hedge_after_ms", "--hedge-after", "Ask another too when no token has come for so many ms; 0: never."),
    _row("client.busy_wait_ms", "--busy-wait", "How long to ask again where providers are busy, ms."),
    _row("log.level", "--log-level", "Least that is logged.", live=True, kind=kinds.Choice(*LOG_LEVELS)),
    _row("log.format", "--log-format", "How each event is logged, in a line.", kind=kinds.Choice(*LOG_FORMATS)),
)
"""All of them, in the order of the file."""

BY_KEY: Final = {setting.key: setting for setting in SETTINGS}
"""The same, by key."""

NOT_SETTINGS: Final = frozenset({"p2p.named_only", "own_key", "p2p", "provider"})
"""Fields of NodeConfig that are no settings: what the command decides, and what has a table of its own."""


def build(values: Mapping[str, object]) -> Config:
    """The configuration with the values given by key, and the defaults otherwise. Raises LocalError."""
    base = default_config()

    def filled(section: str, **parts: object) -> Any:  # noqa: ANN401 - one of SECTIONS
        new = {item.name: values[item.key] for item in SETTINGS if item.section == section and item.key in values}
        return replace(cast("Any", base.section(section)), **new, **parts)

    node = filled("", p2p=filled("p2p"), provider=filled("provider"))
    return Config(node=node, client=filled("client"), log=filled("log"))


def fields_without_setting() -> list[str]:
    """Keys of fields that no row names; empty, or a field was forgotten."""
    keys = {f"{section}.{item.name}".lstrip(".") for section, kind in SECTIONS.items() for item in fields(kind)}
    return sorted(keys - NOT_SETTINGS - BY_KEY.keys())
