"""What a node and its parts are told, with defaults that work without any file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aci_p2p.config.paths import default_home, runtime_folder, socket_path, state_folder
from aci_p2p.network.config import NetworkConfig
from aci_p2p.protocol.catalogue import DEFAULT_MODEL
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.market import MAX_BID_WINDOW_MS
from aci_p2p.protocol.messages import MAX_SHARES, MAX_TEMPERATURE_MILLI, MAX_TOKENS
from aci_p2p.protocol.pricing import MAX_TOKEN_PRICE, ONE_ACI, ascends, parse_amount
from aci_p2p.protocol.publications import MAX_LATENCY_MS, MAX_PRICE_STEPS, PriceStep
from aci_p2p.protocol.terms import MAX_LABEL_BYTES
from aci_p2p.protocol.text import printable

DEFAULT_LISTEN: Final = "/ip4/0.0.0.0/tcp/9400"
"""All interfaces, on a port that firewalls can be opened for."""
DEFAULT_NETWORK: Final = "aci-main"
"""Network id of the public network."""
DEFAULT_INPUT_PRICE: Final = ONE_ACI // 1_000_000
"""Base units for each prompt token: 1 ACI for a million."""
DEFAULT_BUSY_WAIT_MS: Final = 10_000
"""Milliseconds: twice the longest time that a busy provider may name; most jobs end sooner."""
DEFAULT_PROVIDERS: Final = 3
"""One that fails, and one more, are bad luck; after a third something else is wrong."""
DEFAULT_OUTPUT_PRICE: Final = 4 * ONE_ACI // 1_000_000
"""Base units for each output token: 4 ACI for a million."""
DEFAULT_SLOTS: Final = 4
"""Jobs at once; the default executor decodes as many in one batch with little loss."""
MAX_SLOTS: Final = 1_024
"""Jobs at once, and threads, that a node can be told: more than any machine has use for."""
DEFAULT_GRACE_S: Final = 30
"""Seconds; most answers take fewer, and service managers wait for 90 before they kill."""
MAX_GRACE_S: Final = 3_600
"""Seconds; the longest answer of a large model takes less."""
DEFAULT_MAX_TOKENS: Final = 256
"""Output tokens; a long paragraph."""
DEFAULT_BID_WINDOW_MS: Final = 1_000
"""Milliseconds to wait for bids when not all of them are known to come: five gossip hops between continents."""
PRICINGS: Final = ("fixed", "auto")
"""Prices stay as they are set, or follow how busy the node is, between a floor and a ceiling."""
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
"""From most to least."""
LOG_FORMATS: Final = ("text", "logfmt", "json")
"""One line for each event: for people, as key=value pairs, as JSON documents."""

DEFAULT_LATENCY_VALUE: Final = ONE_ACI // 10_000
"""Base units that a second of waiting is worth: a tenth of what a long paragraph costs."""
DEFAULT_RETRY_COST: Final = 5 * DEFAULT_LATENCY_VALUE
"""Base units that a provider's failure costs: the five seconds until another has taken over."""

_NETWORK_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_KEY_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What `KeyRing` takes; the control socket and the address cache are named after it, too."""


def check_labels(*labels: str) -> None:
    """Raises LocalError on a quantisation or a region that a bid cannot carry."""
    for label in labels:
        if len(label.encode()) > MAX_LABEL_BYTES or printable(label) != label:
            msg = f"{label!r} is longer than {MAX_LABEL_BYTES} bytes, or cannot be printed"
            raise LocalError(msg)


def parse_stakes(stakes: Sequence[str]) -> dict[NodeId, int]:
    """Read stakes, each `<peer id>=<amount in ACI>`; base units by provider. Raises LocalError."""
    table: dict[NodeId, int] = {}
    for text in stakes:
        peer, equals, amount = text.partition("=")
        if not equals:
            msg = f"{text!r} is no stake"
            raise LocalError(msg, hint="write it as <peer id>=<amount in ACI>, such as 12D3KooW...=1000")
        table[NodeId.parse(peer)] = parse_amount(amount)
    return table


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """What a node serves, and for how much."""

    serve: bool = True
    """Serve at all."""
    models: tuple[str, ...] = ()
    """Names in the model store; none: every model that is in it."""
    input_token_price: int = DEFAULT_INPUT_PRICE
    """Base units (10^-18 ACI) for each prompt token."""
    output_token_price: int = DEFAULT_OUTPUT_PRICE
    """Base units (10^-18 ACI) for each output token."""
    slots: int = DEFAULT_SLOTS
    """Jobs at once."""
    price: str = "fixed"
    """What becomes of these prices: one of PRICINGS."""
    price_floor: int | None = None
    """Least base units for each output token, if the price follows the load; None: half of the one above."""
    price_ceiling: int | None = None
    """Most base units for each output token, if the price follows the load; None: twice the one above."""
    price_curve: tuple[PriceStep, ...] = ()
    """By how much the prices rise or fall while so much of the slots is in use; none: they do not."""
    asks: bool = True
    """Publish standing asks: up to one each 20 s for a model, whether anybody wants it or not; else only bid."""
    preload: bool = True
    """Load the models at the start, not at the first job."""
    threads: int | None = None
    """Threads of the executor; None: one less than the machine has cores."""
    grace_s: int = DEFAULT_GRACE_S
    """Seconds for running jobs to end when the node is stopped; what runs then still is handed back."""
    region: str = ""
    """Where the node is, as its asks and bids say it; empty: they do not say."""

    def __post_init__(self) -> None:
        """Raises LocalError on values that cannot work."""
        if not 0 <= self.grace_s <= MAX_GRACE_S:
            msg = f"the grace period is between 0 and {MAX_GRACE_S} s"
            raise LocalError(msg)
        if not 1 <= self.slots <= MAX_SLOTS or not 1 <= (self.threads or 1) <= MAX_SLOTS or self.threads == 0:
            msg = f"slots and threads are between 1 and {MAX_SLOTS}"
            raise LocalError(msg)
        check_labels(self.region)
        if self.input_token_price < 0 or self.output_token_price < 0:
            msg = "prices are not negative"
            raise LocalError(msg)
        floor, ceiling = self.price_bounds
        if not 0 <= floor <= ceiling <= MAX_TOKEN_PRICE:
            msg = "the price floor is above the price ceiling, or no price at all"
            raise LocalError(msg, hint="give both --price-floor and --price-ceiling, around --output-price")
        if self.price not in PRICINGS:
            msg = f"{self.price!r} is no way to set prices"
            raise LocalError(msg, hint=f"one of {', '.join(PRICINGS)}")
        if not ascends(self.price_curve) or len(self.price_curve) > MAX_PRICE_STEPS:
            msg = f"a price curve has at most {MAX_PRICE_STEPS} steps, at loads that ascend from above 0"
            raise LocalError(msg)

    @property
    def price_bounds(self) -> tuple[int, int]:
        """Floor and ceiling of the price of an output token, base units."""
        price, floor, ceiling = self.output_token_price, self.price_floor, self.price_ceiling
        return price // 2 if floor is None else floor, 2 * price if ceiling is None else ceiling


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """What the command line asks for when it is told no more than a question."""

    model: str = DEFAULT_MODEL
    """Name, or weights root in hex."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    """Longest answer, tokens."""
    temperature: float = 0.0
    """0 is greedy; at most MAX_TEMPERATURE_MILLI thousandths."""
    max_price: int = ONE_ACI
    """Most to pay for the whole job, base units (10^-18 ACI)."""
    max_latency_ms: int = MAX_LATENCY_MS
    """Longest promised time to the first token, milliseconds."""
    bid_window_ms: int = DEFAULT_BID_WINDOW_MS
    """Longest wait for bids, milliseconds."""
    min_provider_stake: int = 0
    """Least stake of a provider, base units (10^-18 ACI)."""
    priority_fee: int = 0
    """What is paid to be served before others, base units (10^-18 ACI)."""
    latency_value: int = DEFAULT_LATENCY_VALUE
    """What a second until the first token is worth, base units (10^-18 ACI)."""
    retry_cost: int = DEFAULT_RETRY_COST
    """What a provider's failure costs, base units (10^-18 ACI)."""
    quantisations: tuple[str, ...] = ()
    """Weight formats that will do; none: any."""
    regions: tuple[str, ...] = ()
    """Regions that will do; none: any."""
    providers: int = DEFAULT_PROVIDERS
    """Providers that may begin, one after the other: the next goes on where one has failed."""
    hedge_after_ms: int = 0
    """When the first token is so late, another provider is asked too, milliseconds from the award; 0: never."""
    busy_wait_ms: int = DEFAULT_BUSY_WAIT_MS
    """How long after the beginning to ask again where providers are busy, milliseconds."""

    def __post_init__(self) -> None:
        """Raises LocalError on values that an offer cannot carry."""
        for name, value, most in (
            ("max_tokens", self.max_tokens, MAX_TOKENS),
            ("max_latency_ms", self.max_latency_ms, MAX_LATENCY_MS),
            ("bid_window_ms", self.bid_window_ms, MAX_BID_WINDOW_MS),
            ("providers", self.providers, MAX_SHARES),
        ):
            if not 1 <= value <= most:
                msg = f"{name} is between 1 and {most}"
                raise LocalError(msg)
        if not 0 <= self.temperature <= MAX_TEMPERATURE_MILLI / 1_000:
            msg = f"the temperature is between 0 and {MAX_TEMPERATURE_MILLI // 1_000}"
            raise LocalError(msg)
        check_labels(*self.quantisations, *self.regions)
        if min(self.max_price, self.min_provider_stake, self.priority_fee, self.latency_value, self.retry_cost) < 0:
            msg = "prices are not negative"
            raise LocalError(msg)
        if min(self.hedge_after_ms, self.busy_wait_ms) < 0:
            msg = "times to wait are not negative"
            raise LocalError(msg)
        if self.hedge_after_ms and self.providers == 1:
            msg = "hedge_after_ms needs 2 providers at least, and providers allows 1"
            raise LocalError(msg)


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What a node says on standard error."""

    level: str = "info"
    """The least that is said: one of LOG_LEVELS."""
    format: str = "text"
    """How it is said: one of LOG_FORMATS."""

    def __post_init__(self) -> None:
        """Raises LocalError on an unknown level or format."""
        if self.format not in LOG_FORMATS:
            msg = f"{self.format!r} is no log format"
            raise LocalError(msg, hint=f"one of {', '.join(LOG_FORMATS)}")
        if self.level not in LOG_LEVELS:
            msg = f"{self.level!r} is no log level"
            raise LocalError(msg, hint=f"one of {', '.join(LOG_LEVELS)}")


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """One node."""

    home: Path = field(default_factory=default_home)
    """Where keys, models and the database lie."""
    network: str = DEFAULT_NETWORK
    """Network id; nodes of different networks ignore each other's messages."""
    key: str = "client"
    """Name of the key; if another process uses it, `<key>-2` and so on."""
    own_key: bool = False
    """Insist on exactly that key: for nodes whose identity others remember."""
    p2p: NetworkConfig = field(default_factory=NetworkConfig)
    """Where it listens, and how it gets through NATs."""
    bootstrap: tuple[str, ...] = ()
    """Multiaddrs of nodes to join through, each with `/p2p/<peer id>`."""
    provider: ProviderConfig | None = None
    """What to serve; None: consume only."""
    model_store: Path | None = None
    """Directory of the model store; None: below `home`."""
    state: Path | None = None
    """Directory of what may be lost; None: below `home`, or the XDG state directory."""
    runtime: Path | None = None
    """Directory of the control socket; None: below `home`, or the XDG runtime directory."""
    offline: bool = False
    """Contact nobody that is not named: only `bootstrap`, and who dials us."""
    stakes: tuple[str, ...] = ()
    """Stakes of providers, each `<peer id>=<amount in ACI>`; who is not named has none."""

    def __post_init__(self) -> None:
        """Raises LocalError on a network id that topics and envelopes cannot carry, and on what names no key."""
        if not _NETWORK_ID.fullmatch(self.network):
            msg = f"{self.network!r} is not a network id"
            raise LocalError(msg, hint="use at most 32 lower-case letters, digits and -, such as aci-main")
        parse_stakes(self.stakes)
        if not _KEY_NAME.fullmatch(self.key):
            msg = f"{self.key!r} is not a key name"
            raise LocalError(msg, hint="use at most 64 letters, digits, - and _")

    @property
    def keys_path(self) -> Path:
        """Directory of key files."""
        return self.home / "keys"

    @property
    def models_path(self) -> Path:
        """Directory of the model store."""
        return self.model_store or self.home / "models"

    @property
    def database_path(self) -> Path:
        """File of the job database."""
        return self.home / "aci.sqlite3"

    @property
    def state_path(self) -> Path:
        """Directory of what may be lost."""
        return self.state or state_folder(self.home)

    @property
    def address_cache_path(self) -> Path:
        """File of the nodes that this one knew, for coming back when no bootstrap node answers."""
        return self.state_path / f"addresses-{self.key}.json"

    @property
    def runtime_path(self) -> Path:
        """Directory of the control socket."""
        return self.runtime or runtime_folder(self.home)

    @property
    def control_socket_path(self) -> Path:
        """Unix socket that a running node answers on; its directory is made by `make_private_folder`."""
        return socket_path(self.runtime_path, self.key)
